"""Students and teachers as modules."""
