"""Laws of continual pretraining, as pure fits of numbers: a mixture law, a learning rate, learning dynamics, a batch size.

A fit never guesses: it raises `NotSupported` with one plain sentence where the points do not carry its law.
"""

from pretrain.advise.laws.errors import NotSupported

__all__ = ["NotSupported"]
