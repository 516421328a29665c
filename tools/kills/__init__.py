"""The phases at which tools/kills.py aims, the processes that it starts, and what it compares."""
