"""Contextual sparsity: decode steps that compute the heads and neurons which predictors choose for their tokens.

Source: Liu et al., Deja Vu (ICML 2023, arXiv 2310.17157), evaluated there with one sequence at a time. What several
sequences of a step need between them is more: ``union``. Steps with prompt tokens stay dense.

Nothing here is a second model of the hardware: a stage's dense price is scaled, operator by operator where they are
known, and what is added (predictors, missing KV) runs at the rates of the dense GEMMs of the same stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import ceil, inf, lcm
from typing import Literal

import numpy as np

from sim.cluster import Cluster
from sim.cost.fitted import Fitted, Profile
from sim.cost.graphs import Captured
from sim.cost.overlapped import Overlapped
from sim.cost.roofline import Roofline
from sim.cost.step import CACHE_ENTRIES, Composed, Fixed, StageCost, StepCost
from sim.model import DTYPE_BYTES, ModelSpec
from sim.types import PS_PER_S, ConfigError, Line, Stage, Work

Density = float | Sequence[float] | None
"""The share that one token needs: of every layer, or a list with a share for each; None: the paper's, for ReLU."""
ATTENTION_DENSITY, MLP_DENSITY = 5 / 12, 0.1
"""Of OPT-175B: 5 of 12 heads a GPU and a tenth of the neurons (table 4's setting)."""
NEURONS_AT_ONCE = 128
"""Chosen neurons are rounded up to a multiple (advice of the authors' repository)."""
PROMPT = 4096
"""Tokens whose GEMMs are bound by arithmetic."""
GATHERED_TABLE = "gemv_density"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsity:
    """What is computed for a token, and how it is chosen.

    ``overlap``: how far the sequences of a step need the same (0: they choose independently, 1: all the same).
    ``attention_rank``, ``mlp_rank``: inner widths of a layer's two predictors; 0: it has none. ``lookahead``: they run
    beside the all-reduces, and only what is longer than those counts. ``top_k_s``: of choosing, in every layer.
    ``recompute_miss``: a head chosen now lacks the KV of earlier tokens that had not chosen it, and makes it from
    their inputs. 1: tokens chose independently, and all of the context was decoded. Less: they choose alike, or
    part of the context was the prompt, whose prefill is dense and leaves no gap.
    ``gathered``: time of rows gathered and multiplied, by their share: as their bytes, or as a profile's
    ``gemv_density`` says of that GPU (relative to all rows).
    """

    attention_density: Density = None
    mlp_density: Density = None
    overlap: float = 0.0
    attention_rank: int = 512
    mlp_rank: int = 1000
    lookahead: bool = True
    top_k_s: float = 0.0
    recompute_miss: float = 1.0
    gathered: Literal["bytes", "measured"] = "bytes"

    def __post_init__(self) -> None:
        for name in ("attention_density", "mlp_density"):
            for value in _listed(getattr(self, name)):
                if not 0 < value <= 1:
                    raise ConfigError(f"system.{name} is {value}; it must be above 0 and at most 1")
        for name in ("overlap", "recompute_miss"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"system.{name} is {getattr(self, name)}; it must be a share, 0 to 1")
        for name in ("attention_rank", "mlp_rank", "top_k_s"):
            if not 0 <= getattr(self, name) < inf:
                raise ConfigError(f"system.{name} is {getattr(self, name)}; it must be a number >= 0")
        if self.gathered not in ("bytes", "measured"):
            raise ConfigError(f"system.gathered is {self.gathered!r}; it must be bytes or measured")

    def densities(self, model: ModelSpec) -> tuple[tuple[float, float], ...]:
        """(heads, neurons) that one token needs, by layer; ``ConfigError`` where that is not known."""
        if model.num_experts is not None or model.kv_lora_rank is not None:
            raise ConfigError(f"system: contextual sparsity of {model.name} is not known: its heads share a latent, or "
                              "its MLP is a mixture of experts; take a model without either")  # fmt: skip
        given = []
        for name, usual in (("attention_density", ATTENTION_DENSITY), ("mlp_density", MLP_DENSITY)):
            values = getattr(self, name)
            if values is None and not model.relu_mlp:
                raise ConfigError(f"system.{name} must be given: {model.name} has no ReLU MLP, and the paper's "
                                  f"{usual:.2g} holds for ReLU models only (1: dense)")  # fmt: skip
            listed = _listed(usual if values is None else values)
            if len(listed) not in (1, model.num_layers):
                raise ConfigError(f"system.{name} has {len(listed)} values; {model.name} has {model.num_layers} layers")
            given.append(listed * (model.num_layers // len(listed)))
        return tuple(zip(*given, strict=True))

    def union(self, density: float, seqs: int) -> float:
        """The share that at least one of so many sequences needs."""
        return self.overlap * density + (1 - self.overlap) * (1 - (1 - density) ** seqs)

    def loaded(self, model: ModelSpec) -> ModelSpec:
        """The model with its predictors in memory: first matrices on every GPU, second ones cut like the layer."""
        self.densities(model)
        wider = model.activation_bytes_per_value / (model.weight_bytes_per_param or DTYPE_BYTES[model.dtype])
        return replace(
            model,
            copied_layer_params=round(wider * (self.attention_rank + self.mlp_rank) * model.hidden_size),
            layer_vector_params=model.layer_vector_params + round(wider * self._outputs(model, 1)),
        )

    def predictor_params(self, model: ModelSpec, tp: int) -> int:
        """Of a layer, on one of ``tp`` GPUs."""
        return (self.attention_rank + self.mlp_rank) * model.hidden_size + self._outputs(model, tp)

    def _outputs(self, model: ModelSpec, tp: int) -> int:
        heads, neurons = ceil(model.num_attention_heads / tp), ceil(model.intermediate_size / tp)
        return self.attention_rank * heads + self.mlp_rank * neurons

    def remarks(self, model: ModelSpec) -> tuple[str, ...]:
        """That decodes are computed, and where more is left out than the paper found harmless (figure 6, table 3)."""
        attention, mlp = _matrices(model, 1)
        heads, neurons = (1 - sum(values) / model.num_layers for values in zip(*self.densities(model), strict=True))
        overall = (heads * attention + neurons * mlp) / (attention + mlp)
        if not heads:
            what, skipped, most = "of the MLP", neurons, 0.85
        elif not neurons:
            what, skipped, most = "of attention", heads, 0.5
        else:
            what, skipped, most = "of all parameters", overall, 0.75 if model.params > 100e9 else 0.5
        said = ["decode steps are dense ones less what is skipped: computed, not measured"]
        if skipped > most:
            said.append(f"a decoded token skips {skipped:.0%} {what}: Deja Vu lost no accuracy up to {most:.0%}")
        return tuple(said) if overall else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse:
    """Decode steps at ``sparsity``; steps with prompt tokens as ``inner`` has them.

    By operator where ``inner`` tells them apart: GEMMs and the part of attention that grows with the context shrink;
    all-reduces, head, embedding, overheads and attention's launches do not. A profile's ``linear`` shrinks with all
    that it says is included. Other models of step times (a polynomial, a toy) are scaled whole, all that does not grow
    with the context by the bytes of weights that are read, which is the most that can be gained; the name says so.
    """

    inner: StepCost
    sparsity: Sparsity = field(default_factory=Sparsity)

    @property
    def name(self) -> str:
        inner = self.inner
        known = isinstance(inner, Roofline) or (
            isinstance(inner, Fitted) and not any(p.polynomials for p in inner.profiles)
        )
        how = "by operator" if known else "whole steps by the bytes read where operators are not known"
        return f"{inner.name}, contextually sparse decodes ({how})"

    def bind(self, model: ModelSpec, stage: Stage, cluster: Cluster, slow: float = 1.0) -> StageCost:
        densities = self.sparsity.densities(model)[stage.first_layer : stage.end_layer]
        share = self._share(stage, cluster)
        return _within(
            self.inner.bind(model, stage, cluster, slow),
            lambda dense: _Sparse(dense, _Layers(self.sparsity, model, stage, densities, share, slow)),
        )

    def _share(self, stage: Stage, cluster: Cluster) -> Callable[[float], float]:
        """What gathered rows take, of the time of all, by how many of them there are."""
        if self.sparsity.gathered == "bytes":
            return lambda density: density
        names = {cluster.gpu(gpu).name for gpu in stage.gpus}
        profiles: Sequence[Profile] = getattr(self.inner, "profiles", ())
        for profile in profiles:
            table = profile.tables.get(GATHERED_TABLE)
            if table is not None and profile.device is not None and names == {profile.device.gpu}:
                seconds = np.array(table.seconds, dtype=float)
                at = np.array(table.counts) / table.counts[-1]
                return lambda density: float(np.interp(density, at, seconds / seconds[-1]))
        raise ConfigError(
            f"system.gathered is 'measured', but no profile of {', '.join(sorted(names))} in latency.profiles has a "
            f"{GATHERED_TABLE} table; run phasewise calibrate there, or take bytes"
        )


def _within(dense: StageCost, sparse: Callable[[StageCost], StageCost]) -> StageCost:
    """Kernels shrink inside what engines put around them: asynchronous scheduling, CUDA graphs."""
    if isinstance(dense, Overlapped):
        return dense._replace(kernels=_within(dense.kernels, sparse))
    if isinstance(dense, Captured):
        return dense._replace(inner=_within(dense.inner, sparse))
    return sparse(dense)


class _Layers:
    """Counts of the layers of one stage, on one of its GPUs."""

    def __init__(
        self, sparsity: Sparsity, model: ModelSpec, stage: Stage, densities: Sequence[tuple[float, float]],
        share: Callable[[float], float], slow: float,
    ) -> None:  # fmt: skip
        self.sparsity, self.count, self.share = sparsity, stage.num_layers, share
        self.attention, self.mlp = _matrices(model, stage.tp)
        kv_heads = ceil(model.num_key_value_heads / stage.tp)
        multiple = lcm(NEURONS_AT_ONCE, stage.tp)
        self.heads = [_chosen(heads, kv_heads) for heads, _ in densities]
        self.neurons = [_chosen(neurons, model.intermediate_size, multiple) for _, neurons in densities]
        self.value_bytes = model.activation_bytes_per_value
        self.weight_bytes = model.weight_bytes_per_param or DTYPE_BYTES[model.dtype]
        self.weights_bytes = self.count * (self.attention + self.mlp) * self.weight_bytes
        last = stage.end_layer == model.num_layers
        self.head_bytes = last * model.embedding_params * self.value_bytes / stage.tp
        self.predictor_params = self.count * sparsity.predictor_params(model, stage.tp)
        self.top_k_ps = self.count * sparsity.top_k_s * slow * PS_PER_S
        self.kv_heads, self.head_dim, self.hidden = kv_heads, model.head_dim, model.hidden_size

    def linear_share(self, seqs: int, unchanged_bytes: float) -> float:
        """Of the time of reading the weights and ``unchanged_bytes``, what a step of so many sequences takes."""
        union, share = self.sparsity.union, self.share
        bytes_read = self.weight_bytes * sum(
            share(union(heads, seqs)) * self.attention + share(union(neurons, seqs)) * self.mlp
            for heads, neurons in zip(self.heads, self.neurons, strict=True)
        )
        return (bytes_read + unchanged_bytes) / (self.weights_bytes + unchanged_bytes)

    def predictors_ps(self, seqs: int, byte_ps: float, flop_ps: float) -> float:
        """Of all layers: their weights read, or multiplied with each token; and the choice."""
        params = self.predictor_params
        gemms_ps = max(params * self.value_bytes * byte_ps, 2 * seqs * params * flop_ps)
        return gemms_ps + (self.top_k_ps if params else 0.0)

    def again_ps(self, byte_ps: float, flop_ps: float) -> int:
        """Per token of context: keys and values that chosen heads lack, made from that token's input.

        The input is read unless every chosen head of the GPU has them. (Every GPU reads whole inputs, which is more
        than its own part of a token's KV as soon as there are more than two.)
        """
        total_ps = 0.0
        for density in self.heads:
            missing = self.sparsity.recompute_miss * (1 - density)
            chosen = density * self.kv_heads
            read_bytes = self.value_bytes * self.hidden * (1 - (1 - missing) ** chosen)
            flops = 4 * missing * chosen * self.hidden * self.head_dim
            total_ps += max(read_bytes * byte_ps, flops * flop_ps)
        return round(total_ps)

    @property
    def attention_share(self) -> float:
        """Of the cached KV, what the sequence's own heads read: nothing is shared between sequences."""
        return sum(self.heads) / self.count


class _Sparse:
    """A stage's price. ``line`` is on the engine's hot path."""

    def __init__(self, dense: StageCost, layers: _Layers) -> None:
        self.dense = dense
        self._layers = layers
        linear = dense.operators.linear if isinstance(dense, Composed) else None
        self._linear: Fixed | None = linear if linear is not None and linear(1)[0] else None
        self._collective: Fixed = dense.operators.collective if isinstance(dense, Composed) else _nothing
        self._unchanged_bytes = layers.head_bytes if self._linear is None else 0.0
        self._byte_ps = self._linear_ps(1) / (layers.weights_bytes + self._unchanged_bytes)
        self._flop_ps = self._prompt_ps() / (2 * PROMPT * layers.count * (layers.attention + layers.mlp))
        self._attention_share = layers.attention_share
        self._again_ps = layers.again_ps(self._byte_ps, self._flop_ps)
        self._fixed = lru_cache(CACHE_ENTRIES)(self._price_fixed)

    @property
    def measured(self) -> bool:
        """Whether the dense price is; what is made of it never is (``Sparsity.remarks``)."""
        return self.dense.measured

    def line(self, work: Work) -> Line:
        chunks, seqs, context = work
        dense = self.dense.line(work)
        if not seqs or any(tokens for tokens, _ in chunks):
            return dense
        first_ps, slope_ps, iterations, beyond = dense
        fixed_ps, at_none_ps = self._fixed(seqs)
        grown_ps, steeper_ps = _scaled(first_ps - at_none_ps, slope_ps, self._attention_share)
        again_ps = self._again_ps
        return Line(fixed_ps + grown_ps + again_ps * context, steeper_ps + again_ps * seqs, iterations, beyond)

    def _price_fixed(self, seqs: int) -> tuple[int, int]:
        """(What does not grow with the context, the same of the dense step)."""
        layers = self._layers
        at_none_ps, linear_ps = self._at_none_ps(seqs), self._linear_ps(seqs)
        predictors_ps = layers.predictors_ps(seqs, self._byte_ps, self._flop_ps)
        if layers.sparsity.lookahead:
            predictors_ps = max(0.0, predictors_ps - self._collective(seqs)[0])
        shrunk_ps = round(linear_ps * layers.linear_share(seqs, self._unchanged_bytes))
        return at_none_ps - linear_ps + shrunk_ps + round(predictors_ps), at_none_ps

    def _at_none_ps(self, seqs: int) -> int:
        return self.dense.line(Work((), seqs, 0)).first_ps

    def _linear_ps(self, seqs: int) -> int:
        return self._at_none_ps(seqs) if self._linear is None else self._linear(seqs)[0]

    def _prompt_ps(self) -> int:
        return self.dense.line(Work(((PROMPT, 0),), 0, 0)).first_ps if self._linear is None else self._linear(PROMPT)[0]


def _scaled(value: int, slope: int, share: float) -> tuple[int, int]:
    """A share of a value that grows by ``slope``, and of the slope: whole slopes shrink to whole slopes, so that the
    law of lines holds. At most half a picosecond off per iteration's growth that the value contains."""
    if not slope:
        return round(value * share), 0
    smaller = round(slope * share)
    steps, rest = divmod(value, slope)
    return steps * smaller + round(rest * share), smaller


def _chosen(density: float, count: int, multiple: int = 1) -> float:
    """A share of so many, rounded up to a multiple (of all of them at most)."""
    wanted = ceil(density * count / multiple - 1e-9) * multiple
    return min(wanted, count) / count


def _matrices(model: ModelSpec, tp: int) -> tuple[int, int]:
    """Parameters of a layer's attention and of its MLP, on one of ``tp`` GPUs."""
    sizes = {gemm.name: gemm.n * gemm.k for gemm in model.gemms(tp)}
    return sizes["qkv"] + sizes["o"], sizes["gate_up"] + sizes["down"]


def _listed(values: Density) -> tuple[float, ...]:
    if values is None:
        return ()
    return tuple(values) if isinstance(values, Sequence) else (values,)


def _nothing(_count: int) -> tuple[int, bool]:
    return 0, False
