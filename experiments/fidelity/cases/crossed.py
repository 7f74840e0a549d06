"""Cross-validation: operators that were measured, predicted without their measurement.

``models``: layers of a model from the generic kernel tables of its GPU, the model's own entry left out. ``gpus``:
kernels of a GPU from those of another one and both specification sheets. Both are what an unseen run depends on
where no profile is of its very model and GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from calibrate.profile.relatives import kernels_for
from calibrate.profile.scaling import FLASH3_GAIN, scaled
from experiments.fidelity.setup import shipped
from experiments.fidelity.table import Bar, Row, Study, Use, judged, median_bar
from sim.cluster import Cluster, gpu
from sim.cost import Fitted, Overhead, Profile
from sim.cost.step import Composed, Operators
from sim.model import model
from sim.types import PS_PER_S, Stage

MODELS, GPUS = "crossed-models", "crossed-gpus"
MUST, AIM = 0.15, 0.10
POINTS: dict[str, tuple[tuple[int, int], ...]] = {
    "linear": ((1, 0), (32, 0), (128, 0), (512, 0), (2048, 0)),
    "head": ((1, 0), (64, 0), (256, 0)),
    "prompt": ((128, 0), (2048, 0), (16, 4096), (512, 1024), (2048, 8192)),
    "decode": ((1, 1024), (8, 1024), (32, 512), (128, 512), (256, 1024), (64, 4096)),
    "decode beside a prompt": ((16, 1024), (64, 1024), (128, 512)),
}
"""Operators, and where they are compared: tokens or sequences, and the context of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One prediction. ``fitted``: operators one of whose constants was fitted on this very measurement."""

    name: str
    model: str
    gpu: str
    tp: int
    measured: Profile
    guess: Profile
    operators: tuple[str, ...] = tuple(POINTS)
    fitted: tuple[str, ...] = ()


def models(_measured: Path) -> Study:
    """Models from generic kernels. The argument is there for all studies to be alike."""
    rows = tuple(row for case in _model_cases() for row in _rows(MODELS, case))
    return Study(
        title="Layers of models from generic kernel tables, their own measurement left out",
        rows=rows,
        bars=_bars(MODELS, rows, ("linear", "head", "prompt", "decode")),
        notes=(
            "measured: LLMServingSim's layers (vLLM 0.19); predicted: aiconfigurator's kernels of the same GPU, of the "
            "L40S for the RTX 4090; all-reduces are in neither",
            "fitted, so not in the bars: decodes beside prompts (one constant), experts (three), the RTX 4090 (two)",
            "judged, but built with an eye on these layers: decodes read their KV from memory (COLD_EFFICIENCY), and a "
            "tile of queries passes along its keys in sequence; without the two, decodes were up to 47 % and chunks "
            "after long contexts up to 96 % low",
            "head at one GPU only: the layers' files of several hold a shard's sampler and no gather",
        ),
    )


def gpus(_measured: Path) -> Study:
    """GPUs from others."""
    rows = tuple(row for case in _gpu_cases() for row in _rows(GPUS, case))
    return Study(
        title="Kernels of a GPU from another one's by specification (Llama-3.1-8B)",
        rows=rows,
        bars=_bars(GPUS, rows, ("linear", "prompt", "decode")),
        notes=(
            "both are aiconfigurator's kernels",
            f"an H100 runs FlashAttention 3, the others 2: its prompts reach {FLASH3_GAIN} times their share of peak; "
            "fitted on the H100's prompts from the L40S's, which are no row here (without it prompts were 27 % off)",
            "an A100's decodes over few tokens take longer than anyone's (no relative has them but another A100)",
        ),
    )


def _model_cases() -> Iterator[Case]:
    truth, kernels = shipped("vllm-0.19-rtx-pro-6000"), shipped("vllm-0.19-kernels-rtx-pro-6000")
    for entry in truth.entries:
        experts = model(entry.model).num_experts is not None
        yield Case(
            name=f"{entry.model}, RTX-PRO-6000, TP{entry.tp}",
            model=entry.model,
            gpu="RTX-PRO-6000",
            tp=entry.tp,
            measured=truth,
            guess=kernels,
            operators=tuple(name for name in POINTS if entry.tp == 1 or name != "head"),
            fitted=("decode beside a prompt", "linear") if experts else ("decode beside a prompt",),
        )
    relative = kernels_for(gpu("RTX-4090"))
    assert relative is not None
    yield Case(
        name="llama-3.1-8b, RTX-4090, TP1",
        model="llama-3.1-8b",
        gpu="RTX-4090",
        tp=1,
        measured=shipped("vllm-0.19-rtx-4090"),
        guess=relative,
        fitted=tuple(POINTS),
    )


def _gpu_cases() -> Iterator[Case]:
    names = {
        "A100-80G-SXM": "vllm-0.14-a100-80g-sxm", "L40S": "vllm-0.14-l40s", "H100-SXM": "vllm-0.19-h100-sxm",
        "H200-SXM": "vllm-0.19-h200-sxm", "RTX-PRO-6000": "vllm-0.19-kernels-rtx-pro-6000",
    }  # fmt: skip
    pairs = (
        ("H100-SXM", "H200-SXM"),
        ("L40S", "RTX-PRO-6000"),
        ("A100-80G-SXM", "H100-SXM"),
        ("H100-SXM", "A100-80G-SXM"),
    )
    for source, target in pairs:
        same = (source, target) == ("H100-SXM", "H200-SXM")  # the H200's prompts are the H100's already
        yield Case(
            name=f"{target} from {source}",
            model="llama-3.1-8b",
            gpu=target,
            tp=1,
            measured=shipped(names[target]),
            guess=scaled(shipped(names[source]), gpu(source), gpu(target)),
            operators=("linear", "decode") if same else ("linear", "prompt", "decode"),
        )


def _rows(study: str, case: Case) -> Iterator[Row]:
    truth, guess = _operators(case, case.measured), _operators(case, case.guess)
    for name in case.operators:
        use: Use = "fitted" if name in case.fitted else "judged"
        for count, context in POINTS[name]:
            yield Row(
                study=study,
                case=f"{case.name}: {count}" + (f" x {context}" if name not in ("linear", "head") else ""),
                metric=name,
                unit="ms",
                measured=_seconds(truth, name, count, context) * 1e3,
                predicted=_seconds(guess, name, count, context) * 1e3,
                load=None,
                use=use,
            )


def _operators(case: Case, profile: Profile) -> Operators:
    cluster = Cluster.of(nodes=[{"gpu": case.gpu, "count": case.tp}])
    spec = model(case.model)
    stage = Stage(name="all", gpus=cluster.gpu_ids, first_layer=0, end_layer=spec.num_layers)
    fitted = Fitted(profiles=(profile,), overhead=Overhead())
    assert fitted.entry(spec, stage, cluster) is not None
    cost = fitted.bind(spec, stage, cluster)
    assert isinstance(cost, Composed)
    return cost.operators


def _seconds(operators: Operators, name: str, count: int, context: int) -> float:
    """A prompt's chunk of ``count`` tokens after ``context``, or ``count`` decodes of ``context`` tokens each."""
    if name in ("linear", "head"):
        return (operators.linear if name == "linear" else operators.head)(count)[0] / PS_PER_S
    if name == "prompt":
        return operators.chunk(count).segment(context, count)[0] / PS_PER_S
    rows = operators.decode if name == "decode" else operators.mixed
    return rows(count).segment(count * context, count)[0] / PS_PER_S


def _bars(study: str, rows: Sequence[Row], names: Sequence[str]) -> tuple[Bar, ...]:
    return tuple(median_bar(study, judged(rows, name), MUST, AIM) for name in names)
