"""``workload`` of a scenario file: where requests come from, when they come, and who waits for whom.

Three questions, answered apart. *Which requests*: a ``trace``, ``generate``, or a ``mix`` of classes, each of which has
one of the two. *When*: as recorded, or drawn at a ``rate``. *Who waits*: nobody (an open loop), the clients of a
``closed_loop``, or the turns of ``sessions``. ``requests.py`` builds what this describes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from experiments.scenario.part import Count, NonNegative, Part, Positive, PositiveSeconds, Seconds, Whole

PACE = ("arrivals", "arrival_options", "cv")
"""Keys that say how arrivals are drawn."""


class LengthsSpec(Part):
    """A distribution of counts: one of fixed, uniform, mean with median (lognormal), or quantiles."""

    fixed: Count | None = Field(default=None, description="always this", examples=[128])
    uniform: tuple[Count, Count] | None = Field(
        default=None, description="every whole number from the first to the second", examples=[[1, 256]]
    )
    mean: Positive | None = Field(default=None, description="of a lognormal distribution", examples=[1155])
    median: Positive | None = Field(default=None, description="of the same; not above the mean", examples=[1020])
    max: Count | None = Field(default=None, description="cut of the lognormal distribution", examples=[4096])
    quantiles: tuple[tuple[NonNegative, Positive], ...] | None = Field(
        default=None, description="(share, tokens) from 0 to 1", examples=[[[0, 10], [0.5, 100], [1, 2000]]]
    )

    @model_validator(mode="after")
    def _one_form(self) -> LengthsSpec:
        given = {name for name in LengthsSpec.model_fields if getattr(self, name) is not None}
        if given not in ({"fixed"}, {"uniform"}, {"quantiles"}, {"mean", "median"}, {"mean", "median", "max"}):
            raise ValueError(f"{sorted(given)} given; set one of fixed, uniform, quantiles, or mean and median")
        return self


class GenerateSpec(Part):
    """Requests out of distributions; ``workload.rate`` and ``arrivals`` say when they come."""

    requests: Annotated[Count, Field(le=10**8)] = Field(
        description="how many; with turns: how many conversations", examples=[1000]
    )
    input: LengthsSpec = Field(
        description="prompt; with turns: new text of a turn", examples=[{"mean": 1155, "median": 1020}]
    )
    output: LengthsSpec = Field(description="answer", examples=[{"uniform": [1, 256]}])
    turns: LengthsSpec | None = Field(
        default=None, description="turns of a conversation; needs workload.sessions", examples=[{"uniform": [1, 8]}]
    )
    rank_correlation: Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)] = Field(
        default=0.0, description="Spearman's, of input and output tokens", examples=[0.3]
    )


class StreamSpec(Part):
    """A trace, or generated requests; then, in this order: slice, limit, time_scale, new arrivals, marks."""

    trace: str | None = Field(
        default=None,
        description="a trace file; 'sample', or neither this nor generate nor mix: the sample that is shipped",
        examples=["AzureLLMInferenceTrace_conv.csv"],
    )
    generate: GenerateSpec | None = Field(
        default=None,
        description="requests out of distributions",
        examples=[{"requests": 1000, "input": {"fixed": 512}, "output": {"fixed": 128}}],
    )
    format: str | None = Field(
        default=None, description="trace format; null: guessed where unambiguous", examples=["mooncake"]
    )
    format_options: dict[str, Any] = Field(
        default={},
        description="of the formats that have them: block_tokens, time_unit, columns, characters_per_token, "
        "tokenizer, turns",
        examples=[{"block_tokens": 16, "time_unit": "s"}],
    )
    sort: bool = Field(default=False, description="order the trace by arrival (holds it in memory)", examples=[True])
    start_s: Seconds = Field(
        default=0.0, description="leave out what arrives before; it becomes second 0", examples=[600]
    )
    end_s: PositiveSeconds | None = Field(
        default=None, description="leave out what arrives from then on, by the trace's own clock", examples=[1200]
    )
    limit: Count | None = Field(default=None, description="the first N requests", examples=[2000])
    time_scale: Positive | None = Field(
        default=None, description="stretches every interval: 2 halves the rate", examples=[0.5]
    )
    arrivals: Literal["poisson", "constant", "gamma", "bursts", "ramp"] = Field(
        default="poisson", description="how arrivals are drawn, if a rate is given", examples=["gamma"]
    )
    arrival_options: dict[str, Positive] = Field(
        default={},
        description="bursts: on_s, off_s; ramp: start_rate_per_s, ramp_s",
        examples=[{"on_s": 10, "off_s": 50}],
    )
    cv: Positive | None = Field(
        default=None, description="coefficient of variation of gamma arrivals (1: Poisson)", examples=[2.5]
    )
    priority: Whole | None = Field(
        default=None,
        description="lower is served first, by systems that look at it; null: the trace's own, else 0",
        examples=[-1],
    )
    samples: Count | None = Field(
        default=None,
        description="answers sampled in parallel from each prompt, whose KV they share; null: the trace's own, else 1",
        examples=[4],
    )
    beam_search: bool | None = Field(
        default=None,
        description="the samples are the beams of one search; null: the trace's own, else false",
        examples=[True],
    )

    @model_validator(mode="after")
    def _one_stream(self) -> StreamSpec:
        if self.generate is not None and self.trace is not None:
            raise ValueError("both trace and generate are given; drop one")
        if (self.cv is not None) != (self.arrivals == "gamma"):
            raise ValueError("cv belongs to arrivals: gamma, and gamma needs it; set both or neither")
        if self.end_s is not None and self.end_s <= self.start_s:
            raise ValueError(f"end_s {self.end_s:g} must be greater than start_s {self.start_s:g}")
        return self

    @property
    def marks(self) -> dict[str, Any]:
        """Fields that every request of the stream gets."""
        found = {name: getattr(self, name) for name in ("priority", "samples", "beam_search")}
        return {name: value for name, value in found.items() if value is not None}

    def _anchored(self, found: Callable[[str], str]) -> Self:
        return self.model_copy(update={"trace": found(self.trace)}) if self.trace else self

    def states(self, name: str) -> bool:
        """Whether a key says something else than its default."""
        return bool(getattr(self, name) != StreamSpec.model_fields[name].default)


class ClassSpec(StreamSpec):
    """One class of a mix: a stream of its own. Its name is what results and ``slo.classes`` call it."""

    share: Positive = Field(
        default=1.0, description="of workload.rate, relative to the other classes' shares", examples=[0.25]
    )


class ThinkSpec(Part):
    """How long a user thinks before the next request: gamma-distributed."""

    think_s: Seconds = Field(default=0.0, description="mean time to think", examples=[20])
    think_cv: NonNegative = Field(
        default=1.0, description="coefficient of variation (1: exponential, 0: always think_s)", examples=[0.5]
    )


class ClosedLoopSpec(ThinkSpec):
    """Clients, each of whom thinks, sends a request, waits for the end of its answer, and thinks again.

    The requests are dealt to the clients in turn, whatever their arrival times.
    """

    clients: Count = Field(description="how many there are at any time", examples=[64])


class SessionsSpec(ThinkSpec):
    """Conversations: requests of one session are its turns, and each follows the end of the one before."""

    inputs: Literal["new", "whole"] = Field(
        default="new",
        description="what input tokens are: a turn's new text, to which earlier prompts and answers are added, or the "
        "whole prompt",
        examples=["whole"],
    )
    block_tokens: Count = Field(
        default=16, description="of the hashes by which a prefix cache knows a repeated prompt", examples=[32]
    )


class WorkloadSpec(StreamSpec):
    """Which requests come, when, and who waits for whom."""

    mix: dict[str, ClassSpec] = Field(
        default={},
        description="several classes of requests merged: name -> class; start_s, end_s, limit and time_scale beside it "
        "apply to all of them together",
        examples=[{"chat": {"trace": "sample", "share": 3}, "batch": {"trace": "batch.csv", "priority": 1}}],
    )
    rate: Positive | None = Field(
        default=None,
        description="arrivals are drawn anew at this rate, which a mix shares out; with turns: conversations/s; "
        "null: as recorded",
        examples=[5.0],
    )
    closed_loop: ClosedLoopSpec | None = Field(
        default=None,
        description="clients who wait for answers, in place of arrival times",
        examples=[{"clients": 64, "think_s": 20}],
    )
    sessions: SessionsSpec | None = Field(
        default=None,
        description="turns of a conversation wait for each other; context grows and is shared with a prefix cache",
        examples=[{"think_s": 30}],
    )
    too_long: Literal["reject", "truncate", "error"] = Field(
        default="reject", description="what becomes of requests over the model's context", examples=["truncate"]
    )

    @model_validator(mode="after")
    def _fits_together(self) -> WorkloadSpec:
        for complaint in (*self._of_mix(), *self._of_pace(), *self._of_turns()):
            raise ValueError(complaint)
        return self

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """What there is to read or draw, by class; of a workload without classes, itself under no name."""
        return dict(self.mix) or {"": self}

    def anchored(self, found: Callable[[str], str]) -> WorkloadSpec:
        """The same with every trace's name replaced by the file that ``found`` it is."""
        mix = {name: klass._anchored(found) for name, klass in self.mix.items()}
        return self._anchored(found).model_copy(update={"mix": mix})

    def _of_mix(self) -> Iterator[str]:
        apart = ("trace", "generate", "format", "format_options", "sort", *PACE, "priority", "samples", "beam_search")
        for name in apart if self.mix else ():
            if self.states(name):
                yield f"both {name} and mix are given; {name} belongs to each class of the mix, move it there"

    def _of_pace(self) -> Iterator[str]:
        """Drawn arrivals need a rate; clients need none."""
        for name, stream in self.streams.items():
            place = f"mix.{name}: " if name else ""
            drawn = [key for key in ("generate", "arrivals") if stream.states(key)]
            if self.closed_loop is None and self.rate is None and drawn:
                what = "generate" if "generate" in drawn else f"arrivals: {stream.arrivals}"
                yield f"{place}{what} needs a rate; set workload.rate (requests/s)"
            for key in PACE if self.closed_loop is not None else ():
                if stream.states(key):
                    yield f"{place}{key}: under closed_loop the clients set the pace; drop {key}"
        if self.closed_loop is not None and self.rate is not None:
            yield f"rate {self.rate:g}: under closed_loop the clients set the pace; drop rate or closed_loop"

    def _of_turns(self) -> Iterator[str]:
        if self.sessions is None:
            for name, stream in self.streams.items():
                if stream.generate is not None and stream.generate.turns is not None:
                    place = f"mix.{name}.generate" if name else "generate"
                    yield f"{place}.turns: turns must wait for each other; set workload.sessions, as in {{think_s: 30}}"
            return
        if self.closed_loop is not None:
            yield "both closed_loop and sessions are given; drop one"
        if self.too_long != "reject" and self.sessions.inputs == "new":
            yield f"too_long: {self.too_long} is not for a context that grows with each turn; set too_long: reject"
