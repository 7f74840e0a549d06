"""Transfers: in which parts, and how early, a prompt's KV goes to the replica that decodes.

``chunks`` must describe all of the KV; the engine decides when bytes really flow.
"""

from __future__ import annotations

from sim.policy import View
from sim.types import Chunk, Move

WHOLE = (Chunk(1.0, 1.0),)
"""One part, ready at the end."""


class Whole:
    """All at once, when the prompt is done. ``sync_s`` passes after the last byte."""

    def __init__(self, pull: bool = False, sync_s: float = 0.0) -> None:
        self.pull = pull
        self.sync_s = sync_s

    def chunks(self, move: Move, view: View) -> tuple[Chunk, ...]:
        return WHOLE

    def overhead_s(self, move: Move) -> float:
        return self.sync_s


class LayerByLayer:
    """Each layer's KV leaves when the layer is computed; only the last layer is sent after the prompt is done.

    The first L-1 layers go as one part from 1/L of the step on, so that X/L, or X less what could flow during the
    step, stays visible (X: time to send everything), plus ``sync_s``.
    """

    def __init__(self, sync_s: float = 0.0) -> None:
        self.pull = False
        self.sync_s = sync_s

    def chunks(self, move: Move, view: View) -> tuple[Chunk, ...]:
        layers = move.num_layers
        if layers == 1:
            return WHOLE
        return Chunk((layers - 1) / layers, 1 / layers), Chunk(1 / layers, 1.0)

    def overhead_s(self, move: Move) -> float:
        return self.sync_s


class ByLength:
    """Short prompts at once, prompts of ``threshold_tokens`` or more layer by layer."""

    def __init__(self, threshold_tokens: int, sync_s: float = 0.0) -> None:
        self.pull = False
        self.threshold_tokens = threshold_tokens
        self._short, self._long = Whole(sync_s=sync_s), LayerByLayer(sync_s)

    def chunks(self, move: Move, view: View) -> tuple[Chunk, ...]:
        return self._of(move).chunks(move, view)

    def overhead_s(self, move: Move) -> float:
        return self._of(move).overhead_s(move)

    def _of(self, move: Move) -> Whole | LayerByLayer:
        return self._short if move.tokens < self.threshold_tokens else self._long
