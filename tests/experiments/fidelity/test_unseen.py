"""Real runs that no study knows: metadata to settings, requests to replay, and a table of errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from calibrate.profile.relatives import kernels_for
from experiments.fidelity import unseen
from experiments.fidelity.cases import kv_bound
from experiments.fidelity.metadata import read_facts
from experiments.fidelity.recorded import read_run
from sim.memory import UNSEEN_BYTES
from sim.types import ConfigError

SPARSE = {
    "model": "meta-llama/Llama-3.1-8B-Instruct",
    "device_name": "NVIDIA GeForce RTX 4090",
    "vllm_version": "0.19.0",
}


def write_run(folder: Path, meta: Mapping[str, Any], count: int = 6, input_toks: int = 200) -> Path:
    """``count`` requests, one a second, of 11 tokens each; measured: TTFT 0.1 s and 20 ms a token."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"request_id": str(n), "input_toks": input_toks, "output_toks": 11, "queued_ts": 50.0 + n,
         "first_token_ts": 50.1 + n, "last_token_ts": 50.3 + n}
        for n in range(count)
    ]  # fmt: skip
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def run_command(*arguments: str) -> Any:
    app = Typer()
    app.command()(unseen.main)
    return CliRunner().invoke(app, list(arguments))


def test_a_run_is_predicted_from_its_metadata_alone(tmp_path: Path) -> None:
    recorded = read_run(write_run(tmp_path / "run", SPARSE))
    rows = {row.metric: row for row in unseen.rows(recorded, unseen.predict(recorded))}
    assert rows["TTFT mean"].measured == pytest.approx(0.1)
    assert rows["TPOT mean"].measured == pytest.approx(0.02)
    assert rows["makespan"].measured == pytest.approx(5.3)
    assert rows["TPOT mean"].predicted == pytest.approx(16.06e9 / 1008e9, rel=0.1)  # reading the weights
    assert len(rows) == 16


# ---------------------------------------------------------------- metadata


@pytest.mark.parametrize(
    ("version", "gpu", "more", "expected"),
    [
        ("0.19.0", "NVIDIA L40S", {}, (256, 2048, True)),
        ("0.19.0", "NVIDIA H100 80GB HBM3", {}, (1024, 8192, True)),
        ("0.14.1", "NVIDIA A100-SXM4-80GB", {}, (256, 2048, True)),
        ("0.13.0", "NVIDIA H100 80GB HBM3", {}, (1024, 8192, False)),
        ("0.8.5", "NVIDIA H100 80GB HBM3", {}, (1024, 8192, False)),
        ("0.8.5", "NVIDIA A100-SXM4-80GB", {}, (1024, 8192, False)),
        ("0.8.5.post1", "NVIDIA L40S", {}, (256, 2048, False)),
        ("0.8.4", "NVIDIA A100-SXM4-80GB", {}, (256, 2048, False)),
        ("0.8.4", "NVIDIA H200", {}, (1024, 8192, False)),
        ("v0.8.2", "NVIDIA L40S", {}, (1024, 2048, False)),
        ("0.11.0", "NVIDIA A100-SXM4-80GB", {}, (256, 2048, False)),
        ("0.11.0", "NVIDIA RTX PRO 6000 Blackwell Server Edition", {}, (1024, 8192, False)),
        ("0.11.0", "NVIDIA H200", {"usage_context": "LLM_CLASS"}, (1024, 16384, False)),
        ("0.11.0", "NVIDIA A40", {"usage_context": "LLM_CLASS"}, (256, 8192, False)),
        ("0.11.0", "NVIDIA A40", {"enable_chunked_prefill": False}, (256, 40960, False)),
        ("0.7.3", "NVIDIA H100 80GB HBM3", {"max_model_len": 4096}, (256, 4096, False)),
        ("0.7.3", "NVIDIA H100 80GB HBM3", {}, (256, 2048, False)),
        ("0.6.1", "NVIDIA H100 80GB HBM3", {}, (256, 512, False)),
        ("0.14.0", "NVIDIA L40S", {"pipeline_parallel_size": 2}, (256, 2048, False)),
        ("0.19.0", "NVIDIA L40S", {"pipeline_parallel_size": 2}, (256, 2048, True)),
        ("0.19.0", "NVIDIA L40S", {"speculative_config": {"method": "ngram"}}, (256, 2048, False)),
        ("0.19.0", "NVIDIA L40S", {"speculative_config": {"method": "eagle3"}}, (256, 2048, True)),
        ("0.19.0", "NVIDIA L40S", {"async_scheduling": False, "max_num_seqs": 8}, (8, 2048, False)),
    ],
)
def test_defaults_are_those_of_version_and_gpu(
    version: str, gpu: str, more: dict[str, Any], expected: tuple[int, int, bool]
) -> None:
    facts = read_facts({"model": "Qwen/Qwen3-32B", "device_name": gpu, "vllm_version": version, **more})
    assert (facts.limits.max_num_seqs, facts.limits.max_num_batched_tokens, facts.limits.async_scheduling) == expected


@pytest.mark.parametrize(
    ("name", "ours"),
    [("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"), ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
     ("meta-llama/Llama-2-70b-chat-hf", "llama-2-70b"), ("RedHatAI/Qwen3-32B-FP8-dynamic", "qwen3-32b"),
     ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"), ("meta-llama/Meta-Llama-3-70B", "llama-3.1-70b"),
     ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"), ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
     ("mistralai/Mistral-Small-24B-Instruct-2501", "mistral-small-24b"), ("microsoft/phi-4", "phi-4"),
     ("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", "qwen2.5-14b")],
)  # fmt: skip
def test_hugging_face_names_are_known(name: str, ours: str) -> None:
    assert read_facts({**SPARSE, "model": name}).model == ours


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"enable_expert_parallel": True}, "enable_expert_parallel True: experts are taken as cut"),
        ({"engine_kwargs": {"speculative_config": {"method": "eagle"}}}, "speculative_config is on"),
        ({"model": "Qwen/Qwen3-30B-A3B", "data_parallel_size": 2}, "taken as independent replicas"),
    ],
)
def test_settings_that_no_prediction_knows_are_named(settings: dict[str, Any], named: str) -> None:
    assert any(named in note for note in read_facts({**SPARSE, **settings}).unmodelled)


@pytest.mark.parametrize(
    "settings", [{}, {"enable_expert_parallel": False, "cpu_offload_gb": 0}, {"data_parallel_size": 2}]
)
def test_settings_that_are_off_are_not(settings: dict[str, Any]) -> None:
    assert read_facts({**SPARSE, **settings}).unmodelled == ()


def test_eager_engines_are_told_of() -> None:
    assert any("enforce_eager" in note for note in read_facts({**SPARSE, "enforce_eager": True}).assumed)
    assert not any("enforce_eager" in note for note in read_facts({**SPARSE, "enforce_eager": False}).assumed)


@pytest.mark.parametrize(
    ("stated", "weights", "cache"),
    [({}, None, None), ({"quantization": "fp8"}, "float8", None), ({"model": "Qwen/Qwen3-32B-FP8"}, "float8", None),
     ({"kv_cache_dtype": "fp8_e4m3"}, None, "float8"), ({"dtype": "half", "kv_cache_dtype": "auto"}, "float16", None)],
)  # fmt: skip
def test_what_is_in_eight_bits(stated: dict[str, Any], weights: str | None, cache: str | None) -> None:
    facts = read_facts({**SPARSE, **stated})
    assert (facts.dtype, facts.kv_dtype) == (weights, cache)


@pytest.mark.parametrize(
    ("version", "memory", "prefixes", "whole"),
    [("0.7.3", 0.9, False, False), ("0.8.5", 0.9, True, False), ("0.19.0", 0.9, True, True),
     ("0.20.1", 0.92, True, True)],
)  # fmt: skip
def test_other_defaults_by_version(version: str, memory: float, prefixes: bool, whole: bool) -> None:
    facts = read_facts({**SPARSE, "vllm_version": version})
    assert (facts.limits.gpu_memory_utilization, facts.limits.prefix_caching) == (memory, prefixes)
    assert (facts.reserve_full_prompt, facts.limits.block_size, facts.chunked_prefill) == (whole, 16, True)


@pytest.mark.parametrize(
    ("device", "ours"),
    [("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"), ("NVIDIA A100-SXM4-40GB", "A100-40G-SXM"),
     ("NVIDIA A100 80GB PCIe", "A100-80G-PCIe"), ("NVIDIA H100 PCIe", "H100-PCIe"), ("NVIDIA L4", "L4"),
     ("h200-sxm", "H200-SXM"), ("NVIDIA H100 NVL", "H100-NVL"), ("NVIDIA GeForce RTX 5090", "RTX-5090"),
     ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"), ("NVIDIA A10", "A10"), ("NVIDIA A10G", "A10G")],
)  # fmt: skip
def test_device_names_are_known(device: str, ours: str) -> None:
    assert read_facts({**SPARSE, "device_name": device}).gpu.name == ours


def test_another_memory_size_counts_and_is_told() -> None:
    facts = read_facts({**SPARSE, "device_name": "NVIDIA H100", "device_total_memory_bytes": 64 * 2**30})
    assert facts.gpu.memory_bytes == 64 * 2**30 + round(
        UNSEEN_BYTES
    )  # what CUDA shows is what nvidia-smi does, less it
    assert any("other memory" in note for note in facts.assumed)


@pytest.mark.parametrize("device", ["NVIDIA H100 NVL", "NVIDIA GeForce RTX 5090", "RTX 6000 Ada", "NVIDIA A10"])
def test_gpus_that_the_catalogue_lacks_are_predicted_too(device: str) -> None:
    kind = read_facts({**SPARSE, "device_name": device}).gpu
    profile = kernels_for(kind)
    assert profile is not None
    assert profile.kernels[0].gpus == (kind.name,)
    assert kind.flops_for("bfloat16") == kind.flops_for("float16") < kind.flops_for("float8") or kind.name == "A10"


def test_the_memory_that_cuda_shows_goes_first() -> None:
    shown = read_facts({**SPARSE, "device_total_memory_bytes": 25250627584})
    assert shown.gpu.memory_bytes == pytest.approx(read_facts(SPARSE).gpu.memory_bytes, rel=1e-3)
    assert shown.assumed == read_facts(SPARSE).assumed


def test_every_default_is_told() -> None:
    assumed = " ".join(read_facts(SPARSE).assumed)
    for name in ("max_num_seqs 256", "num_gpu_blocks", "async_scheduling True", "enable_prefix_caching True"):
        assert name in assumed


@pytest.mark.parametrize(
    ("change", "message"),
    [({"device_name": None}, "device_name"), ({"model": None}, "model is missing"),
     ({"max_num_seqs": "many"}, "max_num_seqs is"), ({"kv_cache_dtype": "nvfp4"}, "kv_cache_dtype is 'nvfp4'"),
     ({"quantization": "awq"}, "quantization is 'awq'"),
     ({"device_name": "H101"}, "did you mean"), ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5"),
     ({"enable_chunked_prefill": "yes"}, "enable_chunked_prefill is")],
)  # fmt: skip
def test_faults_of_metadata_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_facts({**SPARSE, **change})


# ---------------------------------------------------------------- runs


def test_the_resolved_configuration_goes_first(tmp_path: Path) -> None:
    meta = {**SPARSE, "max_num_seqs": 7, "resolved_config": {"scheduler_config": {"max_num_seqs": 9}}}
    assert read_run(write_run(tmp_path / "run", meta)).facts.limits.max_num_seqs == 9


def test_what_the_metadata_lacks_may_be_stated(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {})
    assert "device_name (or gpu) is missing" in run_command(str(folder)).output
    out = tmp_path / "table.csv"
    done = run_command(str(folder), "--gpu", "L40S", "--model", "llama-3.1-8b", "--tp", "2", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "llama-3.1-8b on 2 x L40S (tp 2, pp 1)" in done.output
    assert "- assumed: max_num_seqs 256" in done.output
    assert "TTFT mean" in out.read_text()


def bench(path: Path, **more: Any) -> None:
    fields = {
        "duration": 3.0, "input_lens": [100, 100, 50], "output_lens": [11, 11, 0], "ttfts": [0.1, 0.1, 0.0],
        "itls": [[0.02] * 10, [0.02] * 10, []], "errors": ["", "", "gone"], "model_id": "meta-llama/Llama-3.1-8B",
    }  # fmt: skip
    path.write_text(json.dumps({**fields, **more}))


@pytest.mark.parametrize(
    ("more", "arrivals", "clients"),
    [({"start_times": [4.0, 5.0, 6.0]}, [0.0, 1.0], None), ({"request_rate": "inf"}, [0.0, 0.0], None),
     ({"max_concurrency": 1}, [0.0, 0.0], 1)],
)  # fmt: skip
def test_a_benchmarks_json_is_a_run(
    tmp_path: Path, more: dict[str, Any], arrivals: list[float], clients: int | None
) -> None:
    """Requests that failed are left out."""
    bench(tmp_path / "result.json", **more)
    recorded = read_run(tmp_path, {"gpu": "L40S"})
    assert [request.arrival_s for request in recorded.requests] == arrivals
    assert recorded.clients == clients
    result = unseen.predict(recorded)
    assert list(result.requests.outcome) == ["completed", "completed"]
    if clients == 1:  # the second waits for the first one's answer
        assert result.requests.arrival_s.max() == pytest.approx(result.requests.e2e_s.iloc[0], rel=1e-6)


def guidellm(folder: Path, **more: Any) -> None:
    """A report of one benchmark: two requests a second apart, and one that failed."""
    good = [
        {"request_start_time": 50.0 + n, "prompt_tokens": 100, "output_tokens": 11, "time_to_first_token_ms": 100.0,
         "inter_token_latency_ms": 20.0}
        for n in range(2)
    ]  # fmt: skip
    bad = [{"request_start_time": 51.5, "prompt_tokens": 7, "output_tokens": None, "error": "timeout"}]
    chosen = {"requests": {"successful": good, "incomplete": [], "errored": bad}, **more}
    (folder / "report.json").write_text(json.dumps({"benchmarks": [chosen]}))


@pytest.mark.parametrize(
    "more",
    [{"config": {"backend": {"model": "meta-llama/Llama-3.1-8B"}}}, {"worker": {"backend_model": "Llama-3.1-8B"}}],
)
def test_a_report_of_guidellm_is_a_run(tmp_path: Path, more: dict[str, Any]) -> None:
    guidellm(tmp_path, **more)
    recorded = read_run(tmp_path, {"gpu": "L40S"})
    assert [request.arrival_s for request in recorded.requests] == [0.0, 1.0]
    rows = {row.metric: row for row in unseen.rows(recorded, unseen.predict(recorded))}
    assert rows["TTFT mean"].measured == pytest.approx(0.1)
    assert rows["TPOT mean"].measured == pytest.approx(0.02)
    assert rows["makespan"].measured == pytest.approx(1.3)


def test_a_report_of_guidellm_may_lack_its_model(tmp_path: Path) -> None:
    guidellm(tmp_path)
    with pytest.raises(ConfigError, match=r"report\.json: model is missing"):
        read_run(tmp_path, {"gpu": "L40S"})
    done = run_command(str(tmp_path), "--gpu", "L40S", "--model", "llama-3.1-8b", "--benchmark", "0")
    assert done.exit_code == 0, done.output
    assert "it has 1, counted from 0" in run_command(str(tmp_path), "--gpu", "L40S", "--benchmark", "1").output


def test_kv_blocks_are_those_of_the_release(tmp_path: Path) -> None:
    """0.16 set more aside for its sampler than 0.19; and what the metadata states goes first."""
    blocks = {}
    for version in ("0.16.0", "0.19.0"):
        recorded = read_run(write_run(tmp_path / version, {**SPARSE, "vllm_version": version}))
        blocks[version] = unseen.limits(recorded.facts).num_kv_blocks
        assert unseen.predict(recorded).replicas.total_blocks.tolist() == [blocks[version]]
    logits_bytes = (38 - 15.4) * 256 * 128256 - 0.12 * 2**30
    assert blocks["0.19.0"] - blocks["0.16.0"] == pytest.approx(logits_bytes / (16 * 131072), abs=1)
    told = read_run(write_run(tmp_path / "told", {**SPARSE, "num_gpu_blocks": 77}))
    assert unseen.limits(told.facts).num_kv_blocks == 77


def test_arrivals_are_drawn_where_only_the_rate_is_known(tmp_path: Path) -> None:
    bench(tmp_path / "result.json", request_rate=2.0)
    recorded = read_run(tmp_path, {"gpu": "L40S"})
    assert recorded.requests[0].arrival_s == 0.0 < recorded.requests[1].arrival_s
    assert any("drawn at request_rate" in note for note in recorded.notes)


def test_bursts_are_drawn_as_the_client_draws_them(tmp_path: Path) -> None:
    """Gaps of a gamma distribution: of its shape, so that a large one makes them equal."""
    bench(tmp_path / "result.json", request_rate=2.0, burstiness=1e9)
    assert [request.arrival_s for request in read_run(tmp_path, {"gpu": "L40S"}).requests] == pytest.approx(
        [0.0, 0.5], rel=1e-3
    )
    bench(tmp_path / "result.json", request_rate=2.0, burstiness=0)
    with pytest.raises(ConfigError, match="burstiness is 0"):
        read_run(tmp_path, {"gpu": "L40S"})


@pytest.mark.parametrize(
    ("name", "text"), [("requests.jsonl", "{"), ("requests.jsonl", '{"input_toks": 1}'), (None, "")]
)
def test_damaged_runs_are_named(tmp_path: Path, name: str | None, text: str) -> None:
    folder = write_run(tmp_path / "run", SPARSE)
    if name is None:
        (folder / "requests.jsonl").unlink()
    else:
        (folder / name).write_text(text)
    done = run_command(str(folder))
    assert done.exit_code == 2
    assert "error: " in done.output
    assert "requests.jsonl" in done.output


def test_requests_that_cannot_be_served_are_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {**SPARSE, "max_model_len": 100})
    assert "6 requests were not served in simulation" in run_command(str(folder)).output


# ---------------------------------------------------------------- models and GPUs without a real run


@pytest.mark.parametrize(
    ("name", "device", "tp"),
    [("llama-3.2-1b", "NVIDIA L4", 1), ("Qwen/Qwen2.5-7B-Instruct", "NVIDIA A100-SXM4-80GB", 2),
     ("microsoft/phi-4", "NVIDIA H100 80GB HBM3", 1), ("Qwen/Qwen3-14B", "NVIDIA RTX A6000", 1),
     ("Llama-3.3-70B-Instruct", "NVIDIA H200", 4)],
)  # fmt: skip
def test_decodes_take_about_as_long_as_reading_the_weights(tmp_path: Path, name: str, device: str, tp: int) -> None:
    """One or two sequences at a time, of 200 tokens: nothing else takes long."""
    meta = {"model": name, "device_name": device, "vllm_version": "0.19.0", "tensor_parallel_size": tp}
    recorded = read_run(write_run(tmp_path, meta))
    rows = {row.metric: row for row in unseen.rows(recorded, unseen.predict(recorded))}
    facts = recorded.facts
    reading_s = unseen.spec(facts).weight_bytes(0, unseen.spec(facts).num_layers) / tp / facts.gpu.bandwidth_bytes_per_s
    assert 1.05 * reading_s < rows["TPOT p50"].predicted < 2.2 * reading_s + 2e-3


@pytest.mark.parametrize("tp", [1, 2])
def test_a_mixture_of_experts_is_plausible(tmp_path: Path, tp: int) -> None:
    """Qwen3-30B-A3B on RTX PRO 6000: between reading what one token touches and reading all, and measured kernels."""
    meta = {"model": "Qwen/Qwen3-30B-A3B-Instruct-2507", "device_name": "NVIDIA RTX PRO 6000 Blackwell Server Edition",
            "vllm_version": "0.19.0", "tensor_parallel_size": tp}  # fmt: skip
    recorded = read_run(write_run(tmp_path / "run", meta))
    result = unseen.predict(recorded)
    assert result.replicas.measured.all()
    assert 3.3e9 * 2 / 1792e9 / tp < result.requests.tpot_s.mean() < 61e9 / 1792e9
    assert result.log() == unseen.predict(recorded, step_by_step=True).log()


# ---------------------------------------------------------------- on real data


def test_the_real_run_is_the_studys(shared_data: Path, tmp_path: Path) -> None:
    """Without its KV blocks and its trace the run is still foretold, though less well."""
    folder = shared_data / "measured" / kv_bound.FOLDER
    copy = tmp_path / "run"
    copy.mkdir()
    shutil.copy(folder / "requests.jsonl", copy)
    (copy / "meta.json").write_text(json.dumps(SPARSE))
    errors = []
    for place in (folder, copy):
        recorded = read_run(place)
        rows = unseen.rows(recorded, unseen.predict(recorded))
        errors.append({row.metric: abs(row.error) for row in rows})
    assert max(errors[0][name] for name in ("TTFT mean", "TPOT mean", "makespan")) < 0.005
    assert max(errors[1][name] for name in ("TTFT mean", "TPOT mean", "makespan")) < 0.12
    assert errors[0]["TTFT mean"] < errors[1]["TTFT mean"]


@pytest.mark.parametrize(
    ("stated", "least", "most"),
    [({}, 16.06e9, 1.5 * 16.06e9), ({"quantization": "fp8"}, 9.1e9, 1.6 * 9.1e9), ({"tp": 2}, 8.03e9, 1.5 * 8.03e9)],
)
def test_a_gpu_without_tables_takes_its_relatives(
    tmp_path: Path, stated: dict[str, Any], least: float, most: float
) -> None:
    """Llama-3.1-8B's decodes on A40: no faster than reading the weights, nor much slower; and told as a prediction."""
    meta = {"model": SPARSE["model"], "device_name": "NVIDIA A40", "vllm_version": "0.11.0", **stated}
    recorded = read_run(write_run(tmp_path / "run", {**meta, "tensor_parallel_size": stated.get("tp", 1)}))
    result = unseen.predict(recorded)
    tpot_s = float(result.requests.tpot_s.mean()) - unseen.overhead(recorded.facts).step_s
    assert least / 696e9 < tpot_s < most / 696e9
    assert "scaled from a relative's" in unseen.described(recorded, result)
