"""The command: `python -m pretrain`, or `pretrain`."""

import sys


def main() -> None:
    try:
        from pretrain.cli import program
    except KeyboardInterrupt:  # nothing has begun; from here on it is caught where something has
        sys.stderr.write("stopped (Ctrl-C); the same command goes on from here\n")
        sys.exit(75)
    program()


if __name__ == "__main__":
    main()
