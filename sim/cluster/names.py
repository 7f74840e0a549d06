"""What a driver, a cloud or a result file calls a GPU, and what that is in the catalogue: word by word.

A word that is not accounted for makes another GPU: a slice (MIG), a laptop's, a ``D`` or Max-Q variant, another form
factor. Those are refused by the word, never taken for their bigger relatives.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sim.cluster.catalogue import did_you_mean, gpus
from sim.types import ConfigError


class Called(NamedTuple):
    """The words that a GPU's name must have, and those that it may have."""

    name: str
    must: frozenset[str]
    may: frozenset[str] = frozenset()


def called(name: str, must: str, may: str = "") -> Called:
    return Called(name, frozenset(must.split()), frozenset(may.split()))


NAMES = (
    called("RTX-3090-Ti", "3090 ti", "rtx 24gb"),
    called("RTX-3090", "3090", "rtx 24gb"),
    called("RTX-4090", "4090", "rtx 24gb"),
    called("RTX-PRO-6000", "pro 6000", "rtx blackwell server workstation edition bw se 96gb"),
    called("A6000", "a6000", "rtx 48gb"),
    called("A5000", "a5000", "rtx 24gb"),
    called("A40", "a40", "48gb pcie"),
    called("A10G", "a10g", "24gb"),
    called("L40S", "l40s", "48gb pcie"),
    called("L4", "l4", "24gb pcie"),
    called("T4", "t4", "16gb pcie"),
    called("V100-32G", "v100 32gb", "sxm"),
    called("V100-16G", "v100 16gb", "sxm"),
    called("A100-40G-SXM", "a100 40gb sxm", "hbm2"),
    called("A100-80G-SXM", "a100 sxm", "80gb hbm2e"),
    called("A100-80G-PCIe", "a100 80gb pcie", "hbm2e"),
    called("H100-PCIe", "h100 pcie", "80gb hbm2e"),
    called("H100-SXM", "h100", "sxm 80gb hbm3"),
    called("H200-SXM", "h200", "sxm 141gb hbm3e"),
    called("B200", "b200", "sxm 180gb 192gb hbm3e"),
)
MAKER = frozenset({"nvidia", "geforce", "tesla", "gpu", "graphics", "card", "tensor", "core", "tm", "r"})
"""Words that say nothing."""
SLICE = re.compile(r"\d+g\.\d+gb(\.\w+)?|mig")
OTHERS = {
    "laptop": "a laptop's GPU", "mobile": "a laptop's GPU", "max": "a Max-Q variant", "d": "the D variant",
    "nvl": "the NVL form", "super": "the SUPER variant", "pcie": "the PCIe card", "dgxs": "the DGX Station's",
}  # fmt: skip


def gpu_called(text: str) -> str:
    """The catalogue's name of what is called ``text``; ConfigError names the word that makes it another GPU."""
    for entry in gpus():
        if entry.name.lower() == text.strip().lower():
            return entry.name
    found = match(text, NAMES)
    if found is None:
        raise ConfigError(f"gpu: {did_you_mean(text, [entry.name for entry in gpus()])}")
    return found


def match(text: str, names: Sequence[Called]) -> str | None:
    """The first of ``names`` whose words explain the text; None if none comes near. ConfigError for a variant."""
    said = words(text)
    sliced = next((word for word in said if SLICE.fullmatch(word)), None)
    if sliced is not None:
        raise ConfigError(
            f"gpu: {text!r} is a slice of a GPU ({sliced}), with a part of its memory and rates; not known"
        )
    near = [known for known in names if known.must <= set(said)]
    for known in near:
        if not _left(said, known):
            return known.name
    if not near:
        return None
    word = _left(said, near[0])[0]
    what = OTHERS.get(word, f"{word!r} in its name")
    raise ConfigError(f"gpu: {text!r} is not the {near[0].name}: {what} makes it another GPU, which is not known")


def words(text: str) -> list[str]:
    """The words of a name in lower case; form factors and memory sizes in one spelling each."""
    found = []
    for word in re.split(r"[-_\s/(),]+", text.lower()):
        form = re.fullmatch(r"(sxm|pcie|pci)\d?|(\d+)(?:g|gb|gib)", word)
        found.append(word if form is None else f"{form[2]}gb" if form[2] else "pcie" if form[1] != "sxm" else "sxm")
    return [word for word in found if word]


def _left(said: Iterable[str], known: Called) -> list[str]:
    """Words that are not accounted for."""
    return [word for word in said if word not in known.must | known.may | MAKER]
