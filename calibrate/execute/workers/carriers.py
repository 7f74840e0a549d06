"""How KV gets from one worker to another: through host memory and a socket, or from device to device by a group.

Either way the target is told first what comes (its blocks are free from then on), and says when it has landed. An
order is what the coordinator says of one part of a move, the same to both ends: see ``Wall.start``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Protocol

from torch import Tensor, distributed

from calibrate.execute.model.stage import Stage, own_stream
from calibrate.execute.workers.peers import Groups, Peers
from calibrate.execute.workers.wire import Message, Paced

Order = dict[str, Any]
Land = Callable[[Order, Sequence[Tensor]], None]


class Carrier(Protocol):
    """One way. ``send`` is called by one thread."""

    def send(self, order: Order) -> None:
        """Take the KV out of the stage and send it; returns when it has left."""

    def expect(self, order: Order) -> None:
        """KV will come: when it does, in another thread, put it into the stage."""


class BySocket:
    """Through the host's memory, at the pace of the order."""

    def __init__(self, stage: Stage, peers: Peers, land: Land) -> None:
        self._stage = stage
        self._peers = peers
        self._land = land
        self._expected: dict[tuple[int, int], SimpleQueue[Order]] = {}

    def send(self, order: Order) -> None:
        pace = Paced(order["bytes_per_s"], order["latency_s"])
        header = {"number": order["number"], "part": order["part"]}
        self._peers.send(order["port"], "kv", header, _take_out(self._stage, order, "cpu"), pace)

    def expect(self, order: Order) -> None:
        self._order_of(order).put(order)

    def take(self, message: Message) -> None:
        """KV has come; the word of it comes by another way, maybe later."""
        header, parts = message
        order = self._order_of(header).get()
        del self._expected[header["number"], header["part"]]
        self._land(order, parts)

    def _order_of(self, header: Order) -> SimpleQueue[Order]:
        return self._expected.setdefault((header["number"], header["part"]), SimpleQueue())


class ByGroup:
    """From device to device, by a process group of each ordered pair of workers, so that no two sends cross.

    A group carries what is sent in order, so that one thread for each source receives in the order of the orders.
    """

    def __init__(self, stage: Stage, groups: Groups, land: Land) -> None:
        self._stage = stage
        self._groups = groups
        self._land = land
        self._expected: dict[str, SimpleQueue[Order]] = {}

    def knows(self, order: Order) -> bool:
        """Whether the order's two ends have a group."""
        return self._groups.of(order["from"], order["to"]) is not None

    def send(self, order: Order) -> None:
        group = self._groups.of(order["from"], order["to"])
        parts = _take_out(self._stage, order, self._stage.decoder.device)
        with own_stream(self._stage.decoder.device):
            for part in parts:
                distributed.send(part, self._groups.rank(order["to"]), group=group)

    def expect(self, order: Order) -> None:
        source = order["from"]
        if source not in self._expected:
            self._expected[source] = SimpleQueue()
            threading.Thread(target=self._receive, args=(source,), daemon=True).start()
        self._expected[source].put(order)

    def _receive(self, source: str) -> None:
        group = self._groups.of(source, self._groups.name)
        while True:
            order = self._expected[source].get()
            with own_stream(self._stage.decoder.device):  # its memory too: a step's may still be written to
                parts = self._stage.room_for(
                    order["tokens"], order["first"], order["end"], heads=order["heads"], bits=order["bits"]
                )
                for part in parts:
                    distributed.recv(part, self._groups.rank(source), group=group)
            self._land(order, parts)


def _take_out(stage: Stage, order: Order, device: str) -> tuple[Tensor, ...]:
    heads = slice(order["source_head"], order["source_head"] + order["heads"])
    return stage.take_out(order["sequence"], order["first"], order["end"], heads=heads, bits=order["bits"], on=device)
