"""The dtypes in which a run keeps its weights and computes. The names are Lightning's.

"Mixed" precisions keep fp32 weights and compute matmuls in 16 bits under autocast. "True" precisions use one dtype for both.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    import torch

    from pretrain.strategy.loss_scaler import LossScaler


@dataclass(frozen=True)
class Precision:
    """The precision of a run. It has no state.

    Attributes:
        name: The name by which it is selected.
        weights: Dtype of the weights.
        compute: Dtype of the matmuls.
        allow_cpu: true: allow it on a CPU, where it is about 11 × slower than fp32.
        tf32: true: NVIDIA GPUs round matmul inputs to a 10-bit mantissa, which is many times faster.
    """

    name: Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true"] = "32-true"
    weights: Literal["float32", "bfloat16"] = "float32"
    compute: Literal["float32", "float16", "bfloat16"] = "float32"
    tf32: bool = False
    allow_cpu: bool = False

    def check(self, device_type: str) -> None:
        """Raise ``UserError`` for a device on which this precision is not practical. This does not import torch."""
        if self.compute == "float16" and device_type == "cpu" and not self.allow_cpu:
            raise UserError(
                f"precision={self.name} needs a GPU; fp16 on a CPU runs about 11 × slower; "
                "use bf16-mixed or 32-true, or precision.allow_cpu=true to run it anyway"
            )

    @property
    def param_dtype(self) -> torch.dtype:
        import torch

        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.weights]

    @property
    def compute_dtype(self) -> torch.dtype:
        import torch

        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[self.compute]

    @property
    def products(self) -> str:
        """The matmul dtype by which a device's peak is looked up: float32, tf32, float16 or bfloat16."""
        return "tf32" if self.compute == "float32" and self.tf32 else self.compute

    def autocast(self, device_type: str) -> AbstractContextManager[object]:
        """Return the context of every forward; it does nothing if weights and matmuls have the same dtype."""
        import torch

        if self.weights == self.compute:
            return nullcontext()
        return torch.autocast(device_type, self.compute_dtype)

    def grad_scaler(self, device_type: str) -> LossScaler:
        """Return a loss scaler, which is enabled under fp16 only. This also sets ``tf32`` for a GPU's fp32 matmuls."""
        import torch

        from pretrain.strategy.loss_scaler import LossScaler

        if device_type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = self.tf32
            torch.backends.cudnn.allow_tf32 = self.tf32
        return LossScaler(device_type, enabled=self.compute == "float16")
