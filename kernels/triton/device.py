"""What the cost model knows about a GPU, measured or listed, so that configurations can be chosen without one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True, kw_only=True)
class DeviceProperties:
    """Limits of a device. Rates are peaks; the cost model applies its own efficiencies.

    Arguments:
        backend: ``cuda`` or ``hip``. arch: 80, 90, … or ``gfx942``.
        shared_bytes: shared memory that one program may use; a multiprocessor has about as much in all.
        bandwidth: bytes per second of device memory. flops: dense bfloat16 operations per second.
    """

    name: str
    backend: str
    arch: int | str
    num_sms: int
    shared_bytes: int
    bandwidth: float
    flops: float
    warp_size: int = 32

    @property
    def has_tma(self) -> bool:
        """Whether tensor descriptors turn into copies by hardware."""
        return self.backend == "cuda" and int(self.arch) >= 90

    @property
    def has_fp8(self) -> bool:
        """Whether e4m3 is a type of the hardware."""
        return self.backend == "cuda" and int(self.arch) >= 89

    @property
    def target(self) -> GPUTarget:
        return GPUTarget(self.backend, self.arch, self.warp_size)


H100 = DeviceProperties(
    name="NVIDIA H100 80GB HBM3", backend="cuda", arch=90, num_sms=132, shared_bytes=232448, bandwidth=3.35e12,
    flops=989e12,
)  # fmt: skip
A100 = DeviceProperties(
    name="NVIDIA A100-SXM4-80GB", backend="cuda", arch=80, num_sms=108, shared_bytes=166912, bandwidth=2.04e12,
    flops=312e12,
)  # fmt: skip
MI300X = DeviceProperties(
    name="AMD Instinct MI300X", backend="hip", arch="gfx942", num_sms=304, shared_bytes=65536, bandwidth=5.3e12,
    flops=1307e12, warp_size=64,
)  # fmt: skip
LISTED = {"sm_90": H100, "sm_80": A100, "gfx942": MI300X}

# Dense bfloat16 operations per multiprocessor and clock, by compute capability.
_FLOPS_PER_CLOCK = {80: 2048, 86: 1024, 89: 1024, 90: 4096, 100: 8192, 103: 8192, 120: 1024}
_OLDEST_ARCH = 80


def device_properties(device: torch.device) -> DeviceProperties:
    """Limits of a device that is present. On a CPU (the interpreter) those of an A100, which has no special paths.

    Raises:
        ValueError: for a GPU older than Ampere, which has no bfloat16 tensor cores.
    """
    if device.type != "cuda":
        return A100
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return replace(
            MI300X,
            name=found.name,
            arch=found.gcnArchName.split(":")[0],
            num_sms=found.multi_processor_count,
            flops=MI300X.flops * found.multi_processor_count / MI300X.num_sms,
            warp_size=getattr(found, "warp_size", 64),
        )
    arch = found.major * 10 + found.minor
    if arch < _OLDEST_ARCH:
        raise ValueError(f"{found.name} has compute capability {found.major}.{found.minor}; the kernels need 8.0")
    clock = getattr(found, "clock_rate", 1_755_000) * 1e3
    memory_clock = getattr(found, "memory_clock_rate", 2_619_000) * 1e3
    bus_bytes = getattr(found, "memory_bus_width", 5120) / 8
    return DeviceProperties(
        name=found.name,
        backend="cuda",
        arch=arch,
        num_sms=found.multi_processor_count,
        shared_bytes=found.shared_memory_per_block_optin,
        bandwidth=2 * memory_clock * bus_bytes,
        flops=_FLOPS_PER_CLOCK.get(arch, 1024) * found.multi_processor_count * clock,
    )
