"""The device to measure on: what it is, its memory and clocks, and random buffers larger than its cache."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibrate import kernels
from sim.cluster import did_you_mean, gpu_called
from sim.cost import Device
from sim.types import ConfigError

"""What the driver's name of a GPU ends in or contains, and its name in our catalogue; the first that fits."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CPU_CACHE_BYTES = 32 * 2**20
"""Where the system does not tell its own."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of ``mallopt`` in glibc's malloc.h."""
MOST_SETS = 64
FILL_ELEMENTS = 1 << 24
"""Random numbers are drawn so many at a time, so that float32 drafts of them stay small."""


@dataclass(slots=True)
class Target:
    """A torch device and its memory."""

    torch_device: torch.device
    cache_bytes: int
    pools: dict[torch.dtype, Tensor] = field(default_factory=dict)
    used: int = 0

    @property
    def cuda(self) -> bool:
        return self.torch_device.type == "cuda"

    def free_bytes(self) -> int:
        """Memory that a point may take: what is free now, and what torch holds unused."""
        if self.cuda:
            held = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
            return int(torch.cuda.mem_get_info(self.torch_device)[0]) + held
        with suppress(OSError, StopIteration):
            lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
            return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def sets(self, set_bytes: int) -> int:
        """How many buffers of a size are together twice as large as the cache; at most ``MOST_SETS``."""
        return max(1, min(MOST_SETS, ceil(2 * self.cache_bytes / set_bytes)))

    def begin(self) -> None:
        """A new point: all of the pool may be given out again."""
        self.used = 0

    def random(self, dtype: torch.dtype, *shape: int, sets: int = 1) -> list[Tensor]:
        """``sets`` tensors of random values, views of one pool; those of one point do not overlap."""
        size = ceil(prod(shape) / 64) * 64
        pool = self.pools.get(dtype)
        if pool is None or self.used + size * sets > pool.numel():
            pool = self.pools[dtype] = self._filled(
                dtype, max(size * sets, ceil(2 * self.cache_bytes / dtype.itemsize))
            )
            self.used = 0
        starts = range(self.used, self.used + size * sets, size)
        self.used += size * sets
        return [pool[start : start + prod(shape)].view(shape) for start in starts]

    def _filled(self, dtype: torch.dtype, elements: int) -> Tensor:
        self.pools.pop(dtype, None)
        pool = torch.empty(elements, dtype=dtype, device=self.torch_device)
        for start in range(0, elements, FILL_ELEMENTS):
            part = pool[start : start + FILL_ELEMENTS]
            part.copy_(torch.randn(len(part), device=self.torch_device).mul_(0.05))
        return pool


def target(name: str, threads: int | None = None) -> Target:
    """The device called ``cuda``, ``cuda:N`` or ``cpu``; ``auto`` is cuda where there is one. ``threads``: if cpu."""
    if threads is not None:
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cuda", "cpu"):
        raise ConfigError(f"--device: {did_you_mean(name, ('auto', 'cuda', 'cpu'))}")
    if name.startswith("cuda"):
        number = int(name.partition(":")[2] or 0) if name.partition(":")[2].isdecimal() or name == "cuda" else -1
        if not 0 <= number < torch.cuda.device_count():
            raise ConfigError(
                f"--device: {name}: torch sees {torch.cuda.device_count()} CUDA devices; give cpu or auto"
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
        kernels.without_plans()
        return Target(device, torch.cuda.get_device_properties(device).L2_cache_size)
    keep_freed_memory()
    return Target(torch.device("cpu"), _cpu_cache_bytes())


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, as CUDA's allocator in torch does; False where there is no glibc.

    Otherwise every large tensor is mapped anew, page by page, which takes longer than many a kernel.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def describe(target: Target, gpu: str | None) -> Device:
    """What the device is. ``gpu``: its catalogue name; None: found from the driver's name."""
    facts: dict[str, Any] = {"torch": str(torch.__version__), "git_commit": _git_commit()}
    if not target.cuda:
        return Device(
            gpu=gpu or "CPU",
            description=f"{_cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} processors",
            memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            threads=torch.get_num_threads(),
            attention_backend="torch SDPA over gathered blocks",
            settings={"freed_memory_kept": str(keep_freed_memory())},
            **facts,
        )
    properties = torch.cuda.get_device_properties(target.torch_device)
    enabled = [name for name in ("flash", "mem_efficient", "math", "cudnn") if _sdp_enabled(name)]
    return Device(
        gpu=gpu or catalogue_name(properties.name),
        description=properties.name,
        memory_bytes=properties.total_memory,
        cuda=torch.version.cuda,
        attention_backend=f"torch SDPA ({', '.join(enabled)} enabled); decodes: {_decode_backend(target)}",
        settings={"tf32": str(torch.backends.cuda.matmul.allow_tf32), "cuda_graphs": "True"},
        **facts,
        **_clocks(target),
    )


def _decode_backend(target: Target) -> str:
    in_place = kernels.reads_in_place(torch.empty(0, device=target.torch_device))
    return "paged flash decoding in triton" if in_place else "torch SDPA over gathered blocks"


def gpu_name(device: str) -> str:
    """Our catalogue's name of a torch device."""
    if device == "cpu":
        return "CPU"
    if not torch.cuda.is_available():
        raise ConfigError(f"--device: {device}: torch sees no CUDA device here; give cpu to try the command")
    return catalogue_name(torch.cuda.get_device_properties(device).name)


def catalogue_name(name: str) -> str:
    """Our catalogue's name of a GPU that the driver calls ``name``."""
    try:
        return gpu_called(name)
    except ConfigError as error:
        raise ConfigError(f"--gpu: {str(error).removeprefix('gpu: ')}; give --gpu NAME") from None


def _clocks(target: Target) -> dict[str, Any]:
    """Driver, clocks and power by NVML; empty where nvidia-ml-py is not installed."""
    try:
        import pynvml
    except ImportError:
        return {}
    properties: Any = torch.cuda.get_device_properties(target.torch_device)
    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        driver = pynvml.nvmlSystemGetDriverVersion()
        readings: dict[str, Callable[[], Any]] = {
            "sm_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_limit_w": lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        }
        found: dict[str, Any] = {"driver": driver.decode() if isinstance(driver, bytes) else driver}
        for name, read in readings.items():
            with suppress(pynvml.NVMLError):
                found[name] = float(read())
        return found
    except pynvml.NVMLError:
        return {}
    finally:
        pynvml.nvmlShutdown()


def _sdp_enabled(name: str) -> bool:
    check: Any = getattr(torch.backends.cuda, f"{name}_sdp_enabled", None)
    return bool(check is not None and check())


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_cache_bytes() -> int:
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with suppress(OSError, ValueError):
            text = path.read_text(encoding="utf-8").strip()
            sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes, default=CPU_CACHE_BYTES)


def _git_commit() -> str | None:
    """The commit of this checkout; None outside of one."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
