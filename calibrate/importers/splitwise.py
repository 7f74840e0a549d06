"""Splitwise's public measurements (ISCA 2024) as a profile: whole steps of a 2023 engine, by one-factor sweeps.

``python -m calibrate.importers.splitwise perf_model.csv --out splitwise-2023.json``

What the file holds: prefill time by prompt length (128 to 8,192, one prompt), decode step time by batch (1 to 64
at about 576 tokens of context), and at batch 1 by context. What is left out, and why:

- TP2 at batch 64: it is not the batch it says (its prefill takes 794 ms where that of batch 32 takes 6.6 s).
- Prefill of several prompts: 8 x 512 tokens take 767 ms where one prompt of 4,096 takes 661 ms (Llama2-70B, A100,
  TP8), and TP2 grows by whole prompts, as if padded or run in turn; engines with ragged batches do neither.
- h100-80gb-pcap: those are the H100 rows with prefill times 1.3, not measurements.
- Repeated rows: those of 512 tokens at batch 1 stand in all three sweeps; one copy is kept, so that none is on both
  sides of a split.

The step is ``linear(tokens) + head(sequences) + attention``. Prefill from 128 tokens fixes ``linear`` there, decode at
batch 1 its first point; a line joins them, lowered to the decode times where it exceeds them. What decodes of
several sequences take more than that is ``head``. Both keep the engine's fixed cost per step.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
import typer

from calibrate import fit
from calibrate.fit import Floats, Rows
from calibrate.profile.file import write_profile
from sim.cluster import Gpu, gpu
from sim.cost import Grid, HeldOut, Profile, ProfileEntry, Provenance, Table
from sim.model import ModelSpec
from sim.model import model as find_model
from sim.types import ConfigError

GPUS = {"a100-80gb": "A100-80G-SXM", "h100-80gb": "H100-SXM"}
"""Their machines were DGX-A100 and DGX-H100 (paper, section 5)."""
MODELS = {"llama2-70b": "llama-2-70b", "bloom-176b": "bloom-176b"}
DTYPES = ("float16", "bfloat16")
COLUMNS = ("model", "hardware", "prompt_size", "batch_size", "token_size", "prompt_time", "token_time", "e2e_time")
ATTENTION_FLOPS_SHARE = 0.5
ATTENTION_BANDWIDTH_SHARE = 0.7
"""Of the GPU's peaks, as in ``sim.cost.Roofline``: attention is derived, not fitted. The file has no prompt with
context before it, and its decodes over context (batch 1 only) are nearly flat: a fitted slope gains 0.1 % of error."""
LAST_CONTEXT = 8192
SEED = 2023
SPLITS = 10

PROVENANCE = Provenance(
    source="Mutinifni/splitwise-sim 8f99e7d, data/perf_model.csv; Patel et al., Splitwise, ISCA 2024",
    licence="MIT",
    date="2023",
    tool="calibrate.importers.splitwise",
    engine="the authors' serving stack of 2023, version not published; whole steps, its overhead included",
    method=(
        "medians of 5 repeats, monotone tables fitted to all rows, prefill of single prompts only; held_out: ten "
        "random 80:20 splits of the rows, and (unseen_*) each inner shape left out in turn; attention to context "
        "derived from FLOPs at 0.5 and KV bytes at 0.7 of the GPU's peaks"
    ),
)


class Steps(NamedTuple):
    """Measured steps of one kind: seconds by (count, context); count = prompt tokens, or sequences."""

    counts: Floats
    contexts: Floats
    seconds: Floats

    def rows(self, numbers: Rows) -> Steps:
        return Steps(self.counts[numbers], self.contexts[numbers], self.seconds[numbers])


class Setup(NamedTuple):
    """What was measured."""

    model: ModelSpec
    gpu: Gpu
    tp: int

    @property
    def pair_s(self) -> float:
        """One (token, attended token) pair in all layers."""
        flops = self.model.attention_flops_per_pair * self.model.num_layers / self.tp
        return flops / (self.gpu.flops_for("float16") * ATTENTION_FLOPS_SHARE)

    @property
    def kv_s(self) -> float:
        """Reading one cached token in all layers."""
        size = self.model.kv_bytes_per_token_layer_gpu(self.tp) * self.model.num_layers
        return size / (self.gpu.bandwidth_bytes_per_s * ATTENTION_BANDWIDTH_SHARE)

    def decode_attention_s(self, steps: Steps) -> Floats:
        return self.kv_s * steps.counts * steps.contexts

    def self_attention_s(self, tokens: Floats) -> Floats:
        return self.pair_s * tokens * (tokens + 1) / 2


class Step(NamedTuple):
    """The fit: a step takes linear(tokens) + head(sequences) + attention."""

    tokens: Floats
    linear_s: Floats
    seqs: Floats
    head_s: Floats


def import_splitwise(path: str | Path) -> Profile:
    """The profile of Splitwise's ``perf_model.csv``. ``ConfigError`` names a column or value that is amiss."""
    rows = _read(Path(path))
    groups = rows.groupby(["model", "hardware", "tensor_parallel"], sort=True)
    entries = tuple(_entry(group) for _, group in groups)
    return Profile(name="splitwise-2023", provenance=PROVENANCE, entries=entries)


def fit_step(setup: Setup, prefill: Steps, decode: Steps) -> Step:
    """Fit one set-up's steps."""
    seqs, step_s, repeats = fit.medians(decode.counts, decode.seconds - setup.decode_attention_s(decode))
    tokens, prefill_s, prompts = fit.medians(prefill.counts, prefill.seconds - setup.self_attention_s(prefill.counts))
    step_s, prefill_s = fit.rising(step_s, repeats), fit.rising(prefill_s, prompts)
    early_s = np.minimum(step_s, np.interp(seqs, [1, tokens[0]], [step_s[0], prefill_s[0]]))
    return Step(
        tokens=np.concatenate([seqs, tokens]),
        linear_s=np.concatenate([early_s, prefill_s]),
        seqs=seqs,
        head_s=fit.rising(step_s - early_s, repeats),
    )


def prefill_seconds(setup: Setup, step: Step, steps: Steps) -> Floats:
    """Whole prompts, no context before them."""
    return np.interp(steps.counts, step.tokens, step.linear_s) + setup.self_attention_s(steps.counts)


def decode_seconds(setup: Setup, step: Step, steps: Steps) -> Floats:
    linear = np.interp(steps.counts, step.tokens, step.linear_s)
    head = np.interp(steps.counts, step.seqs, step.head_s)
    return linear + head + setup.decode_attention_s(steps)


def _read(path: Path) -> pd.DataFrame:
    try:
        rows = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as CSV ({error}); give Splitwise's perf_model.csv") from None
    missing = sorted({*COLUMNS, "tensor_parallel"} - set(rows.columns))
    if missing:
        raise ConfigError(f"{path}: column {missing[0]!r} is missing; give Splitwise's perf_model.csv")
    rows = rows[rows.hardware.isin(GPUS) & rows.model.isin(MODELS)].drop_duplicates()
    rows = rows[~((rows.tensor_parallel == 2) & (rows.batch_size == 64))]
    times = rows[["prompt_time", "token_time", "e2e_time"]]
    if rows.empty or not np.isfinite(times).all(axis=None) or (times <= 0).any(axis=None):
        raise ConfigError(f"{path}: no rows of a known model and GPU, or a time that is not > 0; copy the file anew")
    return rows.reset_index(drop=True)


def _steps(rows: pd.DataFrame) -> tuple[Steps, Steps]:
    """Prefill steps and decode steps; the mean context of decodes follows from how long the run took."""
    single = rows[rows.batch_size == 1]
    prompt = single.prompt_size.to_numpy(float)
    generated = (rows.e2e_time - rows.prompt_time) / rows.token_time
    contexts = (rows.prompt_size + generated / 2).to_numpy(float)
    return (
        Steps(prompt, np.zeros_like(prompt), single.prompt_time.to_numpy(float) / 1e3),
        Steps(rows.batch_size.to_numpy(float), contexts, rows.token_time.to_numpy(float) / 1e3),
    )


def _entry(rows: pd.DataFrame) -> ProfileEntry:
    model, hardware, tp = rows.iloc[0][["model", "hardware", "tensor_parallel"]]
    setup = Setup(find_model(MODELS[model]), gpu(GPUS[hardware]), int(tp))
    step = fit_step(setup, *_steps(rows))
    tokens = np.array([1.0, *step.tokens[step.tokens >= 128]])
    contexts = np.array([0.0, LAST_CONTEXT])
    seqs = step.seqs[[0, -1]]
    return ProfileEntry(
        gpus=(setup.gpu.name,),
        model=setup.model.name,
        num_layers=setup.model.num_layers,
        tp=setup.tp,
        dtypes=DTYPES,
        linear=Table(counts=_whole(step.tokens), seconds=_rounded(step.linear_s)),
        head=Table(counts=_whole(step.seqs), seconds=_rounded(step.head_s)),
        attention_prefill=_grid(
            tokens, contexts, [setup.self_attention_s(n) + setup.pair_s * n * contexts for n in tokens]
        ),
        attention_decode=_grid(seqs, contexts, [setup.kv_s * n * contexts for n in seqs]),
        included=frozenset({"collective", "embedding", "overhead"}),
        held_out=_held_out(setup, rows),
    )


def _held_out(setup: Setup, rows: pd.DataFrame) -> dict[str, HeldOut]:
    """Errors on unseen rows, and (harder) on unseen shapes between those fitted."""
    prefill, decode = _steps(rows)

    def on_prefill(train: Rows, test: Rows) -> Floats:
        tested = prefill.rows(test)
        step = fit_step(setup, prefill.rows(train), decode)
        return fit.errors(prefill_seconds(setup, step, tested), tested.seconds)

    def on_decode(train: Rows, test: Rows) -> Floats:
        tested = decode.rows(test)
        return fit.errors(decode_seconds(setup, fit_step(setup, prefill, decode.rows(train)), tested), tested.seconds)

    held = {}
    for name, steps, predict in (("prefill", prefill, on_prefill), ("decode", decode, on_decode)):
        folds = fit.splits(steps.seconds.size, share=0.2, repeats=SPLITS, seed=SEED)
        held[name] = fit.validated(predict, folds)
        held[f"unseen_{name}"] = fit.validated(predict, _inner(steps))
    return held


def _inner(steps: Steps) -> Iterator[tuple[Rows, Rows]]:
    """Leaves out each count but the smallest and the largest."""
    ends = steps.counts.min(), steps.counts.max()
    for train, test in fit.left_out(list(steps.counts)):
        if steps.counts[test[0]] not in ends:
            yield train, test


def _grid(counts: Floats, contexts: Floats, seconds: list[Floats]) -> Grid:
    return Grid(counts=_whole(counts), contexts=_whole(contexts), seconds=tuple(_rounded(row) for row in seconds))


def _whole(values: Floats) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _rounded(values: Floats) -> tuple[float, ...]:
    """To the picosecond's thousandfold, far below the scatter: the same file on every machine."""
    return tuple(round(float(value), 9) for value in values)


def main(
    path: Annotated[Path, typer.Argument(help="Splitwise's perf_model.csv")],
    out: Annotated[Path, typer.Option(help="the profile to write")],
) -> None:
    """Fit Splitwise's measurements and write a profile."""
    try:
        write_profile(import_splitwise(path), out)
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
