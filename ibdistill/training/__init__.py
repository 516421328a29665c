"""A run: built, stepped, saved."""
