"""What a rank holds of a model."""
