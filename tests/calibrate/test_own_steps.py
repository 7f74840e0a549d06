"""A user's own step times become a profile: exact terms where the times follow the form, errors that were held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from calibrate.importers.steps import import_csv
from sim.types import ConfigError

HEADER = "batch,seq_len,phase,latency_ms\n"


def prefill_ms(batch: int, length: int) -> float:
    return 5 + 0.05 * batch * length + 1e-6 * batch * length**2


def decode_ms(batch: int, length: int) -> float:
    return 8 + 1e-4 * batch * length + 0.02 * batch


PROMPTS = [(1, 512), (1, 1024), (2, 2048), (1, 4096), (4, 256)]
DECODES = [(1, 512), (8, 512), (32, 1024), (64, 128), (16, 4096)]


def saved(folder: Path, text: str) -> Path:
    path = folder / "own.csv"
    path.write_text(text)
    return path


def table(
    prompts: list[tuple[int, int]] = PROMPTS, decodes: list[tuple[int, int]] = DECODES, per_ms: float = 1.0
) -> str:
    rows = [f"{batch},{length},prefill,{prefill_ms(batch, length) * per_ms}" for batch, length in prompts]
    rows += [f"{batch},{length},decode,{decode_ms(batch, length) * per_ms}" for batch, length in decodes]
    return HEADER + "\n".join(rows) + "\n"


def imported(path: Path, **more: Any) -> Any:
    return import_csv(path, **{"gpu": "H100-SXM", "model": "llama-3.1-8b", **more})


def test_times_that_follow_the_form_give_its_terms(tmp_path: Path) -> None:
    found = imported(saved(tmp_path, table()), tp=2)
    (form,) = found.profile.polynomials
    assert (form.gpus, form.model, form.tp) == (("H100-SXM",), "llama-3.1-8b", 2)
    prompts, decodes = form.prompts, form.decodes
    assert (prompts.step_s, prompts.token_s, prompts.square_s) == pytest.approx((5e-3, 5e-5, 1e-9))
    assert (decodes.step_s, decodes.context_s, decodes.sequence_s) == pytest.approx((8e-3, 1e-7, 2e-5))
    assert form.held_out["prefill"].mape == pytest.approx(0, abs=1e-9)
    assert form.held_out["decode"].points == 5
    assert [part.operator for part in found.samples] == ["prefill", "decode"]


def test_a_few_points_scale_the_roofline(tmp_path: Path) -> None:
    found = imported(saved(tmp_path, HEADER + "1,512,prefill,45\n8,512,decode,12\n"))
    (form,) = found.profile.polynomials
    one = form.prompts.step_s + 512 * form.prompts.token_s + 512**2 * form.prompts.square_s
    eight = form.decodes.step_s + 8 * 512 * form.decodes.context_s + 8 * form.decodes.sequence_s
    assert (one, eight) == pytest.approx((0.045, 0.012))
    assert form.held_out == {}
    assert found.samples[0].predicted_s == (None,)


def test_other_names_units_and_separators(tmp_path: Path) -> None:
    (same,) = imported(saved(tmp_path, table())).profile.polynomials
    text = table(per_ms=1000).replace(HEADER, "num_seqs,context,phase,median_us\n").replace(",", ";")
    (other,) = imported(saved(tmp_path, text.replace("prefill", "prompt"))).profile.polynomials
    assert other.prompts.token_s == pytest.approx(same.prompts.token_s)
    assert other.decodes.step_s == pytest.approx(same.decodes.step_s)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("batch,seq_len,phase,latency\n1,512,decode,9\n", "no column of times with its unit"),
        ("batch,phase,latency_ms\n1,decode,9\n", "no column seq_len or context"),
        (HEADER + "1,512,decode,9\n", "no row of phase prefill"),
        (HEADER + "1,512,both,9\n", "own.csv:2: phase is 'both'"),
        (HEADER + "1.5,512,decode,9\n", "own.csv:2: batch is '1.5'; expected a whole number"),
        (HEADER + "1,512,decode,nan\n", "own.csv:2: latency_ms is 'nan'"),
        (HEADER + "1,512,decode\n", "own.csv:2: the line has 3 cells"),
        ("batch,seq_len,phase,latency_ms,clock\n1,512,decode,9,1\n", "column 'clock' is not known"),
        ("", "no column batch"),
    ],
)
def test_what_is_amiss_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        imported(saved(tmp_path, text))


def test_gpu_and_model_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--gpu and --model"):
        import_csv(saved(tmp_path, table()), gpu=None, model="llama-3.1-8b")
