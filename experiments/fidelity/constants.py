"""Constants that no kernel table gives: what they are, their values, and which cells they were fitted on.

``placements.fitted_constants`` and ``decode_steps.fitted_overhead`` fit them anew; a test holds the values to them.
"""

from __future__ import annotations

from dataclasses import replace

from sim.cluster import Gpu, gpu
from sim.cost import Overhead

SYNCHRONOUS = Overhead(step_s=1.664e-3, sequence_s=7.29e-6)
"""vLLM V1 without it: scheduling, preparing inputs and taking samples back, a step and a sequence. Least relative
squares on the 7 runs of gpullm with 200 output tokens (vLLM 0.8.5); the 14 with 100 and 400, and all of vllm-ppd
(0.13), judge."""

ASYNCHRONOUS = replace(SYNCHRONOUS, overlapped=True)
"""vLLM from 0.14 on (async_scheduling), TensorRT-LLM: the same work, while the GPU is at the step before."""


def h100_64g() -> Gpu:
    """MareNostrum 5's H100: an SXM5 with 64 GB at 2.02 TB/s (recalled; no document was at hand)."""
    return replace(gpu("H100-SXM"), name="H100-64G-SXM", memory_bytes=64 * 2**30, bandwidth_bytes_per_s=2.02e12)


FRONT_END_S = 0.0211
"""Proxy, HTTP, tokenizer and streaming before a client sees a first token (vllm-ppd, its Python proxies). Median of
what is left of mean TTFT in the 4R cells of 1 and 4 QPS; those of 0.5 and 2 judge."""

HAND_OFF_S = 0.0604
"""What a split adds beyond moving bytes: a second HTTP request through the proxy, and P2pNccl's hand-shake. The same,
in the 2P_2D cells of 1 and 4 QPS."""
