"""Measures the time, memory and traffic of a run, and describes the machine it ran on."""
