"""The trace formats: for each, where a request's fields stand in a line. All differences are data.

``FORMATS`` maps a name to a function from the format's options to a ``Format``. Adding one is a function
of a few lines and an entry in that dict; reading, checking and guessing (``traces.guess``) need no change.
"""

from __future__ import annotations

from collections.abc import Callable

from traces.formats.base import Format
from traces.formats.columns import columns
from traces.formats.conversations import sharegpt, vllm_custom
from traces.formats.schedules import aiperf, bailian, guidellm, mooncake
from traces.formats.tables import azure, burstgpt, llmservingsim, phasewise, splitwise_sim, vidur, vidur_lengths

FORMATS: dict[str, Callable[..., Format]] = {
    "phasewise": phasewise,
    "azure": azure,
    "mooncake": mooncake,
    "bailian": bailian,
    "aiperf": aiperf,
    "guidellm": guidellm,
    "burstgpt": burstgpt,
    "splitwise-sim": splitwise_sim,
    "vidur": vidur,
    "vidur-lengths": vidur_lengths,
    "llmservingsim": llmservingsim,
    "sharegpt": sharegpt,
    "vllm-custom": vllm_custom,
    "columns": columns,
}

__all__ = ["FORMATS", "Format"]
