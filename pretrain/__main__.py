"""The entry point of `python -m pretrain` and of the `pretrain` command."""

import locale
import os
import sys


def main() -> None:
    is_utf8 = sys.flags.utf8_mode or locale.getencoding().lower().replace("-", "") == "utf8"
    if not is_utf8 and os.environ.get("PYTHONUTF8") != "1":  # "1": UTF-8 mode was requested already
        # Documents can be in any language, so every process of the run reads, writes and prints UTF-8.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})
    try:
        from pretrain.cli.main import program
    except KeyboardInterrupt:  # nothing has started yet; later interrupts are handled in `pretrain.cli.main`
        sys.stderr.write("stopped (Ctrl-C); the same command continues from here\n")
        sys.exit(75)
    program()


if __name__ == "__main__":
    main()
