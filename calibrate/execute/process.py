"""A worker process: one stage of one replica. Started by ``fleet.py``; lives no longer than the socket to it.

The main thread computes. A thread reads what the coordinator says (and frees KV at once), one per peer takes in hidden
states or KV, one sends KV (at the link's pace, without holding up the steps), one says that the process is alive.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from calibrate.execute.architecture import Architecture
from calibrate.execute.stage import Item, Stage
from calibrate.execute.wire import Message, Paced, receive, send
from sim.types import ConfigError

ALIVE_EVERY_S = 0.5
TOKEN = "PHASEWISE_WORKER_TOKEN"
"""Environment variable with the word that processes of one run know each other by."""


class Worker:
    """Serves one coordinator until it says stop, or is gone."""

    def __init__(self, home: socket.socket, token: str, config: dict[str, Any]) -> None:
        self._home = home
        self._token = token
        self._speaking = threading.Lock()
        self._orders: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._hidden: SimpleQueue[Message] = SimpleQueue()
        self._leaving: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._room: dict[tuple[int, int], threading.Event] = {}  # for KV, by order and first layer
        self._next: socket.socket | None = None
        self._device = config["device"]
        if config["core"] is not None:
            os.sched_setaffinity(0, {config["core"]})
        torch.set_num_threads(1)
        self._stage = Stage(
            Architecture.from_json(config["architecture"]),
            **{name: config[name] for name in ("first", "end", "blocks", "block_size", "device", "seed", "folder")},
        )
        self._door = socket.create_server(("127.0.0.1", 0))

    def serve(self) -> None:
        threading.excepthook = lambda fault: self._end(fault.exc_value)
        for loop in (self._listen_home, self._listen_peers, self._send_kv, self._be_alive):
            threading.Thread(target=loop, daemon=True).start()
        self._say({"is": "ready", "port": self._door.getsockname()[1]})
        while True:
            header = self._orders.get()
            if header["do"] == "stop":
                return
            try:
                if header["do"] == "join":
                    self._next = self._connect(header["port"], "hidden")
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
        if out is not None:
            assert self._next is not None, "a stage without a head hands on"
            send(self._next, {"number": header["number"]}, [out.cpu()])
        self._say({"is": "stepped", "number": header["number"], "seconds": took_s, "tokens": list(tokens.items())})

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
                self._room_for(header).set()
            elif header["do"] == "send":
                self._leaving.put(header)
            else:
                self._orders.put(header)

    def _room_for(self, header: dict[str, Any]) -> threading.Event:
        """Set when the blocks for that KV are free: KV and the word of it come by different ways."""
        return self._room.setdefault((header["number"], header["first"]), threading.Event())

    def _listen_peers(self) -> None:
        while True:
            peer, _ = self._door.accept()
            threading.Thread(target=self._listen_peer, args=(peer,), daemon=True).start()

    def _listen_peer(self, peer: socket.socket) -> None:
        greeting = _message(peer)
        while greeting is not None and greeting[0].get("token") == self._token:
            message = _message(peer)
            if message is None:
                break
            if greeting[0]["kind"] == "hidden":
                self._hidden.put(message)
            else:
                self._take_in(*message)
        peer.close()

    def _take_in(self, header: dict[str, Any], parts: list[Tensor]) -> None:
        self._room_for(header).wait()
        self._stage.put_in(header["sequence"], header["tokens"], header["first"], header["end"], parts)
        del self._room[header["number"], header["first"]]
        self._say({"is": "landed", "number": header["number"], "bytes": sum(part.nbytes for part in parts)})

    def _send_kv(self) -> None:
        peers: dict[int, socket.socket] = {}
        names = ("number", "sequence", "tokens", "first", "end")
        while True:
            header = self._leaving.get()
            port = header["port"]
            parts = self._stage.take_out(header["sequence"], header["first"], header["end"], bits=header["bits"])
            if port not in peers:
                peers[port] = self._connect(port, "kv")
            pace = Paced(header["bytes_per_s"], header["latency_s"])
            send(peers[port], {name: header[name] for name in names}, parts, pace)

    def _be_alive(self) -> None:
        while True:
            self._say({"is": "alive"})
            time.sleep(ALIVE_EVERY_S)

    # ------------------------------------------------------------ inside

    def _connect(self, port: int, kind: str) -> socket.socket:
        peer = socket.create_connection(("127.0.0.1", port), timeout=10)
        peer.settimeout(None)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        send(peer, {"token": self._token, "kind": kind})
        return peer

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


def _message(peer: socket.socket) -> Message | None:
    """The next one; None when the peer is gone or is none of ours."""
    try:
        return receive(peer)
    except (EOFError, OSError, ValueError):
        return None


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
        worker = Worker(home, token, config)
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
