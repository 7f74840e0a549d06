"""What vLLM's releases do where nothing is said: the scheduler's defaults, by version, GPU and usage.

Sources are pull requests and release notes of vllm-project/vllm, by number. Blocks have 16 tokens in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sim.cluster import Gpu
from sim.policy import Limits
from sim.types import ConfigError

Version = tuple[int, ...]
TODAY: Version = (0, 20)
"""The release whose defaults hold where none is named."""
FIRST_V1: Version = (0, 8)
"""From here on the V1 engine: prompts in chunks, and prefix caching."""
V0_CHUNKED_FROM = 32768
"""The context beyond which V0 cut prompts into chunks."""
LARGE_GPU_BYTES = 70 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Settings of the scheduler that depend on the release alone."""

    version: Version
    v1: bool
    prefix_caching: bool
    reserve_full_prompt: bool
    """A prompt is admitted only if all of it fits (37307: from 0.19 on)."""
    gpu_memory_utilization: float
    """0.9; 0.92 from 0.20 on (38284)."""

    @property
    def name(self) -> str:
        return ".".join(map(str, self.version))

    def chunked_prefill(self, longest_tokens: int | None) -> bool:
        return self.v1 or (longest_tokens or 0) > V0_CHUNKED_FROM

    def async_scheduling(self, pp: int) -> bool:
        """From 0.14 on, but not with pipelines before 0.15 (27614, 31998, 32359; release notes of 0.14.0)."""
        return self.version >= (0, 15) or (self.version >= (0, 14) and pp == 1)

    def batch(self, gpu: Gpu, *, offline: bool = False) -> tuple[int, int]:
        """``max_num_seqs`` and ``max_num_batched_tokens``: of a server, or of the ``LLM`` class (``offline``).

        Large GPUs have larger ones: H100 and H200 by name up to 0.8.4 (12369), all of 70 GiB and more in 0.8.5
        (17073), all of those but the A100 from 0.9 on (17885). The first releases of V1 ran 1,024 sequences
        everywhere, up to 0.8.3 (16158). V0 had one set for all, with 2,048 tokens for chunks from 0.6.5 on (10544);
        without chunks whatever the longest prompt takes.
        """
        if not self.v1:
            return 256, 2048 if self.version >= (0, 6, 5) else 512
        roomy = gpu.memory_bytes >= LARGE_GPU_BYTES
        if self.version < (0, 8, 5):
            large = gpu.name.startswith(("H100", "H200"))
        else:
            large = roomy and (self.version < (0, 9) or not gpu.name.startswith("A100"))
        tokens = (16384 if offline else 8192) if large else (8192 if offline else 2048)
        return 1024 if large or self.version < (0, 8, 4) else 256, tokens

    def limits(self, stated: Limits, given: frozenset[str], gpus: Sequence[Gpu], pp: int) -> Limits:
        """``stated``, with this release's defaults for the settings that are not among ``given``.

        One set for the whole system: that of its smallest GPU, where types differ.
        """
        sequences, tokens = min(self.batch(gpu) for gpu in gpus)
        if not self.chunked_prefill(stated.max_model_len):
            tokens = max(tokens, stated.max_model_len or 0)
        defaults = {
            "max_num_seqs": sequences,
            "max_num_batched_tokens": tokens,
            "prefix_caching": self.prefix_caching,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "async_scheduling": self.async_scheduling(pp),
            "release": self.version,
        }
        missing: dict[str, Any] = {name: value for name, value in defaults.items() if name not in given}
        return replace(stated, **missing)


def release(version: str | Version | None = None) -> Release:
    """``0.11``, ``v0.8.5``, or parts. ``ConfigError`` if it is no version."""
    if isinstance(version, str):
        found = re.fullmatch(r"v?(\d{1,3})\.(\d{1,3})(?:\.(\d{1,3}))?(?:[.\-+]?(?:post|rc|dev).*)?", version.strip())
        if found is None:
            raise ConfigError(f"system.engine.version: {version!r} is no release of vLLM; write it as 0.20 or 0.8.5")
        version = tuple(int(part) for part in found.groups() if part is not None)
    version = version or TODAY
    return Release(
        version=version,
        v1=version >= FIRST_V1,
        prefix_caching=version >= FIRST_V1,
        reserve_full_prompt=version >= (0, 19),
        gpu_memory_utilization=0.92 if version >= (0, 20) else 0.9,
    )
