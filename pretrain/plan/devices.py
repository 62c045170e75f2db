"""The devices that a plan can be made for: their memory, and the name by which `telemetry.peaks` lists their FLOP/s.

The memory is the total that CUDA reports, as ``torch.cuda.get_device_properties`` returns it, where a public source has it. It is
less than the driver's total and than the capacity in a datasheet: an H100 of "80 GB" has 79.11 GiB.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.runtime.errors import UserError, did_you_mean
from pretrain.telemetry.peaks import peak_flops

MIB = 2**20
# The share of a device's memory that a plan leaves free: CUDA's context, buffers of NCCL, and fragmentation.
ROOM = 0.07


@dataclass(frozen=True, slots=True)
class Device:
    """A device to plan for.

    Attributes:
        name: short name, for ``plan.device``.
        memory_bytes: its total memory; ``None`` if unknown.
        driver_name: the name that its driver reports.
        is_gpu: whether it is a GPU.
    """

    name: str
    memory_bytes: int | None
    driver_name: str
    is_gpu: bool = True

    @property
    def usable_bytes(self) -> int | None:
        """The memory that tensors may take; ``None`` if unknown."""
        return None if self.memory_bytes is None else int(self.memory_bytes * (1 - ROOM))

    @property
    def workspace_bytes(self) -> int:
        """What cuBLAS allocates through torch: a workspace for each of the two threads that compute (torch 2.13,
        ``getChosenWorkspaceSize``): 32 MiB since Hopper, else 8.1 MiB."""
        if not self.is_gpu or self.name.startswith("MI"):
            return 0
        return 2 * (32 * MIB if self.name[:2] in ("H1", "H2", "B2", "GH") else 8 * MIB + 128 * 1024)

    def peak_flops(self, products: str) -> float | None:
        """Return the peak FLOP/s for a matmul dtype, or ``None`` if it is unknown."""
        return peak_flops(self.driver_name, products)


def _gib(size: float) -> int:
    return int(size * 2**30)


DEVICES = {
    device.name: device
    for device in (
        # As CUDA reports it, from torch's message about memory that ran out ("a total capacity of …").
        Device("A100-40GB", _gib(39.50), "A100-SXM4-40GB"),  # github.com/TianheWu/CoSeR/issues/10
        Device("B200", _gib(178.35), "B200"),  # many public logs; nvidia-smi: 183,359 MiB
        Device(
            "H100", _gib(79.11), "H100 80GB HBM3"
        ),  # github.com/vllm-project/vllm/issues/27508; nvidia-smi: 81,559 MiB
        Device("H200", _gib(139.80), "H200"),  # many public logs; nvidia-smi: 143,771 MiB
        Device("L40S", _gib(44.42), "L40S"),  # github.com/stepfun-ai/Step-Video-T2V/issues/8
        Device("MI300X", _gib(191.98), "AMD Instinct MI300X"),  # many public logs; some drivers report 191.69
        Device("RTX4090", _gib(23.64), "GeForce RTX 4090"),  # github.com/3DTopia/Phidias-Diffusion/issues/8
        Device("RTX5090", _gib(31.36), "GeForce RTX 5090"),  # many public logs, which have 31.34 to 31.39
        Device("T4", _gib(14.75), "Tesla T4"),  # github.com/hpcaitech/Open-Sora/issues/697
        Device("V100-32GB", _gib(31.74), "Tesla V100-SXM2-32GB"),  # github.com/haotian-liu/LLaVA/issues/812
        # The total of nvidia-smi, of which CUDA reports some hundred MiB less: the number of CUDA was not found.
        Device("A10G", 23_028 * MIB, "A10G"),
        Device("A100-80GB", 81_920 * MIB, "A100-SXM4-80GB"),
        Device("H100-NVL", 95_830 * MIB, "H100 NVL"),
        Device("H100-PCIe", 81_559 * MIB, "H100 PCIe"),
        Device("L4", 23_034 * MIB, "L4"),
        Device("RTX3090", 24_576 * MIB, "GeForce RTX 3090"),
        # From datasheets alone: AMD Instinct MI250X (64 GB for each of its two devices), NVIDIA Tesla V100 (16 GB).
        Device("MI250X", 65_536 * MIB, "AMD Instinct MI250X"),
        Device("V100-16GB", 16_384 * MIB, "Tesla V100-SXM2-16GB"),
    )
}
ALIASES = {"A100": "A100-80GB", "V100": "V100-16GB"}


def device_of(name: str, *, key: str = "plan.device") -> Device:
    """Return the GPU called ``name``, in any spelling of case, spaces and hyphens, or by its driver's name; or the CPU.

    Raises ``UserError`` with the list for any other name.
    """
    wanted = _plain(name.removeprefix("NVIDIA "))
    if wanted == "cpu":
        return cpu()
    for alias, short in ALIASES.items():
        if wanted == _plain(alias):
            return DEVICES[short]
    for device in DEVICES.values():
        if wanted in (_plain(device.name), _plain(device.driver_name)):
            return device
    hint = did_you_mean(name, {*DEVICES, *ALIASES, "cpu"})
    raise UserError(f"{key}={name}: no such device{hint}; known: {', '.join(sorted(DEVICES))}, cpu")


def cpu() -> Device:
    """Return this machine's CPU with the host memory that is available."""
    from pretrain.runtime.memory import available_bytes

    return Device("cpu", available_bytes(), "cpu", is_gpu=False)


def this_device() -> Device:
    """Return the first GPU of this machine with the memory that torch reports, or the CPU."""
    from pretrain.config.check import gpu_visible

    if not gpu_visible():
        return cpu()
    import torch

    if not torch.cuda.is_available():
        return cpu()
    properties = torch.cuda.get_device_properties(0)
    return device_named(properties.name, properties.total_memory)


def device_named(driver_name: str, memory_bytes: int) -> Device:
    """Return the GPU that its driver calls ``driver_name``, with its own amount of memory; it need not be listed."""
    plain = driver_name.strip().removeprefix("NVIDIA ")
    short = next((d.name for d in DEVICES.values() if d.driver_name == plain), plain)
    return Device(short, memory_bytes, driver_name)


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
