"""`python -m pretrain.tools.verify_strategies`, for a checkout."""

from pretrain.tools.verify_strategies import main

main()
