"""This package starts the processes of a run, places and joins them, and says why one failed."""
