"""Compares many runs of one job: a session starts them, and a verdict judges each."""
