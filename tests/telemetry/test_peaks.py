"""The table of device peaks: by whole names, so that what is not in it has no number."""

import pytest

from pretrain.telemetry.peaks import PEAKS, peak_flops


@pytest.mark.parametrize(
    ("device", "products", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H100 NVL", "bfloat16", 835.5e12),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156e12),
        ("A100-SXM4-80GB", "float32", 19.5e12),
        ("NVIDIA GeForce RTX 4090", "float16", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "float16", None),
        ("NVIDIA GeForce RTX 4090 D", "float16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None),
        ("NVIDIA A10", "bfloat16", None),
        ("AMD Instinct MI250X / MI250", "bfloat16", None),
        ("Tesla V100-SXM2-32GB", "bfloat16", None),
        ("cpu", "float32", None),
    ],
)
def test_peak(device, products, expected):
    assert peak_flops(device, products) == expected


def test_dense_figures_only():
    """16 bits are twice tf32 and bf16 is fp16 where a device has them: a figure with sparsity among them would show."""
    for name, peak in PEAKS.items():
        if peak.tf32 is not None:
            assert peak.float16 / peak.tf32 == pytest.approx(2, rel=0.03), name
        assert peak.bfloat16 in (None, peak.float16), name
