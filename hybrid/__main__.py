"""This module runs the command line: `python -m hybrid`, and the installed `hybrid`."""

import sys

if not sys.flags.safe_path and "-m hybrid" in " ".join(sys.orig_argv[:5]):
    # `-m` puts the current folder first, where a user's `random.py` would hide Python's own.
    sys.path.append(sys.path.pop(0))


def main() -> None:
    """Run the command line, which needs a third of a second to be imported."""
    from .launch.garbage import collect_rarely
    from .launch.streams import begin

    begin()
    collect_rarely()
    try:
        from . import cli
    except KeyboardInterrupt:
        print("hybrid: interrupted", file=sys.stderr)
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
