"""The command: `python -m pretrain`, or `pretrain`."""

import locale
import os
import sys


def main() -> None:
    is_utf8 = sys.flags.utf8_mode or locale.getencoding().lower().replace("-", "") == "utf8"
    if not is_utf8 and os.environ.get("PYTHONUTF8") != "1":  # else it has been tried
        # Text of any language is read, written and printed: every process of the run does it in UTF-8.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})
    try:
        from pretrain.cli.main import program
    except KeyboardInterrupt:  # nothing has begun; from here on it is caught where something has
        sys.stderr.write("stopped (Ctrl-C); the same command goes on from here\n")
        sys.exit(75)
    program()


if __name__ == "__main__":
    main()
