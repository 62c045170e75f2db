"""A strategy whose ranks share one replica of the model, as under tensor parallelism: all of them compute on the same batches.

Here each rank holds the full model, so that the numbers are those of one process.
"""

from dataclasses import dataclass

from pretrain.strategy.single import Single


@dataclass(frozen=True)
class Twins(Single):
    needs_group = True
    model_parallel_size = 2

    def workers(self, devices: int) -> int:
        return devices
