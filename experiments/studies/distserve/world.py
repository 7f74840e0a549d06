"""The models, traffic, SLOs and placements of DistServe's evaluation (section 6.1, table 3), for its study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from calibrate.profile.file import read_profile, shipped_profiles
from sim import Cluster, Limits, Problem, Slo, Workload
from sim.cost import Fitted, Roofline, StepCost
from sim.model import model
from sim.planners.distserve import Shape, Unit
from sim.systems.split.distserve import LIMITS
from traces import Lengths, Lognormal, Quantiles, generate

PROMPT_DECILES = (10, 162, 365, 506, 637, 814, 959, 1175, 1370, 1591, 2003)
OUTPUT_DECILES = (2, 6, 13, 21, 34, 55, 169, 239, 291, 469, 894)
"""Of LLMServe/DistServe 20a1633, simdistserve/benchmarks/alignment, opt-13b-sharegpt-workload/vllm-100-1.exp."""


def deciles(tokens: Sequence[int]) -> Quantiles:
    return Quantiles(points=tuple((place / 10, float(value)) for place, value in enumerate(tokens)))


RUN = (deciles(PROMPT_DECILES), deciles(OUTPUT_DECILES))
SHAREGPT = (deciles([round(0.88 * tokens) for tokens in PROMPT_DECILES]),
            deciles([round(1.2 * tokens) for tokens in OUTPUT_DECILES]))  # fmt: skip
HUMANEVAL = (
    Lognormal(mean_tokens=170, median_tokens=155, max_tokens=500),
    Lognormal(mean_tokens=95, median_tokens=80, max_tokens=400),
)
LONGBENCH = (
    Quantiles(points=((0, 900), (0.25, 1650), (0.5, 1800), (1, 1950))),
    Lognormal(mean_tokens=91, median_tokens=80, max_tokens=98),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Application:
    """A model, its traffic and SLO (section 6.1), the baseline's TP, and the printed factors over vLLM."""

    name: str
    model: str
    lengths: tuple[Lengths, Lengths]
    slo: Slo
    vllm_tp: int
    where: str
    faster: tuple[float, float]
    tighter: tuple[float, float] | None
    unit: Unit
    """The placement of table 3."""
    wider: Unit | None = None
    """What a finer search than the released one prefers."""
    roofline: bool = False

    def problem(self, profile: str, nodes: int = 4, limits: Limits = LIMITS) -> Problem:
        cluster = Cluster.of(
            nodes=[{"gpu": "A100-80G-SXM", "count": 8, "nodes": nodes}],
            links={"inter_node": {"gbps": 25, "latency_us": 10}},
        )
        drawn = generate(2000, 1.0, input=self.lengths[0], output=self.lengths[1], seed=0)
        longest = model(self.model).max_position_embeddings  # the datasets were cut to it
        lengths = tuple((one.input_tokens, min(one.output_tokens, longest - one.input_tokens)) for one in drawn)
        cost: StepCost = Roofline() if self.roofline else Fitted(profiles=(read_profile(shipped_profiles()[profile]),))
        return Problem(
            cluster=cluster, model=model(self.model), cost=cost, slo=self.slo, limits=limits,
            workload=Workload(rate_per_s=1.0, lengths=lengths),
        )  # fmt: skip


CHAT_13B = Application(
    name="OPT-13B ShareGPT", model="opt-13b", lengths=SHAREGPT, slo=Slo(ttft_s=0.25, tpot_s=0.1), vllm_tp=1,
    where="Fig. 8", faster=(2.0, 4.6), tighter=(1.8, 3.2), unit=Unit(prefill=Shape(2, 1), decode=Shape(1, 1)),
)  # fmt: skip
CHAT_66B = replace(
    CHAT_13B, name="OPT-66B ShareGPT", model="opt-66b", slo=Slo(ttft_s=2.5, tpot_s=0.15), vllm_tp=4,
    unit=Unit(prefill=Shape(4, 1), decode=Shape(2, 2)), wider=Unit(prefill=Shape(4, 1), decode=Shape(4, 1)),
)  # fmt: skip
CHAT_175B = replace(
    CHAT_13B, name="OPT-175B ShareGPT", model="opt-175b", slo=Slo(ttft_s=4.0, tpot_s=0.2), vllm_tp=8,
    unit=Unit(prefill=Shape(3, 3), decode=Shape(4, 3), nodes=3), wider=None, roofline=True,
)  # fmt: skip
CODE_66B = replace(
    CHAT_66B, name="OPT-66B HumanEval", lengths=HUMANEVAL, slo=Slo(ttft_s=0.125, tpot_s=0.2), where="Fig. 9a",
    faster=(5.7, 5.7), tighter=(1.4, 1.4),
)  # fmt: skip
SUMMARY_66B = replace(
    CHAT_66B, name="OPT-66B LongBench", lengths=LONGBENCH, slo=Slo(ttft_s=15.0, tpot_s=0.15), where="Fig. 9b",
    faster=(4.3, 4.3), tighter=(12.6, 12.6),
)  # fmt: skip
APPLICATIONS = (CHAT_13B, CHAT_66B, CHAT_175B, CODE_66B, SUMMARY_66B)
