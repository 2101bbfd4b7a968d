"""This module runs the command line: `python -m hybrid`."""

from .cli import main

main()
