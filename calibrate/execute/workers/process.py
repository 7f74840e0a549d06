"""A worker process: one rank of a replica's stage. Started by ``fleet.py``; lives no longer than the socket to it.

The main thread computes. A thread reads what the coordinator says (and frees or swaps KV at once), one per peer takes
in hidden states or KV, one sends KV (without holding up the steps), one says that the process is alive. The ranks of
a stage get the same orders, and meet in the sums of each step.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from calibrate.execute.model.architecture import Architecture
from calibrate.execute.model.shard import Ranks, Shard
from calibrate.execute.model.stage import Item, Stage
from calibrate.execute.pace import Pace
from calibrate.execute.workers.carriers import ByGroup, BySocket, Carrier
from calibrate.execute.workers.peers import Groups, Peers
from calibrate.execute.workers.wire import Message, receive, send
from sim.types import ConfigError

ALIVE_EVERY_S = 0.5
TOKEN = "PHASEWISE_WORKER_TOKEN"
"""Environment variable with the word that processes of one run know each other by."""


class Worker:
    """Serves one coordinator until it says stop, or is gone."""

    def __init__(self, home: socket.socket, token: str, name: str, config: dict[str, Any]) -> None:
        self._home = home
        self._speaking = threading.Lock()
        self._orders: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._hidden: SimpleQueue[Message] = SimpleQueue()
        self._leaving: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._next: list[int] = []  # ports of those that get our hidden states
        self._device = config["device"]
        if config["core"] is not None:
            os.sched_setaffinity(0, {config["core"]})
        torch.set_num_threads(1)
        if self._device.startswith("cuda"):
            torch.cuda.set_device(self._device)
        groups = Groups(name, config["world"]) if config["world"] is not None else None
        ranks = config["ranks"]
        group = groups.of(*ranks) if groups is not None and len(ranks) > 1 else None
        self._stage = Stage(
            Architecture.from_json(config["architecture"]),
            ranks=Ranks(Shard(config["rank"], len(ranks)), group),
            **{key: config[key] for key in ("first", "end", "blocks", "block_size", "device", "seed", "folder")},
        )
        self._pace = Pace(self._stage.decoder) if config["paced"] else None
        self._reference_s: float | None = None
        self._peers = Peers(token, {"hidden": self._hidden.put, "kv": lambda message: self._by_socket.take(message)})
        self._by_socket = BySocket(self._stage, self._peers, self._land)
        self._by_group = ByGroup(self._stage, groups, self._land) if groups is not None else None

    def serve(self) -> None:
        threading.excepthook = lambda fault: self._end(fault.exc_value)
        for loop in (self._listen_home, self._peers.serve, self._send_kv, self._be_alive):
            threading.Thread(target=loop, daemon=True).start()
        self._say({"is": "ready", "port": self._peers.port})
        while True:
            header = self._orders.get()
            if header["do"] == "stop":
                return
            try:
                if header["do"] == "join":
                    self._next = header["ports"]
                else:
                    self._step(header)
            except Exception as error:
                self._end(error)

    # ------------------------------------------------------------ steps

    def _step(self, header: dict[str, Any]) -> None:
        items = [Item(sequence, at, tuple(tokens), wants) for sequence, at, tokens, wants in header["items"]]
        hidden = self._hidden_of(header["number"]) if self._stage.first else None
        started_s = time.perf_counter()
        tokens, out = self._stage.run(items, hidden)
        if self._device.startswith("cuda"):
            torch.cuda.synchronize(self._device)
        took_s = time.perf_counter() - started_s
        if out is not None and self._next:
            on_host = out.cpu()
            for port in self._next:
                self._peers.send(port, "hidden", {"number": header["number"]}, [on_host])
        said = {"is": "stepped", "number": header["number"], "seconds": took_s, "tokens": list(tokens.items())}
        self._say(said | {"reference_s": self._reference_s})
        self._reference_s = self._pace.read() if self._pace is not None else None

    def _hidden_of(self, number: int) -> Tensor:
        header, (hidden,) = self._hidden.get()
        assert header["number"] == number, "steps pass the stages in order"
        return hidden.to(self._device)

    # ------------------------------------------------------------ threads

    def _listen_home(self) -> None:
        while True:
            try:
                header, _ = receive(self._home)
            except (EOFError, OSError):
                os._exit(1)  # nobody is left to work for
            self._stage.release(header.get("free", ()))
            if header["do"] == "expect":
                self._carrier(header).expect(header)
            elif header["do"] == "send":
                self._leaving.put(header)
            elif header["do"] == "swap":  # no step under way has these
                self._stage.swap_out(header["out"])
                self._stage.swap_in(header["in"])
            else:
                self._orders.put(header)

    def _send_kv(self) -> None:
        while True:
            order = self._leaving.get()
            self._carrier(order).send(order)

    def _carrier(self, order: dict[str, Any]) -> Carrier:
        by_group = self._by_group
        return by_group if by_group is not None and by_group.knows(order) else self._by_socket

    def _land(self, order: dict[str, Any], parts: Sequence[Tensor]) -> None:
        self._stage.put_in(
            order["sequence"], order["tokens"], order["first"], order["end"], parts, first_head=order["target_head"]
        )
        self._say({"is": "landed", "number": order["number"], "bytes": sum(part.nbytes for part in parts)})

    def _be_alive(self) -> None:
        while True:
            self._say({"is": "alive"})
            time.sleep(ALIVE_EVERY_S)

    # ------------------------------------------------------------ inside

    def _end(self, error: BaseException | None) -> None:
        """Whatever thread it was: tell the coordinator, and be gone."""
        self._say(_failure(error))
        os._exit(1)

    def _say(self, header: dict[str, Any]) -> None:
        try:
            with self._speaking:
                send(self._home, header)
        except OSError:
            os._exit(1)


def main(port: int, name: str) -> None:
    token = os.environ[TOKEN]
    try:
        home = socket.create_connection(("127.0.0.1", port), timeout=10)
        home.settimeout(None)
        home.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        send(home, {"token": token, "name": name})
        config, _ = receive(home)
    except (EOFError, OSError):
        return  # whoever started it has given up
    try:
        worker = Worker(home, token, name, config)
    except Exception as error:
        send(home, _failure(error))
        raise SystemExit(1) from None
    worker.serve()


def _failure(error: BaseException | None) -> dict[str, Any]:
    """What the coordinator is told of an exception."""
    text = str(error) if isinstance(error, ConfigError) else "".join(traceback.format_exception(error, limit=-3))
    return {"is": "failed", "kind": type(error).__name__, "text": text}


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
