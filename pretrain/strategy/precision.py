"""In what floating-point types a run keeps its weights and computes. One value, no state; the names are Lightning's.

Mixed: fp32 weights, products in 16 bits under autocast. True: weights and products in the same type.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch.amp.grad_scaler import GradScaler


@dataclass(frozen=True)
class Precision:
    """``weights``: type of parameters (and of what the optimizer starts from); ``compute``: type of the products.

    ``tf32``: fp32 products of an NVIDIA GPU round their inputs to 10 bits of mantissa (many times faster).
    ``allow_cpu``: run fp16 on a CPU all the same.
    """

    name: Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true"]
    weights: Literal["float32", "bfloat16"]
    compute: Literal["float32", "float16", "bfloat16"]
    tf32: bool = False
    allow_cpu: bool = False

    def check(self, device_type: str) -> None:
        """Raises ``UserError`` where this precision can't sensibly run. Imports no torch."""
        if self.compute == "float16" and device_type == "cpu" and not self.allow_cpu:
            raise UserError(
                f"precision={self.name} needs a GPU; fp16 on a CPU runs about 11 × slower; "
                "use bf16-mixed or 32-true, or precision.allow_cpu=true to run it all the same"
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
        """What a device's peak goes by: float32, tf32, float16 or bfloat16."""
        return "tf32" if self.compute == "float32" and self.tf32 else self.compute

    def autocast(self, device_type: str) -> AbstractContextManager[object]:
        """The context of every forward; no context where weights and products have the same type."""
        import torch

        if self.weights == self.compute:
            return nullcontext()
        return torch.autocast(device_type, self.compute_dtype)

    def grad_scaler(self, device_type: str) -> GradScaler:
        """A scaler that works under fp16 and passes everything through otherwise. Sets a GPU's fp32 products as asked."""
        import torch

        if device_type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = self.tf32
            torch.backends.cudnn.allow_tf32 = self.tf32
        return torch.amp.GradScaler(device_type, enabled=self.compute == "float16")
