"""How fast the device is just now: fixed matrix products of the model, timed between steps.

Shared machines, and GPUs at their power limit, change their pace within minutes, which no profile foretells. Two
executions are compared fairly when it is known how much of their difference that is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from calibrate.execute.model.decoder import Decoder

EVERY_S = 1.0
"""Between two readings: they take a hundredth of the time or less."""
MATRICES = 16
ROWS_CPU, ROWS_GPU = 32, 1024
"""Of the other factor, so that a reading takes some milliseconds on a core, about one on a GPU."""
HELD_UP = 2.0


class Pace:
    """Times the projections of a decoder's first layers, now and then."""

    def __init__(self, decoder: Decoder) -> None:
        self._matrices = [layer.qkv for layer in decoder.weights.layers[:MATRICES]]
        self._cuda = decoder.device.startswith("cuda")
        rows = ROWS_GPU if self._cuda else ROWS_CPU
        self._rows = torch.ones(rows, decoder.arch.hidden_size, dtype=decoder.arch.torch_dtype, device=decoder.device)
        self.at_once()  # loads kernels

    def read(self) -> float | None:
        """As ``at_once``; None if the last reading was less than ``EVERY_S`` ago."""
        return None if time.perf_counter() - self._read_s < EVERY_S else self.at_once()

    @torch.inference_mode()
    def at_once(self) -> float:
        """Seconds of a product, the mean of several."""
        self._wait()
        started_s = time.perf_counter()
        for matrix in self._matrices:
            functional.linear(self._rows, matrix)
        self._wait()
        self._read_s = time.perf_counter()
        return (self._read_s - started_s) / len(self._matrices)

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._rows.device)


def mean_s(readings: Sequence[float]) -> float | None:
    """Of the readings that nothing held up for twice the median; None without any."""
    if not readings:
        return None
    values = np.array(readings)
    return float(values[values <= HELD_UP * np.median(values)].mean())
