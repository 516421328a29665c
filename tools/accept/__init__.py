"""The checks of tools/accept.py, the process that runs them, and the report."""
