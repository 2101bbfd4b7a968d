"""This package cuts a model into pipeline stages and checks the cut before a process starts."""
