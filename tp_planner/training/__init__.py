"""The step of a real job."""
