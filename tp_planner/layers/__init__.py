"""A plan put on layers."""
