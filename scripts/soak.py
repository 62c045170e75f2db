"""`python -m pretrain.tools.soak`, for a checkout."""

from pretrain.tools.soak import main

main()
