"""`fastppo` and `python -m fastppo`."""

import sys


def main() -> int:
    """Run the command line and return its exit status; Ctrl-C also ends the imports with one line."""
    try:
        from fastppo.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
