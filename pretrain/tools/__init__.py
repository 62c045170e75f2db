"""Programs that check runs of yours or show them, each started with ``python -m pretrain.tools.<name>``."""
