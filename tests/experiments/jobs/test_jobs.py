"""Jobs: answers are kept, failures are rows, lost workers are asked again."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments.jobs import journal as journals
from experiments.jobs.content import key_of
from experiments.jobs.executor import LOSSES, Jobs, PointError
from experiments.jobs.journal import FILE, JobLostError, opened, read
from experiments.jobs.run import StoppedError, Where, jobs, shard_of
from experiments.jobs.workers import Here, Workers, local
from experiments.runs.rundir import into_folder
from sim.types import ConfigError, InfeasibleError

STUDY = {"name": "squares", "hash": "abc"}


def square(number: int) -> int:
    return number * number


def noted(folder: str, number: int) -> int:
    """Leaves a mark that it ran."""
    with Path(folder, f"{number}-{time.time_ns()}").open("w"):
        return number * number


def refuse(number: int) -> int:
    raise ConfigError(f"{number} is refused")


def impossible(number: int) -> int:
    raise InfeasibleError(f"{number} cannot be")


def broken(number: int) -> float:
    return number / 0


def fatal(number: int) -> int:
    """Ends its worker if it is 3."""
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return number * number


def fatal_once(folder: str, number: int) -> int:
    mark = Path(folder, "died")
    if number == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


@dataclass(frozen=True)
class Times:
    """A call that is an object."""

    factor: int

    def __call__(self, number: int) -> int:
        return self.factor * number


def test_answers_are_kept_and_not_asked_for_again(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    for _ in range(2):
        with jobs(tmp_path / "out", STUDY, Where(workers=1)) as executor:
            assert [executor.submit(noted, str(marks), n).result() for n in range(4)] == [0, 1, 4, 9]
    assert len(list(marks.iterdir())) == 4
    study, entries = read(tmp_path / "out")
    assert study == STUDY
    assert sorted(entry.answer for entry in entries.values()) == [0, 1, 4, 9]


def test_another_study_in_the_folder_is_refused_by_name(tmp_path: Path) -> None:
    with opened(tmp_path / "out", STUDY):
        pass
    with (
        pytest.raises(ConfigError, match=r"another job was run there \(squares, abc; this one: cubes, def\)"),
        opened(tmp_path / "out", {"name": "cubes", "hash": "def"}),
    ):
        pass


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    with opened(tmp_path, STUDY) as journal:
        journal.add("a", 1)
        journal.add("b", 2)
    file = tmp_path / FILE
    whole = file.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        file.write_bytes(whole[:-cut])
        with opened(tmp_path, STUDY) as journal:
            assert set(journal.entries) == {"a"}
            journal.add("c", 3)
        assert [json.loads(line)["key"] for line in file.read_text().splitlines()[1:]] == ["a", "c"]


def test_a_journal_has_one_writer(tmp_path: Path) -> None:
    with (
        opened(tmp_path, STUDY),
        pytest.raises(ConfigError, match="being run there by another process"),
        opened(tmp_path, STUDY),
    ):
        pass


def test_a_foreign_file_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / FILE
    file.write_text('{"mine": 1}\n')
    with pytest.raises(ConfigError, match="not a journal of ours"), opened(tmp_path, STUDY):
        pass
    assert file.read_text() == '{"mine": 1}\n'


def test_failures_are_kept_and_tried_again_when_asked(tmp_path: Path) -> None:
    with jobs(tmp_path, STUDY, Where(workers=1)) as executor:
        with pytest.raises(PointError, match="7 is refused"):
            executor.submit(refuse, 7).result()
        with pytest.raises(InfeasibleError, match="7 cannot be"):
            executor.submit(impossible, 7).result()
        with pytest.raises(PointError, match="ZeroDivisionError: division by zero"):
            executor.submit(broken, 7).result()
    assert sum(entry.failed is not None for entry in read(tmp_path)[1].values()) == 3
    with jobs(tmp_path, STUDY, Where(workers=1)) as executor, pytest.raises(InfeasibleError):
        executor.submit(impossible, 7).result()  # from the journal
    with jobs(tmp_path, STUDY, Where(workers=1, retry_failed=True)) as executor:
        assert executor.submit(square, 7).result() == 49
        with pytest.raises(PointError):
            executor.submit(refuse, 7).result()


def test_points_are_told_apart_by_call_arguments_and_files(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("a")
    keys = [key_of(square, 1), key_of(square, 2), key_of(refuse, 1), key_of(Times(2), 1), key_of(Times(3), 1),
            key_of(square, str(file))]  # fmt: skip
    assert len(set(keys)) == len(keys)
    other = tmp_path / "elsewhere.csv"
    other.write_text("a")
    assert key_of(square, str(other)) == keys[-1]  # the same content
    file.write_text("bb")
    assert key_of(square, str(file)) != keys[-1]
    with pytest.raises(ConfigError, match="has no content to compare"):
        key_of(square, object())


def test_processes_give_the_same_answers(tmp_path: Path) -> None:
    with jobs(tmp_path, STUDY, Where(workers=2)) as executor:
        futures = [executor.submit(Times(3), n) for n in range(10)]
        twice = executor.submit(Times(3), 4)
        assert [future.result() for future in futures] == [3 * n for n in range(10)]
        assert twice.result() == 12
    assert len(read(tmp_path)[1]) == 10


def test_the_point_that_ends_its_worker_fails_and_no_other(tmp_path: Path) -> None:
    with jobs(tmp_path, STUDY, Where(workers=2)) as executor:
        futures = [executor.submit(fatal, n) for n in range(6)]
        answers = [future.exception() or future.result() for future in futures]
    assert [a for n, a in enumerate(answers) if n != 3] == [0, 1, 4, 16, 25]
    assert isinstance(answers[3], PointError)
    assert f"lost {LOSSES} times" in str(answers[3])


def test_a_worker_lost_once_costs_nothing(tmp_path: Path) -> None:
    with jobs(tmp_path / "out", STUDY, Where(workers=2)) as executor:
        futures = [executor.submit(fatal_once, str(tmp_path), n) for n in range(4)]
        assert [future.result() for future in futures] == [0, 1, 4, 9]


class Gone(Here):
    """A cluster whose scheduler is lost."""

    def submit(self, call, /, *args, **more):  # type: ignore[no-untyped-def]
        future = super().submit(square, 1)
        future = type(future)()
        future.cancel()
        future.set_running_or_notify_cancel()
        return future


def test_a_lost_scheduler_is_said_and_nothing_is_journaled(tmp_path: Path) -> None:
    with opened(tmp_path, STUDY) as journal:
        executor = Jobs(Workers(count=1, fresh=Gone, alive=lambda: False), journal)
        with pytest.raises(JobLostError, match="run the same command again"):
            executor.submit(square, 2).result()
    assert read(tmp_path)[1] == {}


@pytest.fixture
def handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_what_is_done_is_kept(tmp_path: Path, number: signal.Signals, code: int) -> None:
    def ask() -> None:
        with jobs(tmp_path, STUDY, Where(workers=1)) as executor:
            executor.submit(square, 5).result()
            os.kill(os.getpid(), number)
            time.sleep(5)

    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals are heard by the main thread only")
    with pytest.raises(StoppedError) as ended:
        ask()
    assert ended.value.code == code
    assert [entry.answer for entry in read(tmp_path)[1].values()] == [25]


def test_shards(tmp_path: Path) -> None:
    assert shard_of("2/8") == (2, 8)
    assert shard_of(None) is None
    for wrong in ("0/4", "5/4", "a/b", "1", "1/0", "-1/2"):
        with pytest.raises(ConfigError, match="--shard"):
            shard_of(wrong)


def test_one_worker_is_this_process() -> None:
    assert local(1).count == 1
    assert isinstance(local(1).fresh(), Here)


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".new-abc").mkdir()
    (tmp_path / ".new-abc" / "runs.csv").write_text("half")
    with into_folder(tmp_path) as new:
        (new / "runs.csv").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]
    assert (tmp_path / "runs.csv").read_text() == "whole"


def test_a_full_disk_ends_the_job_and_no_point_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with jobs(tmp_path, STUDY, Where(workers=1)) as executor:
        assert executor.submit(square, 2).result() == 4
        monkeypatch.setattr(journals, "_append", full)
        with pytest.raises(JobLostError, match="No space left on device; what was finished is kept"):
            executor.submit(square, 3).result()
    assert [entry.answer for entry in read(tmp_path)[1].values()] == [4]


def test_an_error_of_the_caller_is_not_the_journals(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="mine"), opened(tmp_path, STUDY):
        raise FileNotFoundError("mine")
