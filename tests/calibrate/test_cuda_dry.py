"""The code's CUDA paths where there is no CUDA: devices of operands, captures, and what is read when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from calibrate import kernels  # noqa: E402
from calibrate.bench.device import target  # noqa: E402
from calibrate.bench.family import Measurement, points  # noqa: E402
from calibrate.bench.shapes import Limits, Shard  # noqa: E402
from calibrate.bench.timer import measurer  # noqa: E402
from calibrate.execute.model.architecture import Architecture  # noqa: E402
from calibrate.execute.model.stage import Item, Stage, generate  # noqa: E402
from calibrate.execute.pace import Pace  # noqa: E402
from calibrate.measure import _families  # noqa: E402
from sim.model import ModelSpec  # noqa: E402
from tests.pretend_cuda import PretendCuda, pretend_cuda  # noqa: E402

torch.set_num_threads(1)

DENSE = Architecture(
    name="small", num_layers=2, hidden_size=64, intermediate_size=64, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=97, dtype="float32",
)  # fmt: skip
NORMED = replace(DENSE, qk_norm=True, qkv_bias=True, tied=True)
EXPERTS = replace(DENSE, num_experts=4, experts_per_token=2)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCuda]:
    with pretend_cuda(monkeypatch) as found:
        yield found


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 97, tokens).tolist()


def new_stage(arch: Architecture, device: str) -> Stage:
    return Stage(arch, blocks=60, block_size=4, device=device, seed=2)


def test_operands_of_two_devices_are_an_error(gpu: PretendCuda) -> None:
    ours = torch.ones(2, device="cuda")
    assert ours.is_cuda
    assert not torch.ones(2).is_cuda
    with pytest.raises(AssertionError, match="operands on the GPU and on the CPU"):
        ours + torch.ones(2)


@pytest.mark.parametrize("arch", [DENSE, NORMED, EXPERTS], ids=["dense", "normed", "experts"])
def test_graphs_give_the_tokens_of_the_cpu(arch: Architecture, gpu: PretendCuda) -> None:
    """Captured once per bucket, replayed for each decode; experts in float32 wait for the device, so have no graph."""
    expected = generate(new_stage(arch, "cpu"), prompt(11), 12)
    stage = new_stage(arch, "cuda")
    gpu.said.clear()
    assert generate(stage, prompt(11), 12) == expected
    assert gpu.said.count("replay") == (0 if arch is EXPERTS else 11)
    assert gpu.said.count("capture") == (0 if arch is EXPERTS else 2)  # 12 to 16 tokens in 4 blocks, to 23 in 8
    if arch is not EXPERTS:
        assert gpu.said[-2:] == ["replay", "wait"]  # the tokens are read after the replay


def test_chunks_beside_decodes_give_the_tokens_of_the_cpu(gpu: PretendCuda) -> None:
    found = []
    for device in ("cpu", "cuda"):
        stage = new_stage(DENSE, device)
        first, _ = stage.run([Item(0, 0, tuple(prompt(9)), True), Item(1, 0, tuple(prompt(5)), False)])
        later = [Item(0, 9, (first[0],), True), Item(1, 5, tuple(prompt(7, 1)), True)]
        found.append((first, stage.run(later)[0]))
    assert found[0] == found[1]


@pytest.mark.parametrize("bits", [4, 16])
def test_kv_leaves_and_arrives_by_the_host(bits: int, gpu: PretendCuda) -> None:
    source, target = (new_stage(DENSE, "cuda") for _ in range(2))
    source.run([Item(0, 0, tuple(prompt(9)), True)])
    parts = source.take_out(0, 0, 2, bits=bits)
    assert not any(part.is_cuda for part in parts)
    target.put_in(0, 9, 0, 2, parts)
    assert target.run([Item(0, 9, (5,), True)])[0].keys() == {0}
    source.swap_out([0])
    source.swap_in([0])
    assert source.tables.length(0) == 9


def test_a_later_stage_of_a_pipeline_has_graphs_over_hidden_states(gpu: PretendCuda) -> None:
    tokens = prompt(6)
    (expected,) = (generate(new_stage(DENSE, "cpu"), tokens, 3),)
    front, back = (
        Stage(DENSE, first=first, end=first + 1, blocks=60, block_size=4, device="cuda", seed=2) for first in (0, 1)
    )
    found: list[int] = []
    for position, given in ((0, tokens), (6, None), (7, None)):
        item = Item(0, position, tuple(given or found[-1:]), True)
        found.append(back.run([item], front.run([item])[1])[0][0])
    assert found == expected
    assert gpu.said.count("replay") == 4


def test_the_pace_is_read_when_the_device_is_done(gpu: PretendCuda) -> None:
    own = Pace(new_stage(DENSE, "cuda").decoder)
    gpu.said.clear()
    own._read_s = 0.0
    assert own.read() is not None
    assert gpu.said == ["wait", "wait"]


def test_where_attention_reads_in_place_all_graphs_are_captured_at_the_start(
    gpu: PretendCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each power of two of sequences; they serve every context."""
    expected = generate(new_stage(DENSE, "cpu"), prompt(11), 40)
    monkeypatch.setattr(kernels, "_triton_runs", lambda _: True)
    monkeypatch.setattr(kernels, "decode_attention", kernels._decode_together)
    stage = new_stage(DENSE, "cuda")
    assert gpu.said.count("capture") == 9
    gpu.said.clear()
    assert generate(stage, prompt(11), 40) == expected
    assert (gpu.said.count("capture"), gpu.said.count("replay")) == (0, 39)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("experts", [False, True])
def test_every_operator_of_a_calibration_is_captured_and_timed(
    dtype: str, experts: bool, gpu: PretendCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the ends of each grid. Those that wait for the device run without a graph, or in the processor's time."""
    monkeypatch.setattr("calibrate.bench.timer.MOST_REPEATS", 3)
    fields = {
        "model_type": "qwen3_moe" if experts else "qwen3", "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97,
        "max_position_embeddings": 512, "dtype": dtype,
    } | ({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32} if experts else {})  # fmt: skip
    here = target("cuda")
    shard = Shard(spec=ModelSpec.from_config(fields, name="small"), tp=1)
    monkeypatch.setattr(kernels, "grouped_gemms", lambda _: False)  # its CPU form loops
    timed: dict[str, Measurement] = {}
    with _families([shard], here, Limits(tokens=64, sequences=64, context_tokens=64)) as families:
        for family in families:
            at = list(points(family.axes))
            for part in family.parts:
                for point in (at[0], at[-1]) if at else ():
                    timed[part.operator] = measurer(here, 0.01)(part, point)
    assert {"step", "attention_decode", "kv_quantise", "copy_h2d", "launch_graph", "sampler"} <= timed.keys()
    assert all(found.seconds and found.skipped is None for found in timed.values())
    assert gpu.said.count("replay") > len(timed)
