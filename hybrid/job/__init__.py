"""This package holds the schema of a job, reads one, and defines every error. It needs no torch."""
