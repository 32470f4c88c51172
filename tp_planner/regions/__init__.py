"""What runs, and where a placement changes."""
