"""Memory for KV: what vLLM printed when it started, and what its release, GPU and settings let the simulator expect.

Sources: jgchn/llm-d-planner 30ec05f, accuracy/results/v0.19.0 and llm-d-incubation/llm-d-planner 875a4fd,
accuracy/accuracy_report.md (H100, 0.95 of the memory); llm-d/llm-d-benchmark 2593348,
config_explorer/empirical-vllm-memory-results.md (H100, 0.9); LMCache's FAQ (LMCache/LMCache pull request 1769);
LLMServingSim's run; a course's log of three servers (its note of 2026-05-03 on compute environments: A6000,
A100-SXM4-40GB, H100 NVL; vLLM's release is not told, and taken to be 0.19). All but the first and the third publish
single figures, which are repeated here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.fidelity.metadata import read_facts
from experiments.fidelity.table import Bar, Row, Study, Use, judged, largest_bar, mean_bar
from sim import Limits, Problem, Workload
from sim.cluster import Cluster, Gpu, Node, gpu
from sim.cost import Roofline
from sim.memory import kv_bytes_available
from sim.model import ModelSpec, model
from sim.types import Stage

STUDY = "kv-memory"
GIB = 2**30
H100_NVL = read_facts({"model": "llama-3.1-8b", "gpu": "H100 NVL"}).gpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A vLLM server: GiB for KV that each GPU had at start. ``share``: gpu_memory_utilization."""

    source: str
    spec: ModelSpec
    gpu: Gpu
    tp: int
    version: tuple[int, int]
    kv_gib: float
    share: float = 0.9
    seqs: int = 1024
    tokens: int = 8192
    use: Use = "judged"


CODE_LLAMA = replace(model("llama-2-7b"), name="codellama-7b", vocab_size=32016)


def study(_measured: Path) -> Study:
    """The argument is there for all studies to be alike."""
    rows = tuple(row(server) for server in servers())
    return Study(
        title="Memory for KV of servers as vLLM printed it",
        rows=rows,
        bars=(_bar(judged(rows, "KV")), largest_bar(STUDY, judged(rows, "KV"), 0.10, 0.05)),
        notes=(
            "GiB a GPU; weights, activations and what vLLM keeps follow from model, limits and release "
            "(sim/memory.py); the sources stand in experiments/fidelity/cases/memory.py",
            "fitted: what a release keeps, on Llama-3.1-8B and Qwen2.5-7B at TP1 and TP2 (0.19), Llama-3.1-8B (0.11) "
            "and Qwen3-14B (0.15 and 0.17); all else judges",
            "largest: the RTX 4090's server kept 0.4 GiB more than servers of the same release on other GPUs, which "
            "nothing in its metadata explains; a share of a small cache is much (KV blocks that a run's metadata "
            "states are taken as they are)",
            "from 0.17 on the sampler's peak is 15 bytes a logit, 38 before: 1,024 sequences of a vocabulary of "
            "128,256 then leave 2.8 GiB more; from 0.18 on GPUs whose all-reduces are fused keep 1.9 GiB for them",
        ),
    )


def _bar(rows: list[Row]) -> Bar:
    return mean_bar(STUDY, rows, 0.03, 0.02)


def row(server: Server) -> Row:
    """KV of one GPU, in GiB."""
    return Row(
        study=STUDY,
        case=f"{server.spec.name}, {server.tp} x {server.gpu.name}, vLLM {'.'.join(map(str, server.version))}",
        metric="KV",
        unit="GiB",
        measured=server.kv_gib,
        predicted=predicted_gib(server),
        load=None,
        use=server.use,
    )


def predicted_gib(server: Server) -> float:
    cluster = Cluster(nodes=(Node(name="n0", gpu=server.gpu, count=server.tp),))
    problem = Problem(
        cluster=cluster,
        model=server.spec,
        cost=Roofline(),
        workload=Workload(rate_per_s=1.0, lengths=((1000, 100),)),
    )
    limits = Limits(
        max_num_seqs=server.seqs, max_num_batched_tokens=server.tokens, gpu_memory_utilization=server.share,
        release=server.version,
    )  # fmt: skip
    stage = Stage(name="all", gpus=cluster.gpu_ids, first_layer=0, end_layer=server.spec.num_layers)
    return kv_bytes_available(problem, stage, limits) / GIB


def servers() -> Iterator[Server]:
    """Every server whose model and settings are known."""
    h100 = gpu("H100-SXM")
    sweep = (
        ("llama-3.1-8b", 1, 58.11), ("llama-3.1-8b", 2, 63.76), ("llama-3.1-8b", 4, 67.44), ("qwen2.5-7b", 1, 58.53),
        ("qwen2.5-7b", 2, 63.84), ("qwen2.5-7b", 4, 67.34), ("qwen2.5-72b", 2, 3.04), ("qwen3-8b", 1, 57.50),
        ("phi-4", 1, 46.08), (CODE_LLAMA, 1, 61.66), ("qwen3-30b-a3b", 1, 15.41), ("mixtral-8x7b", 2, 28.44),
        ("llama-3.1-70b fp8", 2, 37.28), ("llama-3.1-70b fp8", 4, 54.09),
    )  # fmt: skip
    for named, tp, kv_gib in sweep:
        fitted = named in ("llama-3.1-8b", "qwen2.5-7b") and tp <= 2
        yield Server(
            source="llm-d-planner", spec=_spec(named), gpu=h100, tp=tp, version=(0, 19), kv_gib=kv_gib, share=0.95,
            use="fitted" if fitted else "judged",
        )  # fmt: skip
    for version, kv_gib in (((0, 15), 41.94), ((0, 16), 41.94), ((0, 17), 45.34), ((0, 18), 45.23)):
        yield Server(
            source="llm-d-planner", spec=model("qwen3-14b"), gpu=h100, tp=1, version=version, kv_gib=kv_gib, share=0.95,
            use="fitted" if version in ((0, 15), (0, 17)) else "judged",
        )  # fmt: skip
    for named, tp, kv_gib in (("llama-3.1-8b", 1, 51.38), ("qwen3-32b", 1, 4.45), ("llama-3.1-70b fp8", 2, 32.0)):
        use: Use = "fitted" if named == "llama-3.1-8b" else "judged"
        yield Server(
            source="llm-d-benchmark", spec=_spec(named), gpu=h100, tp=tp, version=(0, 11), kv_gib=kv_gib, use=use
        )
    yield Server(source="LMCache", spec=_spec("qwen3-32b"), gpu=h100, tp=2, version=(0, 11), kv_gib=33.66)
    eight = _spec("llama-3.1-8b")
    token_gib = eight.kv_bytes_per_token() / GIB
    for device, tokens, batched, seqs in (
        (gpu("A6000"), 221_824, 2048, 256), (gpu("A100-40G-SXM"), 163_168, 2048, 256), (H100_NVL, 545_456, 8192, 1024),
        (gpu("RTX-4090"), 41_408, 2048, 256),
    ):  # fmt: skip
        yield Server(
            source="logs", spec=eight, gpu=device, tp=1, version=(0, 19), kv_gib=tokens * token_gib, seqs=seqs,
            tokens=batched,
        )  # fmt: skip


def _spec(named: str | ModelSpec) -> ModelSpec:
    if isinstance(named, ModelSpec):
        return named
    name, _, narrow = named.partition(" ")
    return model(name, "float8" if narrow else None)
