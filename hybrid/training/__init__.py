"""One run: its check before any process starts, its loop, its evaluation, what it shows."""
