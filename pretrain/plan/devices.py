"""The devices that a plan can be made for: their memory, and the name by which `telemetry.peaks` lists their FLOP/s.

The memory is what the driver reports as total (``memory.total`` of nvidia-smi; for AMD the capacity in the datasheet), in MiB.
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


DEVICES = {
    device.name: device
    for device in (
        Device("A10G", 23_028 * MIB, "A10G"),
        Device("A100-40GB", 40_960 * MIB, "A100-SXM4-40GB"),
        Device("A100-80GB", 81_920 * MIB, "A100-SXM4-80GB"),
        Device("B200", 183_359 * MIB, "B200"),
        Device("H100", 81_559 * MIB, "H100 80GB HBM3"),
        Device("H100-NVL", 95_830 * MIB, "H100 NVL"),
        Device("H100-PCIe", 81_559 * MIB, "H100 PCIe"),
        Device("H200", 143_771 * MIB, "H200"),
        Device("L4", 23_034 * MIB, "L4"),
        Device("L40S", 46_068 * MIB, "L40S"),
        Device("MI250X", 65_536 * MIB, "AMD Instinct MI250X"),
        Device("MI300X", 196_592 * MIB, "AMD Instinct MI300X"),
        Device("RTX3090", 24_576 * MIB, "GeForce RTX 3090"),
        Device("RTX4090", 24_564 * MIB, "GeForce RTX 4090"),
        Device("RTX5090", 32_607 * MIB, "GeForce RTX 5090"),
        Device("T4", 15_360 * MIB, "Tesla T4"),
        Device("V100-16GB", 16_384 * MIB, "Tesla V100-SXM2-16GB"),
        Device("V100-32GB", 32_768 * MIB, "Tesla V100-SXM2-32GB"),
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
