"""The memory of one replica: how many KV blocks it has room for, and the ledger of who holds them.

Blocks have no identity beyond what somebody may ask for again. Without prefix caching the ledger is one counter.
With it, free blocks form a queue in the order they were freed: blocks whose content is still known
can be taken back from anywhere in the queue, and lose their content when the head of the queue is handed out (vLLM v1,
``kv_cache_manager``: eviction in the order of freeing, a request's last blocks first). Content is known by the hashes
of a trace, to every request with the same prefix; and what no trace has hashes for, a ``Run``, to the request that
computed it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from sim.model import ModelSpec
from sim.policy import Limits, Problem
from sim.types import SimulationError, Stage

DEFAULT_BATCHED_TOKENS = 2048
UNSEEN_BYTES = 0.47 * 2**30
"""Of a GPU's memory, what the driver keeps and no process is told of (nvidia-smi's total less torch's: H100, 4090)."""
FUSING_BYTES_PER_S = 350e9
"""Of a GPU's NVLink, from which on all-reduces are fused with norms: Hopper and later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What a release of vLLM keeps of every GPU beside weights, KV and the activations of the layers.

    ``own_bytes``: CUDA's and its own buffers; ``tp_bytes``: more where there are collectives; ``fused_tp_bytes``: the
    same where those are fused with norms. ``logit_bytes``: of every logit at the peak of the sampler, which is tried
    with ``max_num_seqs`` sequences before blocks are counted. ``experts_stay``: the workspace of a mixture of experts
    is still there then. ``graphs_bytes``: CUDA graphs, where they are set aside.
    """

    own_bytes: float
    tp_bytes: float
    fused_tp_bytes: float
    logit_bytes: float
    experts_stay: bool = True
    graphs_bytes: float = 0.0


GIB = 2**30
VALUE_BYTES = 2
_FIRST = Runtime(
    own_bytes=0.13 * GIB, tp_bytes=0.42 * GIB, fused_tp_bytes=0.42 * GIB, logit_bytes=38, experts_stay=False
)
_SEVENTEEN = replace(_FIRST, logit_bytes=15.4, experts_stay=True)
_EIGHTEEN = replace(_SEVENTEEN, own_bytes=0.25 * GIB, fused_tp_bytes=1.85 * GIB)
RUNTIMES = (
    ((0, 0), _FIRST),
    ((0, 17), _SEVENTEEN),
    ((0, 18), _EIGHTEEN),
    ((0, 21), replace(_EIGHTEEN, graphs_bytes=0.84 * GIB)),
)
"""By vLLM's first release that it holds for. Up to 0.16: llm-d/llm-d-benchmark 2593348,
empirical-vllm-memory-results.md (H100). From 0.17 on: Llama-3.1-8B and Qwen2.5-7B at TP 1 and 2 in jgchn/llm-d-planner
30ec05f, accuracy/results/v0.19.0 (H100), and its report's Qwen3-14B by release. Graphs: the same runs' median; set
aside from 0.21 on (vllm-project/vllm 30515, 45178). ``experiments/fidelity/cases/memory.py``
judges all by other servers."""
LATEST = (0, 19)
"""The release that stands for vLLM where none is named: the kernel tables are of it."""


def runtime(version: tuple[int, ...] = LATEST) -> Runtime:
    """What holds for a release of vLLM."""
    return [found for first, found in RUNTIMES if first <= version][-1]


def kv_bytes_available(problem: Problem, stage: Stage, limits: Limits, copies: int = 1) -> float:
    """Bytes per GPU of a stage left for KV, after weights, activations and the runtime (may be negative).

    The runtime's share is that of ``limits.release``. ``copies``: of the weights, where models share the GPUs.
    """
    model, kept = problem.model, runtime(limits.release or LATEST)
    gpus = [problem.cluster.gpu(gpu) for gpu in stage.gpus]
    memory_bytes = (min(gpu.memory_bytes for gpu in gpus) - UNSEEN_BYTES) * limits.gpu_memory_utilization
    tokens = limits.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS
    width = 4 * model.hidden_size + 3 * model.intermediate_size / stage.tp
    activation_bytes = 2 * tokens * width
    if stage.end_layer == model.num_layers:
        sampler_bytes = kept.logit_bytes * limits.max_num_seqs * model.vocab_size
        if kept.experts_stay:
            sampler_bytes += _experts_bytes(model, tokens, stage.tp)
        activation_bytes = max(activation_bytes, sampler_bytes)
    weight_bytes = copies * model.weight_bytes(stage.first_layer, stage.end_layer, stage.tp) / stage.tp
    kept_bytes = kept.own_bytes + kept.graphs_bytes
    if stage.tp > 1:
        fused = all((gpu.nvlink_bytes_per_s or 0.0) >= FUSING_BYTES_PER_S for gpu in gpus)
        kept_bytes += kept.fused_tp_bytes if fused else kept.tp_bytes
    return memory_bytes - weight_bytes - activation_bytes - kept_bytes


def common_weight_bytes(model: ModelSpec, old: tuple[Stage, int], new: tuple[Stage, int]) -> float:
    """Of a GPU's weights as a rank of a new stage, those that it holds as a rank of an old one.

    Layers in common, of which each rank has an equal contiguous part.
    """
    (was, old_rank), (will, rank) = old, new
    first, end = max(was.first_layer, will.first_layer), min(was.end_layer, will.end_layer)
    share = min((old_rank + 1) / was.tp, (rank + 1) / will.tp) - max(old_rank / was.tp, rank / will.tp)
    return model.weight_bytes(first, end, will.tp) * share if first < end and share > 0 else 0.0


def _experts_bytes(model: ModelSpec, tokens: int, tp: int) -> float:
    """What vLLM's grouped GEMMs write between them, gate and up projection in the room of the result."""
    if model.experts_per_token is None or model.moe_intermediate_size is None:
        return 0.0
    inner = model.moe_intermediate_size / tp
    return tokens * model.experts_per_token * (max(2 * inner, model.hidden_size) + inner) * VALUE_BYTES


def kv_blocks(problem: Problem, stages: tuple[Stage, ...], limits: Limits, copies: int = 1) -> int:
    """Blocks that every stage has room for; 0 if the model does not fit. The rest as in ``kv_bytes_available``."""
    if limits.num_kv_blocks is not None:
        return limits.num_kv_blocks
    blocks = []
    for stage in stages:
        per_token = problem.model.kv_bytes_per_token_layer_gpu(stage.tp) * stage.num_layers
        free_bytes = kv_bytes_available(problem, stage, limits, copies)
        blocks.append(int(free_bytes // (per_token * limits.block_size)))
    return max(0, min(blocks))


def copied_blocks(tokens: int, input_tokens: int, samples: int, block_size: int, tail_blocks: int | None = None) -> int:
    """Blocks of a group of samples beyond those of its first one, when each has ``tokens`` in the KV cache.

    All share the full blocks of the prompt; a partial last one is copied for each (vLLM, SOSP 2023, section 4.4). The
    copies are counted from the beginning, since a group is admitted with them. Beams differ in their last
    ``tail_blocks`` only; None: in all that follows the prompt.
    """
    own = -(-max(tokens, input_tokens) // block_size) - input_tokens // block_size
    return (samples - 1) * (own if tail_blocks is None else min(own, tail_blocks))


@cache
def beam_tail_blocks(beams: int, block_size: int) -> int:
    """Blocks at the end of a beam search in which its beams differ.

    Which beam each one continues depends on what is said, which a trace does not tell. If every beam is as likely as
    another, the mean of what they do not share follows from how fast their lines of descent meet (Wright, 1931).
    """
    if beams == 1:
        return 1
    meet = [[0.0] * (beams + 1) for _ in range(beams + 1)]  # [lines][distinct ones a token earlier]: probability
    meet[0][0] = 1.0
    for lines in range(1, beams + 1):
        for distinct in range(1, lines + 1):
            new = meet[lines - 1][distinct - 1] * (beams - distinct + 1)
            meet[lines][distinct] = (new + meet[lines - 1][distinct] * distinct) / beams
    apart = [0.0] * (beams + 1)  # tokens beyond one line's, in the mean, of so many lines
    for lines in range(2, beams + 1):
        earlier = sum(meet[lines][distinct] * apart[distinct] for distinct in range(2, lines))
        apart[lines] = (lines - 1 + earlier) / (1 - meet[lines][lines])
    return 1 + round((apart[beams] / (beams - 1) - 1) / block_size)


def beam_blocks(input_tokens: int, parents: Sequence[Sequence[int]], block_size: int) -> int:
    """Distinct blocks that the beams of a search hold at its end, prompt included (vLLM, SOSP 2023, section 4.4).

    ``parents[step][beam]`` is which beam of the step before this one continues (in the first step: any, since all
    are the prompt). Beams share what they inherit; one that writes into a block that others hold copies it.
    """
    if not parents:
        return -(-input_tokens // block_size)
    width = len(parents[0])
    tables = [list(range(-(-input_tokens // block_size)))] * width
    fresh = len(tables[0])
    for step, origin in enumerate(parents):
        tables = [list(tables[parent]) for parent in origin]
        holders = Counter(block for table in tables for block in table)
        for table in tables:
            partial = bool((input_tokens + step) % block_size)
            if partial and holders[table[-1]] == 1:
                continue  # it alone holds the block, and writes in place
            if partial:
                holders[table.pop()] -= 1
            table.append(fresh)
            holders[fresh] = 1
            fresh += 1
    return len({block for table in tables for block in table})


def sharing_saving(blocks: int, tokens: int, sequences: int, block_size: int) -> float:
    """Share of the blocks of ``sequences`` unshared ones, of ``tokens`` each, that holding only ``blocks`` saves."""
    return 1 - blocks / (sequences * -(-tokens // block_size))


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """The name of free blocks that follow each other in one request: whole ones, which it can come back to.

    They are freed, and hence evicted, from the last one on, so that their number tells which of them are left.
    """

    owner: Hashable


class Ledger:
    """``free`` + used = ``total`` blocks of ``block_size`` tokens, always."""

    __slots__ = ("_content", "_free_queue", "block_size", "free", "total")

    def __init__(self, total: int, block_size: int, prefix_caching: bool = False) -> None:
        self.total = total
        self.block_size = block_size
        self.free = total
        # content hash -> number of holders (0: in the free queue, content intact)
        self._content: dict[Hashable, int] | None = {} if prefix_caching else None
        # key -> blocks; a content hash stands for one block, a Run for those of it, any other key for blank ones
        self._free_queue: OrderedDict[Hashable, int] = OrderedDict()
        if prefix_caching:
            self._free_queue[object()] = total

    @property
    def used(self) -> int:
        return self.total - self.free

    @property
    def prefix_caching(self) -> bool:
        return self._content is not None

    def blocks(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_size)

    def take(self, blocks: int) -> None:
        """Hand out blank blocks, evicting content from the head of the free queue."""
        if blocks > self.free:
            raise SimulationError(f"KV ledger: {blocks} blocks wanted, {self.free} of {self.total} free")
        self.free -= blocks
        if self._content is None:
            return
        while blocks:
            key, count = next(iter(self._free_queue.items()))
            if count > blocks:
                self._free_queue[key] = count - blocks
                return
            del self._free_queue[key]
            self._content.pop(key, None)
            blocks -= count

    def give(self, blocks: int, shared: Sequence[Hashable] = ()) -> None:
        """Take back a request's blocks: ``blocks`` blank ones and a reference to each shared one."""
        self.free += blocks
        if self._content is None:
            return
        if blocks:
            last = next(reversed(self._free_queue), None)
            key = last if type(last) is object else object()
            self._free_queue[key] = self._free_queue.get(key, 0) + blocks
        for key in reversed(shared):
            self._content[key] -= 1
            if not self._content[key]:
                self._free_queue[key] = 1
                self.free += 1

    def keep(self, blocks: int, owner: Hashable) -> Run:
        """Take back blocks whose content their owner may come for: by the name that is returned."""
        run = Run(owner)
        self.free += blocks
        self._free_queue[run] = blocks
        return run

    def kept(self, run: Run | None) -> int:
        """Leading blocks of a run whose content is still in memory."""
        return self._free_queue.get(run, 0) if run is not None else 0

    def take_back(self, run: Run) -> None:
        """Hand out what is left of a run, content and all."""
        self.free -= self._free_queue.pop(run)

    def blank_first(self, waiting: Container[Hashable]) -> int:
        """Blocks that can be handed out before any content is lost that those who wait may come for."""
        if self._content is None:
            return self.free
        blank = 0
        for key, count in self._free_queue.items():
            if key in self._content or (type(key) is Run and key.owner in waiting):
                break
            blank += count
        return blank

    def known_prefix(self, hashes: Sequence[Hashable]) -> int:
        """Leading blocks whose content is in memory."""
        if not self._content:
            return 0
        known = 0
        for key in hashes:
            if key not in self._content:
                break
            known += 1
        return known

    def contents(self) -> frozenset[Hashable]:
        """Hashes of all that is in memory."""
        return frozenset(self._content or ())

    def idle_blocks(self, hashes: Sequence[Hashable]) -> int:
        """How many of these known blocks are in the free queue, hence would leave it when shared."""
        assert self._content is not None
        return sum(1 for key in hashes if not self._content[key])

    def share(self, hashes: Sequence[Hashable]) -> None:
        """Hold one more reference to each of these known blocks."""
        assert self._content is not None
        for key in hashes:
            if not self._content[key]:
                del self._free_queue[key]
                self.free -= 1
            self._content[key] += 1

    def publish(self, key: Hashable) -> bool:
        """Give a held blank block a content hash; ``False`` if another block has that content already."""
        if self._content is None or key in self._content:
            return False
        self._content[key] = 1
        return True
