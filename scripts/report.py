"""`python -m pretrain.tools.report`, for a checkout."""

from pretrain.tools.report import main

main()
