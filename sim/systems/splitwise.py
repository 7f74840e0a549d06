"""Splitwise (ISCA 2024; arXiv 2311.18677v2): prompt, token and mixed pools under a cluster-level scheduler."""

from __future__ import annotations

from typing import Literal

from sim.batchers import PausingMixed
from sim.planners.pools import Pool, Split
from sim.policy import Limits, ReplicaView, RequestView, System, Transfer, View
from sim.reschedulers import RestorePlan
from sim.systems.layout import PoolOption
from sim.transfers import ByLength, LayerByLayer, Whole
from sim.types import ConfigError, Reject, Route

SERIAL_BELOW_TOKENS = 512
"""Section 4.3: shorter prompts are sent at once on H100, longer ones layer by layer."""
SYNC_S = 0.005
"""What stays visible of a layer-by-layer transfer on H100 (figure 14: about 5 ms; 8 ms on A100)."""


class ThreePools:
    """The cluster-level scheduler, section 4.1: a (prompt, token) pair of machines per request, on arrival.

    Join the shortest queue by pending tokens among prompt machines, by reserved KV among token machines; a machine
    that would be over its limit is refused, then the mixed pool is tried, then a machine of the opposite pool is
    drawn into the mixed pool. It returns home as soon as it has no work of the opposite kind. Both phases run on
    one machine only if no pair can be found. Reserves KV for the *predicted* output.
    """

    def __init__(self, queue_limit_tokens: int) -> None:
        self.queue_limit_tokens = queue_limit_tokens
        self._reserved: dict[str, int] = {}  # KV tokens promised per machine
        self._decoding: dict[str, int] = {}  # requests assigned for decode per machine
        self._mixed: dict[str, None] = {}
        self._kept: dict[int, tuple[str, int]] = {}

    def route(self, request: RequestView, view: View) -> Route | Reject:
        if not view.replicas:
            return Reject("no replica is up")
        self._send_home(view)
        tokens = request.input_tokens + 1 + request.predicted_output_tokens
        prompt = self._prompt_machine(request, view)
        token = self._token_machine(tokens, view)
        if prompt is None or token is None:
            prompt = token = min(view.replicas, key=self._pending_tokens)
        self._decoding[token.name] = self._decoding.get(token.name, 0) + 1
        self._reserved[token.name] = self._reserved.get(token.name, 0) + tokens
        self._kept[request.id] = (token.name, tokens)
        return Route(prompt.leg, token.leg)

    def finished(self, request: RequestView) -> None:
        name, tokens = self._kept.pop(request.id)
        self._decoding[name] -= 1
        self._reserved[name] -= tokens

    # ------------------------------------------------------------ pools

    def _pool(self, view: View, role: str) -> list[ReplicaView]:
        return [replica for replica in view.replicas if replica.role == role and replica.name not in self._mixed]

    def _mixed_pool(self, view: View) -> list[ReplicaView]:
        return [replica for replica in view.replicas if replica.role == "mixed" or replica.name in self._mixed]

    def _send_home(self, view: View) -> None:
        """Mixed machines with no work of the opposite kind left go back to their own pool."""
        for replica in self._mixed_pool(view) if self._mixed else ():
            if replica.role == "prefill" and not self._decoding.get(replica.name, 0):
                self._mixed.pop(replica.name, None)
            if replica.role == "decode" and not replica.num_prefilling:
                self._mixed.pop(replica.name, None)

    def _pending_tokens(self, replica: ReplicaView) -> int:
        return replica.pending_prefill_tokens + self._decoding.get(replica.name, 0)

    def _free_tokens(self, replica: ReplicaView) -> int:
        """KV tokens not promised to anybody; the prompts queued there will need theirs too."""
        capacity = replica.total_blocks * replica.block_size
        return capacity - self._reserved.get(replica.name, 0) - replica.pending_prefill_tokens

    def _prompt_machine(self, request: RequestView, view: View) -> ReplicaView | None:
        for pool in (self._pool(view, "prefill"), self._mixed_pool(view)):
            if pool:
                best = min(pool, key=self._pending_tokens)
                pending = self._pending_tokens(best)
                if not pending or pending + request.input_tokens <= self.queue_limit_tokens:
                    return best
        drawn = self._pool(view, "decode")
        return self._draw(min(drawn, key=self._pending_tokens)) if drawn else None

    def _token_machine(self, tokens: int, view: View) -> ReplicaView | None:
        for pool in (self._pool(view, "decode"), self._mixed_pool(view)):
            if pool:
                best = max(pool, key=self._free_tokens)
                if tokens < self._free_tokens(best):
                    return best
        drawn = self._pool(view, "prefill")
        return self._draw(max(drawn, key=self._free_tokens)) if drawn else None

    def _draw(self, replica: ReplicaView) -> ReplicaView:
        self._mixed[replica.name] = None
        return replica


def splitwise(
    transfer: Literal["auto", "serial", "per-layer"] = "auto",
    prompt_queue_tokens: int = 8192,
    max_pauses: int = 4,
    prefill: PoolOption = None,
    decode: PoolOption = None,
) -> System:
    """Splitwise: prompt and token machines paired per request, a mixed pool between them, KV sent layer by layer.

    ``transfer``: serial, per-layer, or auto (serial for prompts under 512 tokens). A machine refuses prompts once
    ``prompt_queue_tokens`` are pending; a decode is paused for prompts at most ``max_pauses`` times.
    """
    transfers: dict[str, Transfer] = {
        "auto": ByLength(SERIAL_BELOW_TOKENS, SYNC_S),
        "serial": Whole(sync_s=SYNC_S),
        "per-layer": LayerByLayer(SYNC_S),
    }
    if transfer not in transfers:
        raise ConfigError(f"system.transfer is {transfer!r}; splitwise has {', '.join(transfers)}")
    return System(
        name="splitwise",
        mirrors="Splitwise (ISCA 2024) and splitwise-sim, without the latter's defects",
        planner=Split(prefill=Pool.of(prefill, "prefill"), decode=Pool.of(decode, "decode")),
        router=lambda: ThreePools(prompt_queue_tokens),
        batcher=lambda role: PausingMixed(max_pauses),
        transfer=lambda: transfers[transfer],
        rescheduler=RestorePlan,
        limits=Limits(max_num_seqs=512, max_num_batched_tokens=2048),
    )
