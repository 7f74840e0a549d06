"""A CUDA device that is none: tensors stay on the CPU, but know where they would be, and so do streams and graphs.

What torch itself would refuse on a GPU is an error here: operands on two devices, a wait for the device or a copy from
the host within a capture, a capture of what never ran. A graph replays its operations into the same memory. (Torch's
FakeTensorMode cannot index a CUDA tensor where torch was built without CUDA.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._pytree import tree_flatten

GPU, HOST = torch.device("cuda:0"), torch.device("cpu")
WAITS = {"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__index__", "nonzero", "is_nonzero", "unique"}
MAKES = {"copy_", "to", "pin_memory"}
"""Functions that may have tensors of two devices."""


class PretendCuda(TorchFunctionMode):
    """``said``: captures, replays and waits, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.stream = "default"
        self.recording: list[Callable[[], None]] | None = None
        self.ran: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.__name__
        owner = getattr(func, "__self__", None)
        if name == "__get__" and owner is torch.Tensor.is_cuda:
            return _on_gpu(args[0])
        if name == "__get__" and owner is torch.Tensor.device:
            return GPU if _on_gpu(args[0]) else HOST
        tensors = _tensors((args, kwargs))
        gpu = any(map(_on_gpu, tensors))
        if name not in MAKES and gpu and not all(_on_gpu(one) or one.dim() == 0 for one in tensors):
            raise AssertionError(f"{name}: operands on the GPU and on the CPU")
        where, args, kwargs = _without_device(name, args, kwargs, GPU if gpu else HOST)
        moves = (bool(tensors) and (where == GPU) != gpu) or (name == "copy_" and len({*map(_on_gpu, tensors)}) == 2)
        if (gpu and name in WAITS) or moves:
            self.waits(f"{name} of {'a move' if moves else 'a wait'}")
        out = func(*args, **kwargs)
        if moves and isinstance(out, Tensor) and any(out is one for one in tensors) and name != "copy_":
            out = out.clone()  # a device has its own memory
        for leaf in _tensors(out):
            leaf._on_gpu = where == GPU and name not in WAITS  # type: ignore[attr-defined]
        if where == GPU and name != "__get__":
            self._note(func, name, args, kwargs, out)
        return out

    def waits(self, what: str) -> None:
        if self.recording is not None:
            raise AssertionError(f"{what} within a capture")
        self.said.append("wait")

    def _note(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        results = _tensors(out)
        if self.recording is None or not results:
            self.ran.add(name)
            return
        if name not in self.ran:
            raise AssertionError(f"{name} is captured, and never ran before")
        results = [leaf for leaf in tree_flatten(out)[0] if type(leaf) is Tensor]  # a causal bias has no memory

        def again() -> None:
            for target, value in zip(results, tree_flatten(func(*args, **kwargs))[0], strict=True):
                if target.data_ptr() != value.data_ptr():
                    target.copy_(value)

        self.recording.append(again)


def _tensors(tree: Any) -> list[Tensor]:
    """All but causal biases, which have no memory."""
    return [leaf for leaf in tree_flatten(tree)[0] if type(leaf) is Tensor]


def _on_gpu(tensor: Tensor) -> bool:
    return bool(getattr(tensor, "_on_gpu", False))


def _without_device(name: str, args: Any, kwargs: dict[str, Any], own: torch.device) -> tuple[torch.device, Any, Any]:
    """Where the result will be, and the call as it runs on the CPU."""
    where = own
    if kwargs.get("device") is not None:
        where, kwargs["device"] = torch.device(kwargs["device"]), HOST
    kwargs.pop("pin_memory", None)
    if name == "to" and len(args) > 1 and isinstance(args[1], str | torch.device):
        where, args = torch.device(args[1]), (args[0], HOST, *args[2:])
    if name == "cpu":
        where = HOST
    if "generator" in kwargs and kwargs["generator"] is None:
        del kwargs["generator"]
    return (GPU if where.type == "cuda" else HOST), args, kwargs


class Graph:
    def __init__(self, gpu: PretendCuda) -> None:
        self.gpu = gpu
        self.steps: list[Callable[[], None]] = []

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        assert self.gpu.recording is None
        self.gpu.said.append("replay")
        with _pop_mode_temporarily(), torch.inference_mode():
            for step in self.steps:
                step()


class Event:
    def __init__(self, gpu: PretendCuda) -> None:
        self.gpu, self.state = gpu, "new"

    def record(self) -> None:
        self.state = "recorded"

    def synchronize(self) -> None:
        assert self.state == "recorded"
        self.state = "reached"
        self.gpu.waits("an event")

    def elapsed_time(self, end: Event) -> float:
        assert (self.state, end.state) == ("recorded", "reached"), "times are read before the device is there"
        return 0.5


@contextmanager
def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCuda]:
    """One H100 of a few gigabytes, on which triton is not installed."""
    gpu = PretendCuda()

    @contextmanager
    def on_stream(stream: Any) -> Iterator[None]:
        before, gpu.stream = gpu.stream, stream.name
        yield
        gpu.stream = before

    @contextmanager
    def capture(graph: Graph, pool: Any = None, **_: Any) -> Iterator[None]:
        assert gpu.recording is None
        gpu.said.append("capture")
        gpu.recording = graph.steps
        try:
            yield
        finally:
            gpu.recording = None

    def new_stream(*_: Any) -> SimpleNamespace:
        return SimpleNamespace(name="side", wait_stream=lambda _: None, synchronize=lambda: gpu.waits("a stream"))

    properties = SimpleNamespace(
        L2_cache_size=1 << 16, name="NVIDIA H100 80GB HBM3", total_memory=80 << 30, multi_processor_count=132, uuid="0"
    )
    current = SimpleNamespace(name="default", wait_stream=lambda _: None)
    generator = torch.Generator
    fakes: dict[str, Any] = {
        "Stream": new_stream, "stream": on_stream, "current_stream": lambda: current,
        "CUDAGraph": lambda: Graph(gpu), "graph": capture, "Event": lambda enable_timing: Event(gpu),
        "synchronize": lambda *_: gpu.waits("the device"), "set_device": lambda _: None, "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (4 << 30, 80 << 30), "memory_reserved": lambda _: 0,
        "memory_allocated": lambda _: 0, "device_count": lambda: 1, "is_available": lambda: True,
        "get_device_capability": lambda _: (9, 0), "get_device_properties": lambda _: properties,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "Generator", lambda _="cpu": generator("cpu"))
    monkeypatch.setattr("calibrate.kernels._triton_runs", lambda _: False)
    with gpu:
        yield gpu
