"""Several models of one shape on the same GPUs: a batch is of one of them."""

from __future__ import annotations

from sim.batchers.common import make_room, prompt_limit, refuse_groups, refuse_if_full
from sim.policy import Batch, Limits, RequestView


class OneModel:
    """Whole prompts of the model of whoever waits first; else the decodes of one model, the models in turn.

    AlpaServe (OSDI 2023, section 4) serves single-shot requests one by one: ``batch`` 1 keeps one request in each
    batch, which runs to its end before the next prompt; None batches as many as fit (ours: prompts first, as
    engines of its time). Without blocks the latest admitted starts over.
    """

    def __init__(self, batch: int | None = 1, watermark: float = 0.01) -> None:
        self.batch = batch
        self.watermark = watermark
        self._last: str | None = None

    def fill(self, batch: Batch) -> None:
        make_room(batch)
        if batch.preempted or not self._admit(batch):
            self._decode(batch)

    def _admit(self, batch: Batch) -> int:
        """How many prompts were let in, all of one model."""
        if self.batch is not None and batch.num_decodes:
            return 0  # whose turn it is runs to its end
        admitted, klass, budget = 0, None, prompt_limit(batch.limits)
        for request in batch.waiting:
            tokens = batch.tokens_wanted(request)
            full = admitted == self.batch or batch.num_running >= batch.limits.max_num_seqs
            if full or (admitted and (request.klass != klass or tokens > budget)):
                break
            if not batch.admit(request, tokens, keep_free_blocks=int(self.watermark * batch.total_blocks)):
                break
            admitted, klass, budget = admitted + 1, request.klass, budget - tokens
        return admitted

    def _decode(self, batch: Batch) -> None:
        decoding = batch.decoding
        if not decoding:
            return
        if self.batch is not None:
            going = decoding[: self.batch]
        else:
            models = list(dict.fromkeys(request.klass for request in decoding))
            after = models.index(self._last) + 1 if self._last in models else 0
            self._last = models[after % len(models)]
            going = [request for request in decoding if request.klass == self._last]
        if len(going) < len(decoding):
            batch.repeat_at_most(1)
        chosen = {request.id for request in going}
        batch.decode(leave_out=[request for request in decoding if request.id not in chosen])

    def refuse(self, request: RequestView, total_tokens: int, total_blocks: int, limits: Limits) -> str | None:
        keep = int(self.watermark * total_blocks)
        return refuse_groups(request) or refuse_if_full(total_tokens, total_blocks, keep, limits)
