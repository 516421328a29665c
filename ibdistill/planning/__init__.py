"""Whether a run fits, before it starts."""
