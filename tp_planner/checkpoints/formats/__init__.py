"""What files of weights hold and where, one format a file; see ``stored.py`` for what they have in common."""
