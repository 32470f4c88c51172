"""Calls that run again without the layers' code."""
