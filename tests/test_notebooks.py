"""The notebooks run from top to bottom, and hold no outputs in the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra 'dev' or 'notebook'")
nbclient = pytest.importorskip("nbclient", reason="needs the extra 'dev' or 'notebook'")

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert [path.name for path in NOTEBOOKS][:1] == ["01_quickstart.ipynb"]


def _parameter(path: Path) -> Any:
    return pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if "calibrate" in path.stem else [])


@pytest.mark.parametrize("path", [_parameter(path) for path in NOTEBOOKS])
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    if "calibrate" in path.stem:
        pytest.importorskip("torch", reason="torch is not installed")
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(tmp_path))
    kinds = {kind for cell in notebook.cells for output in cell.get("outputs", ()) for kind in output.get("data", {})}
    assert {"text/html", "image/png"} <= kinds
