"""DistServe's published step-time fit (OSDI 2024) as a profile: OPT on A100-80G, its engine's or its vLLM baseline's.

``phasewise calibrate import distserve simdistserve/estimators/profile_data/profiler-a100-80g.vllm.json --out FILE``

The file maps models to TP degrees to ``prefill`` [a, b, c], ``decoding_smallbs`` and ``decoding_largebs`` [a, b, c]
in ms, and ``decoding_large_small_bs_threshold``. Its simulator prices a stage of a pipeline of pp stages by
``(a + b * tokens + c * squared tokens) / pp + pp`` for prompts and ``(a + b * context + c * sequences) / pp`` for
decodes, and adds 2 + 0.0001 * tokens at the first stage (Ray's overhead; DistServe's engine and baseline alike).
``sim.cost.Polynomial`` is that form; it differs in two places only. A chunk after a context pays for attending to it.
And prices rise with the batch: where the second set falls below the first, the first one's last price holds. Within
the published KV capacities that is from 95 to at most 161 sequences, by up to 7 % (OPT-13B, TP 1) to 15 % (the
baseline's OPT-66B, TP 4).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sim.cost import DecodeTerms, Polynomial, Profile, PromptTerms, Provenance
from sim.model import ModelSpec
from sim.model import model as find_model
from sim.outside import read_json
from sim.types import ConfigError

GPU = "A100-80G-SXM"
"""Their testbed (paper, section 6.1); the file's name says a100-80g."""
MODELS = {"facebook/opt-13b": "opt-13b", "facebook/opt-66b": "opt-66b", "facebook/opt-175b": "opt-175b"}
ENGINES = {
    "distserve": ("distserve-a100", "DistServe's engine (SwiftTransformer), 2024"),
    "vllm": ("distserve-a100-vllm", "vLLM of early 2024, as DistServe's authors measured it"),
}
DTYPES = ("float16", "bfloat16")
THRESHOLD = "decoding_large_small_bs_threshold"
SETS = ("prefill", "decoding_smallbs", "decoding_largebs")
MS = 1e-3
HOP_MS, FIRST_MS, FIRST_TOKEN_MS = 1.0, 2.0, 1e-4


def import_distserve(path: str | Path) -> Profile:
    """The profile of one fit file, ``profiler-...ENGINE.json``. ``ConfigError`` names the file, the field and the mend.

    Left out, and named in the profile's method: pairs of model and TP degree with a negative term.
    """
    path = Path(path)
    engine = path.stem.rpartition(".")[2]
    if engine not in ENGINES:
        raise ConfigError(f"{path}: the name must end in {' or '.join(f'.{name}.json' for name in ENGINES)}")
    rows = [(model, tp, part) for model, degrees in _read(path).items() for tp, part in degrees.items()]
    fits = [(model, tp, _checked(f"{path}: {model}, TP {tp}", model, tp, part)) for model, tp, part in rows]
    bad = [f"{model} TP {tp}" for model, tp, part in fits if min(term for name in SETS for term in part[name]) < 0]
    forms = tuple(_form(model, tp, part) for model, tp, part in fits if f"{model} TP {tp}" not in bad)
    if not forms:
        raise ConfigError(f"{path}: no model and TP degree without a negative term; copy the released file anew")
    name, title = ENGINES[engine]
    return Profile(name=name, provenance=_provenance(title, bad), polynomials=forms)


def _provenance(engine: str, left_out: list[str]) -> Provenance:
    lacking = f"; left out, having a negative term: {', '.join(left_out)}" if left_out else ""
    return Provenance(
        source="LLMServe/DistServe f06659f, simdistserve/estimators; Zhong et al., DistServe, OSDI 2024",
        licence="Apache-2.0",
        date="2024",
        tool="calibrate.importers.distserve",
        engine=f"{engine}; whole steps, its overhead included",
        method=(
            "the authors' least-squares terms, as published; their measurements and held-out errors are not; levelled "
            f"where the terms of large batches fall below those of small ones{lacking}"
        ),
    )


def _read(path: Path) -> dict[str, dict[str, Any]]:
    data = read_json(path, "profile of DistServe", mend="copy DistServe's file anew")
    if not isinstance(data, dict) or not data or not all(isinstance(part, dict) for part in data.values()):
        raise ConfigError(f"{path}: must map models to TP degrees; copy DistServe's file anew")
    return data


def _checked(place: str, model: str, tp: str, part: Any) -> dict[str, Any]:
    if model not in MODELS:
        raise ConfigError(f"{place}: the model is unknown; known: {', '.join(MODELS)}")
    if not tp.isdecimal() or int(tp) < 1:
        raise ConfigError(f"{place}: the TP degree must be a whole number >= 1")
    if not isinstance(part, dict) or not isinstance(part.get(THRESHOLD), int):
        raise ConfigError(f"{place}: {THRESHOLD} is missing, or no whole number")
    for name in SETS:
        terms = part.get(name)
        if not isinstance(terms, list) or len(terms) != 3 or not all(isinstance(term, int | float) for term in terms):
            raise ConfigError(f"{place}: {name} is {terms!r}; it must be three numbers (ms)")
    return part


def _form(model: str, tp: str, part: dict[str, Any]) -> Polynomial:
    spec: ModelSpec = find_model(MODELS[model])
    sets = [[_seconds(term) for term in part[name]] for name in SETS]
    (step_s, token_s, square_s), small, large = sets
    return Polynomial(
        gpus=(GPU,),
        model=spec.name,
        num_layers=spec.num_layers,
        tp=int(tp),
        dtypes=DTYPES,
        prompts=PromptTerms(step_s=step_s, token_s=token_s, square_s=square_s),
        decodes=DecodeTerms(**dict(zip(("step_s", "context_s", "sequence_s"), small, strict=True))),
        large=DecodeTerms(**dict(zip(("step_s", "context_s", "sequence_s"), large, strict=True))),
        large_from=part[THRESHOLD],
        hop_s=_seconds(HOP_MS),
        first_s=_seconds(FIRST_MS),
        first_token_s=_seconds(FIRST_TOKEN_MS),
    )


def _seconds(ms: float) -> float:
    """To 12 digits, so that no rounding error is shown."""
    return float(f"{ms * MS:.12g}")
