"""The search for a layout; ``door.py`` has what users call."""
