"""Messages between processes: a JSON header and raw tensors over a socket. Nothing is unpickled."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.uint8)}
_PART_BYTES = 1 << 18
_LONGEST_HEADER_BYTES = 1 << 28

Message = tuple[dict[str, Any], list[Tensor]]


class Paced:
    """At most so many bytes a second: the sender sleeps before each part until the link would have carried it."""

    def __init__(self, bytes_per_s: float | None, latency_s: float = 0.0) -> None:
        self._bytes_per_s = bytes_per_s
        self._at_s = time.perf_counter() + latency_s

    def carry(self, size_bytes: int) -> None:
        if self._bytes_per_s is not None:
            self._at_s += size_bytes / self._bytes_per_s
        time.sleep(max(0.0, self._at_s - time.perf_counter()))


def send(to: socket.socket, header: dict[str, Any], parts: Sequence[Tensor] = (), pace: Paced | None = None) -> int:
    """One message; returns the bytes of its tensors. The socket must not be shared with another sender."""
    described = header | {"parts": [[str(part.dtype), list(part.shape)] for part in parts]}
    text = json.dumps(described).encode()
    to.sendall(struct.pack("<I", len(text)) + text)
    total = 0
    for part in parts:
        raw = part.contiguous().flatten().view(torch.uint8).numpy().data
        for start in range(0, len(raw), _PART_BYTES):
            piece = raw[start : start + _PART_BYTES]
            if pace is not None:
                pace.carry(len(piece))
            to.sendall(piece)
        total += len(raw)
    return total


def receive(source: socket.socket) -> Message:
    """The next message. ``EOFError`` when the other end is gone, ``ValueError`` when it is not one of ours."""
    (length,) = struct.unpack("<I", _exactly(source, 4))
    if length > _LONGEST_HEADER_BYTES:
        raise ValueError(f"a message header of {length} bytes")
    header = json.loads(_exactly(source, length))
    parts = []
    for name, shape in header.pop("parts"):
        dtype = _DTYPES[name]
        raw = _exactly(source, prod(shape) * dtype.itemsize)
        parts.append(torch.frombuffer(raw, dtype=dtype).view(shape) if raw else torch.empty(shape, dtype=dtype))
    return header, parts


def _exactly(source: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    at = 0
    while at < count:
        got = source.recv_into(view[at:])
        if not got:
            raise EOFError("the other process is gone")
        at += got
    return data
