"""The router that looks where a request's prefix is cached."""

from __future__ import annotations

from collections import defaultdict, deque

from sim.policy import ReplicaView, RequestView, View
from sim.types import Reject, Route


class PrefixAware:
    """Where least has to be done for a request: prompt tokens to compute, those that wait included, and KV held.

    The form is that of NVIDIA Dynamo's KV router: ``overlap_weight`` x prefill blocks + blocks in use, both with the
    request; the least wins. Prefill blocks are those of the prompts under way less what each found in the replica's
    prefix cache when it was sent. The weight is ours: the compute of a prompt's block counts for far more than that
    decodes read a block (Dynamo's is 1 and meant to be raised for TTFT). In a split the decode replica is the one
    with fewest blocks in use and to come. ``index_age_s``: see ``matched_tokens``.
    """

    def __init__(self, overlap_weight: float = 20.0, index_age_s: float = 0.0) -> None:
        self.overlap_weight = overlap_weight
        self.index_age_s = index_age_s
        self._sent: dict[str, deque[int]] = defaultdict(deque)
        """By replica: prompt tokens that the latest requests had to have computed there."""

    def route(self, request: RequestView, view: View) -> Route | Reject:
        prefills, decodes = view.with_role("prefill", "mixed"), view.with_role("decode", "mixed")
        if not prefills or not decodes:
            return Reject(f"no {'prefill' if not prefills else 'decode'} replica is up")
        prefill = min(prefills, key=lambda one: self._cost(request, one))
        self._sent[prefill.name].append(self._missing(request, prefill))
        if prefill.role == "mixed":
            return Route(prefill.leg, prefill.leg)
        decode = min(decodes, key=lambda one: self._to_hold(request, one))
        return Route(prefill.leg, decode.leg)

    def finished(self, request: RequestView) -> None:
        pass

    def _missing(self, request: RequestView, replica: ReplicaView) -> int:
        return request.input_tokens - replica.matched_tokens(request, self.index_age_s)

    def _cost(self, request: RequestView, replica: ReplicaView) -> tuple[float, int]:
        sent = self._sent[replica.name]
        while len(sent) > replica.num_prefilling:
            sent.popleft()  # first come, first served: those that were sent last are not done
        tokens = self._missing(request, replica) + min(sum(sent), replica.pending_prefill_tokens)
        held = replica.total_blocks - replica.free_blocks
        load = self.overlap_weight * tokens / replica.block_size + held
        return load, replica.num_waiting + replica.num_running

    def _to_hold(self, request: RequestView, replica: ReplicaView) -> float:
        coming = replica.num_decoding - replica.num_running
        missing = self._missing(request, replica) / replica.block_size
        return missing * (1 + coming) + replica.total_blocks - replica.free_blocks
