"""`python -m pretrain.tools.verify_resume`, for a checkout."""

from pretrain.tools.verify_resume import main

main()
