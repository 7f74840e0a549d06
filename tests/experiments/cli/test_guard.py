"""What stands between a command and the terminal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.cli.guard import guarded
from experiments.runs.rundir import whole_files, whole_folder
from sim.types import ConfigError, SimulationError


def leaves(error: Exception, *arguments: str) -> object:
    def command(_: list[str]) -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        guarded(command, arguments)
    return left.value.code


def test_a_mistake_of_the_user_is_one_line_and_exit_code_2(capsys) -> None:
    assert leaves(ConfigError("f.yaml: a\nis wrong\x1b[31m")) == 2
    assert capsys.readouterr().err == "phasewise: f.yaml: a is wrong?[31m\n"
    assert leaves(SimulationError("stuck")) == 1


def test_a_defect_is_one_line_and_a_report(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert leaves(IndexError("x"), "run", "s.yaml") == 1
    said = capsys.readouterr().err
    (report,) = tmp_path.glob("phasewise-report-*.txt")
    assert said.count("\n") == 1
    assert f"a defect of phasewise: IndexError: x; the report is in {report}; --traceback" in said
    assert "IndexError: x" in report.read_text()
    assert "'run' 's.yaml'" in report.read_text()
    assert leaves(IndexError("x"), "run", "--traceback") == 1
    assert "Traceback" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1


def test_paths_of_any_kind(capsys) -> None:
    assert leaves(FileNotFoundError(2, "No such file or directory", "a\x07b")) == 2
    assert capsys.readouterr().err == "phasewise: a\\x07b: No such file or directory; check the path\n"
    assert leaves(ValueError("embedded null byte")) == 2
    assert leaves(MemoryError()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_stdout_that_cannot_be_written_is_one_line() -> None:
    command = [sys.executable, "-m", "experiments.cli", "gpus"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "cannot be written: No space left on device" in done.stderr
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with whole_folder(tmp_path / "run") as new:
            (new / "summary.json").write_text(text)
        assert (tmp_path / "run" / "summary.json").read_text() == text
    with pytest.raises(KeyError):
        fill(whole_folder(tmp_path / "run"), "three", KeyError())
    assert (tmp_path / "run" / "summary.json").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def fill(place, text: str, error: BaseException | None = None, meanwhile=lambda: None) -> None:
    with place as new:
        (new / "summary.json").write_text(text)
        meanwhile()
        if error is not None:
            raise error


def test_a_finished_result_stays_where_the_last_step_fails(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the finished result is in .*\.run-") as refused:
        fill(whole_folder(tmp_path / "run"), "one", meanwhile=lambda: os.symlink("no/where", tmp_path / "run"))
    kept = Path(str(refused.value).rsplit(" ", 1)[1])
    assert (kept / "summary.json").read_text() == "one"


def test_plots_are_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fill(whole_files(tmp_path / "plots"), "x", KeyError())
    assert not (tmp_path / "plots").exists()
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "mine.txt").write_text("x")
    fill(whole_files(tmp_path / "plots"), "x")
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["mine.txt", "summary.json"]
