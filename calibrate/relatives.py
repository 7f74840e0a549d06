"""Kernel tables for GPU types that nobody measured: those of a measured relative, scaled by specification.

``kernels_for(gpu)`` names the relative; a prediction, and labelled as one in its provenance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from calibrate.profile_file import read_profile, shipped_profiles
from calibrate.scaling import scaled
from sim.cluster import Gpu, gpu
from sim.cost import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Relative:
    """A GPU type's measured relative, of its generation.

    ``bandwidth`` and ``arithmetic``: how much more of its specified rates the type reaches than its relative does of
    its own (1: as much). ``links``: the profile of a GPU type with the same links, for all-reduces.
    """

    profile: str
    bandwidth: float = 1.0
    arithmetic: float = 1.0
    links: str | None = None


RELATIVES = {
    "A100-40G-SXM": Relative(profile="vllm-0.14-a100-80g-sxm", links="vllm-0.14-a100-80g-sxm"),
    "A100-80G-PCIe": Relative(profile="vllm-0.14-a100-80g-sxm", links="vllm-0.14-l40s"),
    "RTX-4090": Relative(profile="vllm-0.14-l40s", bandwidth=1.14, arithmetic=1.4, links="vllm-0.14-l40s"),
    "L4": Relative(profile="vllm-0.14-l40s", links="vllm-0.14-l40s"),
    "H100-PCIe": Relative(profile="vllm-0.19-h100-sxm", links="vllm-0.19-kernels-rtx-pro-6000"),
}
"""RTX-4090: the two factors bring Llama-3.1-8B's layers to what LLMServingSim measured on one (an L40S has error
correction on and is bound by its 350 W). PCIe cards all-reduce like the measured ones of their PCIe generation."""


def kernels_for(target: Gpu) -> Profile | None:
    """Scaled kernel tables for a GPU type, or None if it has no measured relative."""
    relative = RELATIVES.get(target.name)
    if relative is None:
        return None
    profile = read_profile(shipped_profiles()[relative.profile])
    source = gpu(profile.kernels[0].gpus[0])
    able = replace(
        target,
        bandwidth_bytes_per_s=target.bandwidth_bytes_per_s * relative.bandwidth,
        flops={dtype: rate * relative.arithmetic for dtype, rate in target.flops.items()},
    )
    made = scaled(profile, source, able)
    links = {} if relative.links is None else read_profile(shipped_profiles()[relative.links]).kernels[0].all_reduce
    return replace(made, kernels=tuple(replace(part, all_reduce=links) for part in made.kernels))
