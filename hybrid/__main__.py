"""`python -m hybrid`: the command line."""

from .cli import main

main()
