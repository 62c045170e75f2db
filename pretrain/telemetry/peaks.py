"""Peak FLOP/s of devices from their vendors' datasheets: dense matmuls without sparsity, accumulated in fp32.

A device is matched by the complete name its driver reports, because similar names differ in speed: an H100 PCIe is slower
than an H100 SXM, a laptop's RTX 4090 is slower than a desktop's, and a MIG slice is a part of a GPU. A device that is not
listed has no known peak, nor has a dtype whose number the datasheet does not give.
"""

from __future__ import annotations

from dataclasses import dataclass

TERA = 1e12


@dataclass(frozen=True, slots=True)
class Peak:
    """Peak dense TFLOP/s per matmul dtype; ``None`` if the device does not support it or the datasheet does not give it."""

    float32: float | None
    tf32: float | None
    float16: float | None
    bfloat16: float | None


# NVIDIA A100 datasheet (June 2021); the same for SXM and PCIe, 40 and 80 GB.
A100 = Peak(19.5, 156, 312, 312)
# NVIDIA H100 Tensor Core GPU Architecture whitepaper, v1.04, table of SXM5 and PCIe.
H100_SXM = Peak(66.9, 494.7, 989.4, 989.4)
H100_PCIE = Peak(51.2, 378, 756, 756)
# NVIDIA H100 datasheet (2024), column H100 NVL; tensor figures there are with sparsity: half of 835 and 1,671.
H100_NVL = Peak(60, 417.5, 835.5, 835.5)
# NVIDIA H200 datasheet (2024), SXM and NVL; with sparsity there: half of 989, 1,979 and of 835, 1,671.
H200 = Peak(67, 494.5, 989.5, 989.5)
H200_NVL = H100_NVL
# NVIDIA Blackwell datasheet, one GPU of an HGX B200; with sparsity there: half of 2,200 and 4,500.
B200 = Peak(75, 1100, 2250, 2250)
# NVIDIA L4 datasheet (2023); with sparsity there: half of 120 and 242.
L4 = Peak(30.3, 60, 121, 121)
# NVIDIA L40S datasheet (2023), which gives both.
L40S = Peak(91.6, 183, 362.05, 362.05)
# NVIDIA A10G datasheet, as AWS gives it out for its g5 instances; it is not an A10.
A10G = Peak(31.52, 35, 70, 70)
# NVIDIA V100 datasheet (January 2020): SXM2, PCIe and V100S.
V100_SXM = Peak(15.7, None, 125, None)
V100_PCIE = Peak(14, None, 112, None)
V100S = Peak(16.4, None, 130, None)
# NVIDIA T4 datasheet (2019).
T4 = Peak(8.1, None, 65, None)
# NVIDIA Ampere GA102, Ada and RTX Blackwell GPU architecture whitepapers: tensor figures with FP32 accumulate, which GeForce
# cards do at half the speed of FP16 accumulate.
RTX_3090 = Peak(35.6, 35.6, 71, 71)
RTX_4090 = Peak(82.6, 82.6, 165.2, 165.2)
RTX_5090 = Peak(104.8, 104.8, 209.5, 209.5)
# AMD Instinct MI200 series datasheet: half of an MI250X (matrix: 95.7 and 383), as each of its two dies is a device.
MI250X_DIE = Peak(47.85, None, 191.5, 191.5)
# AMD Instinct MI300X datasheet (2023).
MI300X = Peak(163.4, 653.7, 1307.4, 1307.4)

PEAKS = {  # key: `torch.cuda.get_device_name()` without the vendor's name, which newer drivers put before it
    "A100-SXM4-40GB": A100,
    "A100-SXM4-80GB": A100,
    "A100-PCIE-40GB": A100,
    "A100 80GB PCIe": A100,
    "H100 80GB HBM3": H100_SXM,
    "H100 PCIe": H100_PCIE,
    "H100 NVL": H100_NVL,
    "H200": H200,
    "H200 NVL": H200_NVL,
    "B200": B200,
    "L4": L4,
    "L40S": L40S,
    "A10G": A10G,
    "Tesla V100-SXM2-16GB": V100_SXM,
    "Tesla V100-SXM2-32GB": V100_SXM,
    "Tesla V100-PCIE-16GB": V100_PCIE,
    "Tesla V100-PCIE-32GB": V100_PCIE,
    "Tesla V100S-PCIE-32GB": V100S,
    "Tesla T4": T4,
    "GeForce RTX 3090": RTX_3090,
    "GeForce RTX 4090": RTX_4090,
    "GeForce RTX 5090": RTX_5090,
    "AMD Instinct MI250X": MI250X_DIE,  # not "MI250X / MI250", which may be either
    "AMD Instinct MI300X": MI300X,
    "AMD Instinct MI300X OAM": MI300X,
}


def peak_flops(device: str, products: str) -> float | None:
    """Return the peak FLOP/s of a device, or ``None`` if it is unknown.

    ``device`` is the name that the driver reports; ``products`` is the matmul dtype: float32, tf32, float16 or bfloat16."""
    peak = PEAKS.get(device.strip().removeprefix("NVIDIA "))
    tera = getattr(peak, products) if peak is not None else None
    return None if tera is None else tera * TERA
