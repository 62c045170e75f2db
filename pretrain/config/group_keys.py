"""The keys that each part of a group has, also one of another package."""

from pretrain.optim.lr_factors import LrFactors

GROUP_KEYS = {"optimizer": LrFactors}  # group → the class whose fields they are
