"""``phasewise replay`` against a server nobody here wrote: ``transformers serve`` with continuous batching, offline.

The model is a Llama of two small layers with random weights, made here with its tokenizer. The server listens on
loopback, has a deadline to come up, and its process group is ended whatever happens.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.experiments.cli.test_cli import call

pytestmark = pytest.mark.slow

UP_S = 120.0
REQUESTS = [(0.0, 24, 12), (0.3, 60, 8), (0.35, 12, 16), (0.4, 33, 1)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config, weights and tokenizer. Skips where transformers[serving] and httpx are missing."""
    for package in ("transformers", "tokenizers", "torch", "fastapi", "uvicorn", "openai", "accelerate", "httpx"):
        pytest.importorskip(package, reason=f"needs {package} (pip install 'transformers[serving]' httpx)")
    folder = tmp_path_factory.mktemp("model")
    made = subprocess.run([sys.executable, "-c", MAKE, str(folder)], env=_offline(), capture_output=True, timeout=120)
    assert made.returncode == 0, made.stderr.decode()
    return folder


MAKE = """
import sys
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, decoders
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from experiments.validation.dialect import WORDS

vocabulary = {"<unk>": 0, "</s>": 1} | {word: place + 2 for place, word in enumerate(WORDS)}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
fast.save_pretrained(sys.argv[1])
config = LlamaConfig(vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None,
                     eos_token_id=1, pad_token_id=None)
torch.manual_seed(0)  # other weights may begin with the end-of-sequence token, which has no text
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
"""


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's address once it is up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model), "--continuous-batching",
               "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--cb-num-blocks", "64",
               "--cb-block-size", "16", "--cb-max-batch-tokens", "128"]  # fmt: skip
    with log.open("w") as file:
        server = subprocess.Popen(command, env=_offline(), stdout=file, stderr=file, start_new_session=True)
    try:
        _wait_until_up(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(10)


def _wait_until_up(server: subprocess.Popen[bytes], health: str, log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + UP_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with opener.open(health, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server did not come up: {log.read_text()[-2000:]}")


def _offline() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_a_trace_against_transformers_serve(
    url: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, out = tmp_path / "trace.csv", tmp_path / "real.json"
    lines = "".join(f"{arrival_s},{inputs},{outputs}\n" for arrival_s, inputs, outputs in REQUESTS)
    trace.write_text(f"arrival_s,input_tokens,output_tokens\n{lines}")
    code = call("replay", "--url", url, "--model", model, "--trace", trace, "--out", out, "--timeout-s", 60)
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "prompts are words, answer lengths are not forced" in said.err
    written = json.loads(out.read_text())
    assert (written["completed"], written["failed"]) == (4, 0)
    assert written["input_lens"] == [inputs for _, inputs, _ in REQUESTS]
    assert all(1 <= got <= asked for got, (_, _, asked) in zip(written["output_lens"], REQUESTS, strict=True))
    assert written["phasewise"]["tokens_counted_by_server"] == 4
    assert all(ttft > 0 for ttft in written["ttfts"])
    assert written["start_times"] == pytest.approx([arrival_s for arrival_s, _, _ in REQUESTS], abs=0.25)


def test_a_model_the_server_does_not_have(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("replay", "--url", url, "--model", "other", "--trace", "sample", "--out", tmp_path / "x.json") == 2
    assert "requested 'other'" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
