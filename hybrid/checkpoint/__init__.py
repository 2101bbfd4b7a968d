"""A model's state on disk."""
