"""Runs a job once: the check before any process starts, the loop, the evaluation, the display."""
