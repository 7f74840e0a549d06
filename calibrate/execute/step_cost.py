"""Measured steps: a ``StepCost`` that executes each step it is asked to price, and says how long it took.

The simulator's engine stays what it is, its clock virtual; any number of virtual GPUs share one real device. A step
is known by its shape (``Work``), so it runs on random tokens and random KV, in blocks in random order; decodes share
their sum of contexts evenly. Weights are drawn, not read. Links are still modelled, and so are a stage's collectives
(by the roofline) if it has several GPUs: what runs here is one GPU's shard.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import ceil

import numpy as np
import torch

from calibrate.execute.model.architecture import Architecture
from calibrate.execute.model.decoder import Batch
from calibrate.execute.model.graphs import bucket
from calibrate.execute.model.layout import assemble
from calibrate.execute.model.stage import Stage, group_of
from calibrate.execute.pace import Pace, mean_s
from calibrate.kernels import dequantise_4bit, quantise_4bit
from sim.cluster import Cluster
from sim.cost import Roofline
from sim.model import ModelSpec
from sim.policy import View
from sim.transfers import Quantized
from sim.types import Chunk, Line, Move, Work, to_ps
from sim.types import Stage as StageSpec

RECENT = 10
"""Readings of the pace that count as just now."""


class MeasuredSteps:
    """Fits ``sim.cost.StepCost``. ``kv_blocks``: real blocks per stage; steps whose contexts need more reuse them.

    ``memoise``: a shape that ran before (contexts counted in blocks) is not run again. ``paced``: between steps, the
    device's pace goes into ``readings`` (``pace.py``); given ``reference_s`` too, a step counts as long as it would
    take where the product takes that.
    """

    def __init__(
        self,
        *,
        device: str = "cpu",
        kv_blocks: int = 4096,
        block_size: int = 16,
        memoise: bool = False,
        seed: int = 0,
        paced: bool = False,
        reference_s: float | None = None,
    ) -> None:
        self.name = f"measured steps on {device}"
        self.device = device
        self.kv_blocks = kv_blocks
        self.block_size = block_size
        self.memoise = memoise
        self.seed = seed
        self.paced = paced
        self.reference_s = reference_s
        self.readings: list[float] = []
        self._built: dict[tuple[ModelSpec, int, bool, bool, int], MeasuredStage] = {}

    @property
    def factor(self) -> float:
        """What makes a step of just now one at the pace that is asked for."""
        now_s = mean_s(self.readings[-RECENT:])
        return 1.0 if self.reference_s is None or now_s is None else self.reference_s / now_s

    def bind(self, model: ModelSpec, stage: StageSpec, cluster: Cluster, slow: float = 1.0) -> BoundStage:
        """Stages of the same shape share one set of weights. ``ConfigError`` if the model cannot be run here."""
        first, last = stage.first_layer == 0, stage.end_layer == model.num_layers
        key = (model, stage.num_layers, first, last, stage.tp)
        if key not in self._built:
            arch = Architecture.of(model, stage.tp)
            self._built[key] = MeasuredStage(self, arch, stage.first_layer, stage.end_layer)
        collective = Roofline().operators(model, stage, cluster).collective if stage.tp > 1 else None
        return BoundStage(self._built[key], collective, slow)


class BoundStage:
    """The price of a stage: its own measurement, its collectives, and how slow its GPU is."""

    measured = True

    def __init__(self, stage: MeasuredStage, collective: Callable[[int], tuple[int, bool]] | None, slow: float) -> None:
        self._stage = stage
        self._collective = collective
        self._slow = slow

    def line(self, work: Work) -> Line:
        """One iteration: the next one is another step, and is executed when it comes."""
        if not work.tokens:
            return Line(0, 0, 1 << 30)
        collective_ps = self._collective(work.tokens)[0] if self._collective is not None else 0
        return Line(max(1, to_ps(self._stage.seconds(work) * self._slow) + collective_ps), 0, 1)


class MeasuredStage:
    """A stage's layers on the device, and the seconds of each step on them."""

    def __init__(self, steps: MeasuredSteps, arch: Architecture, first: int, end: int) -> None:
        self.steps = steps
        self.stage = Stage(
            arch, first=first, end=end, blocks=steps.kv_blocks, block_size=steps.block_size, device=steps.device,
            seed=steps.seed,
        )  # fmt: skip
        self.executed = 0
        self._pace = Pace(self.stage.decoder) if steps.paced else None
        if self._pace is not None:
            steps.readings.append(self._pace.at_once())
        self._rng = np.random.default_rng(steps.seed)
        self._blocks = self._rng.permutation(np.arange(1, steps.kv_blocks + 1))
        self._warm: set[tuple[int, ...]] = set()
        self._known: dict[Work, float] = {}
        for layer in self.stage.cache.layers:
            for cache in layer:
                cache.normal_()

    def seconds(self, work: Work) -> float:
        """Run the step; the first of its size runs twice, the first time unmeasured."""
        if not self.steps.memoise:
            return self._run_warm(work)
        size = self.steps.block_size
        chunks = tuple(sorted((tokens, ceil(context / size)) for tokens, context in work.chunks))
        key = Work(chunks, work.decode_seqs, ceil(work.decode_context / size / max(1, work.decode_seqs)))
        if key not in self._known:
            self._known[key] = self._run_warm(work)
        return self._known[key]

    def _run_warm(self, work: Work) -> float:
        per_seq = work.decode_context // max(1, work.decode_seqs)
        blocks = -(-per_seq // self.steps.block_size)
        sizes = (*map(bucket, (work.tokens, work.decode_seqs, blocks)), bool(work.chunks))  # as graphs are captured
        if sizes not in self._warm:
            self._warm.add(sizes)
            self._run(work)
        seconds = self._run(work)
        reading_s = self._pace.read() if self._pace is not None else None
        if reading_s is not None:
            self.steps.readings.append(reading_s)
        return seconds * self.steps.factor

    def _run(self, work: Work) -> float:
        """From shapes to sampled tokens on the host, as a serving engine would pay for it."""
        arch = self.stage.decoder.arch
        self._synchronise()
        self.executed += 1
        hidden = None
        if self.stage.decoder.weights.embedding is None:
            hidden = torch.randn(work.tokens, arch.hidden_size, dtype=arch.torch_dtype, device=self.steps.device)
            self._synchronise()
        started_s = time.perf_counter()
        out = self.stage.forward(self._batch(work), hidden)
        if self.stage.samples:
            out.argmax(dim=-1).cpu()
        self._synchronise()
        return time.perf_counter() - started_s

    def _batch(self, work: Work) -> Batch:
        size = self.steps.block_size
        base, over = divmod(work.decode_context, max(1, work.decode_seqs))
        contexts = np.sort(base + (np.arange(work.decode_seqs) < over)).astype(np.int64)
        at, chunks = 0, []
        for tokens, context in work.chunks:
            chunks.append((context, tokens, self._take(at, ceil((context + tokens) / size))))
            at += len(chunks[-1][2])
        width = ceil((base + 1) / size)
        tables = self._take(at, work.decode_seqs * width).reshape(work.decode_seqs, width)
        ends = np.cumsum([tokens for tokens, _ in work.chunks], dtype=np.int64)
        rows = np.arange(work.tokens - work.decode_seqs, work.tokens)
        vocabulary = self.stage.decoder.arch.vocab_size
        return assemble(
            chunks, contexts, tables, self._rng.integers(0, vocabulary, work.tokens),
            [*(ends - 1).tolist(), *rows.tolist()], block_size=size, device=self.steps.device,
        )  # fmt: skip

    def _take(self, at: int, count: int) -> np.ndarray:
        """Blocks in random order, from the ``at``-th on, again from the first when none are left."""
        return np.take(self._blocks, np.arange(at, at + count), mode="wrap")

    def _synchronise(self) -> None:
        if self.steps.device.startswith("cuda"):
            torch.cuda.synchronize(self.steps.device)


class MeasuredCodec:
    """A transfer that quantises to 4 bits, with the codec's seconds measured instead of modelled."""

    def __init__(self, inner: Quantized, model: ModelSpec, device: str) -> None:
        self.pull = inner.pull
        self._inner = inner
        self._arch = Architecture.of(model)
        self._device = device

    def chunks(self, move: Move, view: View) -> tuple[Chunk, ...]:
        return self._inner.chunks(move, view)

    def overhead_s(self, move: Move) -> float:
        """What else the transfer takes, and quantising and dequantising the move's KV, here and now."""
        return self._inner.inner.overhead_s(move) + self._codec_s(move)

    def _codec_s(self, move: Move) -> float:
        arch = self._arch
        rows = 2 * move.num_layers * move.tokens
        kv = torch.randn(rows, arch.kv_width, device=self._device).to(arch.torch_dtype)
        self._wait()
        started_s = time.perf_counter()
        dequantise_4bit(*quantise_4bit(kv, group_of(arch.kv_width)), arch.torch_dtype)
        self._wait()
        return time.perf_counter() - started_s

    def _wait(self) -> None:
        if self._device.startswith("cuda"):
            torch.cuda.synchronize(self._device)
