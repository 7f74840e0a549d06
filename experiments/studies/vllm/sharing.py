"""vLLM's figures on sharing KV (SOSP 2023, sections 6.3 to 6.5, 7.3): samples, beams, prefixes, chats, preemption."""

from __future__ import annotations

from collections.abc import Iterator

from experiments.runs.progress import Log
from experiments.studies.published import Comparison, row
from experiments.studies.vllm.world import (
    ALPACA,
    BLOCK,
    CHATBOT,
    LLAMA_13B,
    OPT_13B,
    SHAREGPT,
    Deployment,
    Load,
    served_rate,
    translation,
)
from sim.memory import beam_tail_blocks, copied_blocks

ORACLE = "orca (oracle)"
SAVED: tuple[tuple[Load, bool, dict[int, float]], ...] = (
    (ALPACA, False, {2: 6.09, 4: 8.53, 6: 9.79}),
    (ALPACA, True, {2: 37.56, 4: 53.13, 6: 55.16}),
    (SHAREGPT, False, {2: 16.2, 6: 30.5}),
    (SHAREGPT, True, {2: 44.3, 6: 66.3}),
)
"""Figure 15 and its text: load, whether beams, per cent saved by width. ShareGPT's range is taken as that of 2 to 6."""


def savings(count: int = 2000) -> Iterator[Comparison]:
    """Figure 15: blocks that sharing saves, over all steps of all requests."""
    for load, beams, printed in SAVED:
        for width, share in printed.items():
            what = f"opt-13b, {load.name}, {'beams' if beams else 'samples'} {width}, blocks saved"
            ours = 100 * saving(load, width, beams, count)
            yield row("Fig. 15", what, share, ours, "%", "arithmetic")


def saving(load: Load, width: int, beams: bool, count: int) -> float:
    """Share of the blocks of so many samples, or beams, that need not be held, step by step."""
    tail = beam_tail_blocks(width, BLOCK) if beams else None
    held = alone = 0
    for request in load.requests(1.0, count):
        first, end = request.input_tokens, request.input_tokens + request.output_tokens
        for blocks in range(-(-first // BLOCK), -(-(end - 1) // BLOCK) + 1):
            steps = min(blocks * BLOCK, end - 1) - max((blocks - 1) * BLOCK, first - 1)
            held += steps * (blocks + copied_blocks(blocks * BLOCK, first, width, BLOCK, tail))
            alone += steps * width * blocks
    return 1 - held / alone


def samples(duration_s: float, precision: float, log: Log) -> Iterator[Comparison]:
    """Figure 14, Alpaca: what sharing adds to the rate over Orca (Oracle)."""
    cases = (
        (ALPACA, "one sample", 1.3, ""),
        (ALPACA._replace(samples=6), "6 samples", None, "none printed"),
        (ALPACA._replace(samples=6, beam_search=True), "beams 6", 2.3, ""),
    )
    for load, what, printed, text in cases:
        where = f"opt-13b, Alpaca, {what}, rate of vLLM over {ORACLE}"
        yield _gain("Fig. 14", where, printed, OPT_13B, load, ORACLE, duration_s, precision, log, text)


def prefixes(duration_s: float, precision: float, log: Log) -> Iterator[Comparison]:
    """Figure 16: translations behind the same one or five examples."""
    for tokens, printed in ((80, 1.67), (341, 3.58)):
        what = f"llama-13b, translation, {tokens} tokens shared, rate of vLLM over {ORACLE}"
        yield _gain("Fig. 16", what, printed, LLAMA_13B, translation(tokens), ORACLE, duration_s, precision, log)


def chats(duration_s: float, precision: float, log: Log) -> Iterator[Comparison]:
    """Figure 17: prompts of 1024 tokens, for which all of Orca's variants reserve the same."""
    for other in (ORACLE, "orca (pow2)", "orca (max)"):
        what = f"opt-13b, chatbot, rate of vLLM over {other}"
        yield _gain("Fig. 17", what, 2.0, OPT_13B, CHATBOT, other, duration_s, precision, log)


def preemption(duration_s: float, precision: float) -> Iterator[Comparison]:
    """Figure 19b, blocks of 16: recomputing and swapping serve about as much."""
    rates = [
        served_rate("vllm", OPT_13B, SHAREGPT, duration_s, precision, preemption=how) for how in ("recompute", "swap")
    ]
    what, note = "opt-13b, ShareGPT, rate with recomputing over swapping", f"{rates[0]:.2f} and {rates[1]:.2f} req/s"
    yield row("Fig. 19", what, 1.0, rates[0] / rates[1], "x", kind="direction", text="comparable", note=note)


def _gain(
    where: str, what: str, printed: float | None, place: Deployment, load: Load, other: str, duration_s: float,
    precision: float, log: Log, text: str = "",
) -> Comparison:  # fmt: skip
    ours, theirs = (served_rate(label, place, load, duration_s, precision) for label in ("vllm", other))
    note = f"{ours:.2f} and {theirs:.2f} req/s"
    log.say(f"{what}: {note}")
    return row(where, what, printed, ours / theirs if theirs else None, "x", text=text, note=note)
