"""How the workers of a run reach each other: sockets on the loopback, and torch's process groups."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, distributed

from calibrate.execute.workers.wire import Message, Paced, receive, send


class Peers:
    """A door for others, and sockets to theirs. Who does not know the run's word is not let in."""

    def __init__(self, token: str, take: Mapping[str, Callable[[Message], None]]) -> None:
        """``take``: what to do with a message, by kind; called in the thread of whoever sent it."""
        self._token = token
        self._take = take
        self._door = socket.create_server(("127.0.0.1", 0))
        self._out: dict[tuple[int, str], socket.socket] = {}

    @property
    def port(self) -> int:
        return int(self._door.getsockname()[1])

    def serve(self) -> None:
        while True:
            peer, _ = self._door.accept()
            threading.Thread(target=self._listen, args=(peer,), daemon=True).start()

    def send(
        self, port: int, kind: str, header: dict[str, Any], parts: Sequence[Tensor], pace: Paced | None = None
    ) -> None:
        """Messages of one kind come in order; they must be sent by one thread."""
        if (port, kind) not in self._out:
            peer = self._out[port, kind] = socket.create_connection(("127.0.0.1", port), timeout=10)
            peer.settimeout(None)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            send(peer, {"token": self._token, "kind": kind})
        send(self._out[port, kind], header, parts, pace)

    def _listen(self, peer: socket.socket) -> None:
        greeting = _message(peer)
        while greeting is not None and greeting[0].get("token") == self._token:
            message = _message(peer)
            if message is None:
                break
            self._take[greeting[0]["kind"]](message)
        peer.close()


def _message(peer: socket.socket) -> Message | None:
    """The next one; None when the peer is gone or is none of ours."""
    try:
        return receive(peer)
    except (EOFError, OSError, ValueError):
        return None


class Groups:
    """The process groups that this worker is in, by their members.

    All workers of the run must make this together, with the same ``world``: every worker, and every group of them, in
    the order of ranks. They meet by a file in the run's own temporary folder, and talk over the loopback.
    """

    def __init__(self, name: str, world: Mapping[str, Any]) -> None:
        loopback = next(found for _, found in socket.if_nameindex() if found.startswith("lo"))
        for library in ("GLOO", "NCCL"):
            os.environ[f"{library}_SOCKET_IFNAME"] = loopback
        self.name = name
        self._ranks = {member: rank for rank, member in enumerate(world["workers"])}
        distributed.init_process_group(
            "gloo", init_method=f"file://{world['store']}", rank=self._ranks[name], world_size=len(self._ranks)
        )
        every = {
            tuple(members): distributed.new_group([self._ranks[member] for member in members], backend=world["backend"])
            for members in world["groups"]
        }
        self._groups = {members: group for members, group in every.items() if name in members}

    def of(self, *members: str) -> distributed.ProcessGroup | None:
        """The group of these workers, if there is one."""
        return self._groups.get(members)

    def rank(self, member: str) -> int:
        """Of a worker in the whole run, as ``torch.distributed.send`` wants it."""
        return self._ranks[member]
