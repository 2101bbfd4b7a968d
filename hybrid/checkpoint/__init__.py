"""Keeps a model's state on disk."""
