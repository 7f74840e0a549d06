"""Kernel tables for GPU types that nobody measured: those of a measured relative, scaled by specification.

``kernels_for(gpu)`` names the relative; a prediction, and labelled as one in its provenance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from calibrate.profile.file import read_profile, shipped_profiles
from calibrate.profile.scaling import scaled
from sim.cluster import Gpu, gpu
from sim.cost import Profile
from sim.cost.roofline import SUSTAINED


@dataclass(frozen=True, slots=True, kw_only=True)
class Relative:
    """A GPU type's measured relative, with the same sort of memory.

    ``bandwidth`` and ``arithmetic``: how much more of its specified rates the type reaches than its relative does of
    its own (1: as much).
    """

    profile: str
    bandwidth: float = 1.0
    arithmetic: float = 1.0


RELATIVES = {
    "A100-40G-SXM": Relative(profile="vllm-0.14-a100-80g-sxm"),
    "A100-80G-PCIe": Relative(profile="vllm-0.14-a100-80g-sxm"),
    "H100-PCIe": Relative(profile="vllm-0.19-h100-sxm"),
    "B200": Relative(profile="vllm-0.19-h200-sxm"),
    "L4": Relative(profile="vllm-0.14-l40s", arithmetic=SUSTAINED["L4"]),
    "A40": Relative(profile="vllm-0.14-l40s"),
    "A10G": Relative(profile="vllm-0.14-l40s"),
    "A5000": Relative(profile="vllm-0.14-l40s"),
    "A6000": Relative(profile="vllm-0.14-l40s"),
    "RTX-4090": Relative(profile="vllm-0.14-l40s", bandwidth=1.14, arithmetic=1.4),
    "RTX-3090": Relative(profile="vllm-0.14-l40s", bandwidth=1.14, arithmetic=1.25),
    "RTX-3090-Ti": Relative(profile="vllm-0.14-l40s", bandwidth=1.14, arithmetic=1.25),
}
"""RTX-4090: the two factors bring Llama-3.1-8B's layers to what LLMServingSim measured on one (an L40S has error
correction on and is bound by its 350 W; a GeForce's rate is halved for float32 accumulation, so that it reaches nearly
all of it); of the other GeForces something like it is assumed. L4: what its power sustains (``sim.cost.roofline``).
V100 and T4 are no one's relatives: vLLM's attention there is another one."""

UNLISTED = {
    "H100-NVL": Relative(profile="vllm-0.19-h100-sxm"),
    "A10": Relative(profile="vllm-0.14-l40s"),
    "RTX-6000-Ada": Relative(profile="vllm-0.14-l40s"),
    "RTX-5090": Relative(profile="vllm-0.19-kernels-rtx-pro-6000", arithmetic=1.25),
}
"""GPU types that the catalogue lacks, for want of prices, and that runs of others name (experiments/fidelity)."""


def kernels_for(target: Gpu) -> Profile | None:
    """Scaled kernel tables for a GPU type, or None if it has no measured relative. Links take their formula."""
    relative = RELATIVES.get(target.name, UNLISTED.get(target.name))
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
    return replace(made, kernels=tuple(replace(part, all_reduce={}) for part in made.kernels))
