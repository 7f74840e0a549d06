"""How to execute: ``Execution``, the one argument that a user of the real engine makes up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from sim.cluster import did_you_mean
from sim.types import ConfigError

Mode = Literal["measured-step", "wall-clock"]
Carrier = Literal["auto", "socket", "group"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How to execute. ``folder``: of a Hugging Face model, with its weights; None: weights drawn from the seed.

    ``kv_blocks``, ``memoise`` and ``reference_s`` are for measured steps (see ``MeasuredSteps``), ``folder`` and
    ``emulate_links`` for the wall clock (see ``Wall``). ``device``: cpu, cuda (workers take the GPUs in turn), or one
    as torch names it. ``kv_carrier``: socket (through the host's memory), group (NCCL from GPU to GPU, gloo on the
    CPU), or auto: group between GPUs unless ``emulate_links``, which only a socket can. Workers that share a GPU use
    sockets all the same.
    """

    mode: Mode = "measured-step"
    device: str = "cpu"
    folder: str | None = None
    kv_blocks: int = 4096
    memoise: bool = False
    reference_s: float | None = None
    emulate_links: bool = False
    kv_carrier: Carrier = "auto"

    def __post_init__(self) -> None:
        for name, known in (("mode", get_args(Mode)), ("kv_carrier", get_args(Carrier))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}: {did_you_mean(getattr(self, name), known)}")
        if self.kv_carrier == "group" and self.emulate_links:
            raise ConfigError("kv_carrier: group: cannot be slowed down to emulated links; use socket, or real links")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"device: {self.device!r}: torch sees no CUDA device here; use cpu")
        if self.reference_s is not None and self.mode != "measured-step":
            raise ConfigError(f"reference_s: {self.reference_s}: the wall clock has the pace that it has; leave it out")
        if self.folder is not None and self.mode != "wall-clock":
            raise ConfigError(f"folder: {self.folder!r}: measured steps draw their weights; leave it out")

    @property
    def kv_by_group(self) -> bool:
        """Whether workers on different devices send KV by process groups."""
        between_gpus = self.device.startswith("cuda") and not self.emulate_links
        return self.kv_carrier == "group" or (self.kv_carrier == "auto" and between_gpus)
