"""This package draws what strangers and bad luck hand to the command line, and judges the end."""
