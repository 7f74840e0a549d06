"""The sample trace shipped with the package: generated, so that examples and tests need no download.

It imitates the hour of conversations in Azure's 2023 trace (Splitwise, ISCA 2024): the marginal lengths, the
weak rank correlation between them, the mean rate and the burstiness. It does not imitate that the joint
distribution has clusters (prompts of about 1000 tokens get answers of about 400), nor that the rate drifts.

The numbers were measured on 22 November 2026 on AzureLLMInferenceTrace_conv.csv (19,366 requests) of
Azure/AzurePublicDataset, commit b469a11, CC-BY-4.0. The shipped file is
``write(sample_path(), make_sample())``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sim.types import Request
from traces.synthesis import Quantiles, generate

RATE_PER_S = 5.53
BURSTINESS = 1.094
RANK_CORRELATION = 0.073
SHARES = (
    0, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5,
    0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99, 0.999, 1,
)  # fmt: skip
INPUT_TOKENS = (
    2, 29, 120, 181, 207, 372, 387, 396, 403, 414, 703, 984, 1020,
    1071, 1097, 1130, 1189, 1315, 1876, 2734, 4083, 4092, 4142, 6179, 14050,
)  # fmt: skip
OUTPUT_TOKENS = (
    7, 16, 28, 41, 54, 67, 77, 85, 91, 96, 103, 113, 129,
    177, 217, 384, 395, 400, 411, 424, 451, 522, 601, 954, 1000,
)  # fmt: skip


def make_sample(count: int = 2500, seed: int = 2025) -> Iterator[Request]:
    """The requests of the sample; arrivals to the microsecond, as in the original.

    Of seven seeds tried, the default gives the means and medians nearest to the original's.
    """
    requests = generate(
        count,
        RATE_PER_S,
        input=Quantiles(points=tuple(zip(SHARES, INPUT_TOKENS, strict=True))),
        output=Quantiles(points=tuple(zip(SHARES, OUTPUT_TOKENS, strict=True))),
        arrivals="gamma",
        cv=BURSTINESS,
        rank_correlation=RANK_CORRELATION,
        seed=seed,
    )
    return (replace(request, arrival_s=round(request.arrival_s, 6)) for request in requests)


def sample_path() -> Path:
    """Where the shipped sample lies (format ``phasewise``)."""
    return Path(__file__).parent / "data" / "azure-conv-like.csv"
