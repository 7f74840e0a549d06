"""Downloads, against a server on this machine that can be slow, wrong, forgetful or gone."""

import hashlib
import socket
import threading
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sim.types import ConfigError
from traces import FORMATS, PUBLIC_TRACES, PublicTrace, fetch

CONTENT = bytes(range(256)) * 2000
HALF = len(CONTENT) // 2


@dataclass
class Behaviour:
    """What the server does; ``asked`` is what it was asked for."""

    content: bytes = CONTENT
    ranges: bool = True
    cut_after: list[int] = field(default_factory=list)
    status: int = 200
    silent: bool = False
    asked: list[str | None] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        does = self.server.behaviour
        asked = self.headers.get("Range")
        does.asked.append(asked)
        if does.silent:
            threading.Event().wait(1.0)
            return
        if does.status != 200:
            self.send_error(does.status)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and does.ranges else 0
        if start >= len(does.content):
            self.send_error(416)
            return
        self.send_response(206 if asked and does.ranges else 200)
        if asked and does.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(does.content) - 1}/{len(does.content)}")
        self.send_header("Content-Length", str(len(does.content) - start))
        self.end_headers()
        end = does.cut_after.pop(0) if does.cut_after else len(does.content)
        self.wfile.write(does.content[start:end])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        found.behaviour = Behaviour()
        threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield found
        found.shutdown()


def table(server) -> dict[str, PublicTrace]:
    url = f"http://127.0.0.1:{server.server_address[1]}/trace.csv"
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    row = PublicTrace(url=url, file="t.csv", size_bytes=len(CONTENT), sha256=sha256, format="azure", licence=None)
    return {"trace": row}


def refused(server, folder, **options) -> str:
    with pytest.raises(ConfigError) as error:
        fetch("trace", folder, table=table(server), **options)
    assert not (folder / "t.csv").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_trace_is_downloaded_once(server, tmp_path):
    path = fetch("trace", tmp_path / "new" / "folder", table=table(server))
    assert path.read_bytes() == CONTENT
    assert fetch("trace", path.parent, table=table(server)) == path
    assert server.behaviour.asked == [None]
    assert [file.name for file in path.parent.iterdir()] == ["t.csv"]


def test_progress_ends_with_the_size(server, tmp_path):
    seen = []
    fetch("trace", tmp_path, lambda *done: seen.append(done), table=table(server))
    assert seen == sorted(seen)
    assert len(seen) > 3
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_cut_connection_is_continued_where_it_stopped(server, tmp_path):
    server.behaviour.cut_after = [HALF, HALF + 1000]
    assert fetch("trace", tmp_path, table=table(server)).read_bytes() == CONTENT
    assert server.behaviour.asked == [None, f"bytes={HALF}-", f"bytes={HALF + 1000}-"]


def test_what_arrived_is_kept_for_the_next_call(server, tmp_path):
    server.behaviour.cut_after = [HALF, HALF]
    message = refused(server, tmp_path)
    assert f"the connection was cut ({HALF:,} of {len(CONTENT):,} bytes are kept)" in message
    assert fetch("trace", tmp_path, table=table(server)).read_bytes() == CONTENT
    assert server.behaviour.asked[-1] == f"bytes={HALF}-"


def test_a_server_without_ranges_begins_anew(server, tmp_path):
    server.behaviour.ranges = False
    server.behaviour.cut_after = [HALF]
    assert fetch("trace", tmp_path, table=table(server)).read_bytes() == CONTENT


def test_a_server_without_ranges_that_always_cuts_is_named(server, tmp_path):
    server.behaviour.ranges = False
    server.behaviour.cut_after = [HALF] * 9
    assert "cut, and the server cannot continue (it ignores Range)" in refused(server, tmp_path)
    assert len(server.behaviour.asked) == 2


def test_another_content_is_refused_and_thrown_away(server, tmp_path):
    server.behaviour.content = CONTENT[:-1] + b"!"
    found = hashlib.sha256(server.behaviour.content).hexdigest()
    message = refused(server, tmp_path)
    assert f"is not the file it was; ask its publisher, or read your own copy (SHA-256 {found}, expected" in message
    assert list(tmp_path.iterdir()) == []


def test_another_size_is_refused_before_it_is_read(server, tmp_path):
    server.behaviour.content = b"<html>not here</html>"
    assert f"has 21 bytes, expected {len(CONTENT)}; it is not the file it was" in refused(server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_beginning_is_found_out_and_does_not_stay(server, tmp_path):
    (tmp_path / ".t.csv.partial").write_bytes(b"?" * HALF)
    assert "is not the file it was" in refused(server, tmp_path)
    assert fetch("trace", tmp_path, table=table(server)).read_bytes() == CONTENT


def test_another_file_of_that_name_is_left_alone(server, tmp_path):
    (tmp_path / "t.csv").write_text("mine")
    with pytest.raises(ConfigError, match=r"t.csv is there with other content; move it away"):
        fetch("trace", tmp_path, table=table(server))
    assert (tmp_path / "t.csv").read_text() == "mine"
    assert server.behaviour.asked == []


@pytest.mark.parametrize("status", [404, 503])
def test_what_the_server_answers_is_told(server, tmp_path, status):
    server.behaviour.status = status
    assert f"the server answers {status} " in refused(server, tmp_path)


def test_a_part_that_cannot_be_continued_is_dropped(server, tmp_path):
    (tmp_path / ".t.csv.partial").write_bytes(CONTENT[:HALF])
    server.behaviour.status = 416
    assert "the server answers 416" in refused(server, tmp_path)
    server.behaviour.status = 200
    assert fetch("trace", tmp_path, table=table(server)).read_bytes() == CONTENT
    assert server.behaviour.asked[-1] is None


def test_no_connection(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        row = replace(PUBLIC_TRACES["azure-conv"], url=f"http://127.0.0.1:{taken.getsockname()[1]}/t.csv")
        with pytest.raises(ConfigError, match=r"Connection refused \(0 of 719,188 bytes are kept\); check the network"):
            fetch("trace", tmp_path, table={"trace": row})


def test_a_silent_server(server, tmp_path):
    server.behaviour.silent = True
    assert "timed out" in refused(server, tmp_path, timeout_s=0.2)


def test_names_and_folders_are_checked(server, tmp_path):
    with pytest.raises(ConfigError, match="public trace 'azure' is unknown; did you mean 'azure-co"):
        fetch("azure", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written: .*; choose another folder"):
        fetch("trace", tmp_path / "file", table=table(server))


def test_the_table_is_well_formed():
    assert list(PUBLIC_TRACES) == ["azure-conv", "azure-code", "mooncake", "burstgpt"]
    for row in PUBLIC_TRACES.values():
        assert row.url.startswith("https://")
        assert row.format in FORMATS
        assert len(bytes.fromhex(row.sha256)) == 32


def test_the_sums_are_those_of_the_published_files(shared_data, tmp_path):
    for name, place in {
        "azure-conv": "azure/AzureLLMInferenceTrace_conv.csv",
        "azure-code": "azure/AzureLLMInferenceTrace_code.csv",
        "mooncake": "mooncake/conversation_trace.jsonl",
    }.items():
        copy = tmp_path / PUBLIC_TRACES[name].file
        copy.write_bytes((shared_data / "traces" / place).read_bytes())
        assert copy.stat().st_size == PUBLIC_TRACES[name].size_bytes
        assert fetch(name, tmp_path) == copy  # there already, and right: nothing is asked for
