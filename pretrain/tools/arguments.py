"""The command line of a tool."""

import argparse


def tool_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of the tool ``name``, whose help shows ``description`` as it is written.

    It accepts no abbreviated options, because a tool may pass on the words that it does not know to a run.
    """
    return argparse.ArgumentParser(
        f"python -m pretrain.tools.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
