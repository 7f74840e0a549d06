"""``docs/reference/profiles.md``: every shipped latency profile, out of the profiles themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from calibrate.profile.file import read_profile, shipped_profiles
from calibrate.profile.relatives import RELATIVES
from sim.cluster import gpus
from sim.cost import Kernels, Profile

INTRODUCTION = """\
# Latency profiles

A profile holds measured step times and where they come from. This page lists those that come with the package;
`phasewise profiles --markdown` prints it, `phasewise profiles` a table, `phasewise calibrate report NAME` the errors
of one, with figures, and `--against OTHER` its times over another's. Most are made from other projects' public
measurements, which are named with their licence: `phasewise calibrate import FORMAT PATH --out FILE` makes such a one
again from their files (aiconfigurator, DistServe, Helix, LLMServingSim, splitwise-sim, Vidur). `phasewise calibrate`
measures your own GPU.

A scenario takes them by GPU type, model, tensor-parallel degree and dtype, and nothing that is merely near:

1. the operators measured for that very model, of the first profile that has them;
2. else a model put together from kernel tables of that GPU type ("any model" below);
3. else, if its profile is named in `latency`, whole steps in a closed form (the DistServe profiles: for OPT on an
   A100 the kernel tables come first, so name `latency: distserve-a100` to get DistServe's own engine);
4. else, where `latency` is null, kernel tables of a related GPU type, scaled by both data sheets (listed at the end; a
   prediction: docs/fidelity.md says how good);
5. else the roofline, at typical efficiencies. A result says which GPU types 4 and 5 were used for, and which share of
   the steps lay outside the measured range.

Kernel tables serve 16-bit models and those in 8-bit floats (`dtype: float8`; with GEMMs that were measured so on
H100, H200 and RTX PRO 6000, that follow from the 16-bit ones elsewhere), with a cache of 16 or 8 bits.

```yaml
latency: null                                    # all of these; or one by name, or a file:
latency: distserve-a100
latency: {A100-80G-SXM: my-profile.json, L4: roofline}
accept_error: 0.3                                # refuse a named profile with a larger mean held-out error
```

*Held-out error*: of times that the fit did not see, the mean over the points (the largest in brackets) as shares of
what was measured. How each was left out stands under the profile. A closed form is taken over as published, with no
measurements to test it on.
"""
WITHOUT = """\
## GPU types without a profile

Nobody's public kernel times are at hand for these. Scaled from a related one's by `calibrate/profile/relatives.py`, for
models that no profile above has on them:
"""
NEITHER = """\
The roofline, from the data sheet and typical efficiencies, for any model:
"""
LINKS = """\

All-reduces come with the kernel tables. Without one they are priced from the catalogue's NVLink or PCIe and what NCCL
and vLLM reach of it, or from what a scenario states; public all-reduce and send/receive times judge that ("Links" in
docs/fidelity.md).
"""


def page() -> str:
    """The page's text."""
    profiles = {name: read_profile(path) for name, path in shipped_profiles().items()}
    known = {gpu for profile in profiles.values() for part in profile.parts for gpu in part.gpus}
    sections = [text for name, profile in profiles.items() for text in _section(name, profile)]
    scaled = ", ".join(f"{name} (from {relative.profile})" for name, relative in RELATIVES.items())
    others = ", ".join(gpu.name for gpu in gpus() if gpu.name not in {*known, *RELATIVES})
    return "\n".join([INTRODUCTION, *sections, f"{WITHOUT}{scaled}.\n", f"{NEITHER}{others}.", LINKS])


def _section(name: str, profile: Profile) -> Iterator[str]:
    origin = profile.provenance
    yield f"## {name}\n"
    yield f"- source: {origin.source} ({origin.licence}); {origin.date}"
    yield f"- what ran: {origin.engine}"
    yield f"- method: {origin.method}\n"
    yield from _table(("GPU", "model", "TP", "dtypes", "held-out error"), [_row(part) for part in profile.parts])
    yield ""


def _row(part: Any) -> tuple[str, ...]:
    model, tp = ("any model", "any") if isinstance(part, Kernels) else (part.model, str(part.tp))
    errors = [f"{kind} {held.mape:.1%} ({held.largest:.0%})" for kind, held in part.held_out.items()]
    return ", ".join(part.gpus), model, tp, ", ".join(part.dtypes), ", ".join(errors) or "not published"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(row)} |"
