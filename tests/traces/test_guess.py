"""What a file is, by evidence: never a unit or a block size out of the air, however the text is wrapped."""

import bz2
import csv
import gzip
import io
import json
import lzma
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from sim.types import ConfigError
from traces import guess_format, read
from traces.source import Sessions


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def saved(folder: Path, text: str | bytes, name: str = "trace.jsonl") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def told(path: Path, **options) -> list[tuple]:
    return [(r.arrival_s, r.input_tokens, r.output_tokens) for r in read(path, **options)]


def turn(at: float, input_tokens: int, block: int, **more) -> dict:
    hashes = list(range(-(-input_tokens // block)))
    return {"timestamp": at, "input_length": input_tokens, "output_length": 7, "hash_ids": hashes, **more}


def test_qwen_bailian_is_told_from_mooncake(tmp_path: Path) -> None:
    rows = [
        turn(1.5, 40, 16, chat_id=9, parent_chat_id=-1, turn=1),
        turn(4.0, 50, 16, chat_id=12, parent_chat_id=9, turn=2),
        turn(6.25, 33, 16, chat_id=13, parent_chat_id=-1, turn=1),
    ]
    reader = read(saved(tmp_path, lines(*rows)))
    requests = list(reader)
    assert [r.arrival_s for r in requests] == [0, 2.5, 4.75]
    assert [(len(r.prefix), r.prefix_block_tokens) for r in requests] == [(2, 16), (3, 16), (2, 16)]
    assert [r.session for r in requests] == ["9", "9", "13"]
    assert reader.remarks == ("read as bailian, times in s, blocks of 16 tokens", "columns not used: turn")


@pytest.mark.parametrize(
    ("block", "step", "span_s", "remark"),
    [
        (512, 3000, 33.0, "read as mooncake, times in ms, blocks of 512 tokens"),
        (16, 3.25, 35.75, None),  # 0.3 or 300 requests/s
        (16, 0.25, 2.75, "read as mooncake, times in s, blocks of 16 tokens"),
        (64, 300_000, 3300.0, None),
        (64, 30_000, 330.0, "read as mooncake, times in ms, blocks of 64 tokens"),
    ],
)
def test_unit_and_block_follow_from_the_content_or_are_asked_for(tmp_path, block, step, span_s, remark) -> None:
    path = saved(tmp_path, lines(*(turn(step * n, 3000 + n, block) for n in range(12))))
    if remark is None:
        with pytest.raises(
            ConfigError, match=r"not evident \(.* requests/s if they are in s, .* in ms\); name --time-unit"
        ):
            read(path)
        return
    reader = read(path)
    assert reader.remarks == (remark,)
    assert list(reader)[-1].arrival_s == span_s


@pytest.mark.parametrize("per_s", [10**3, 10**6, 10**9])
def test_times_since_1970_say_their_unit(tmp_path: Path, per_s: int) -> None:
    rows = ({"timestamp": (1_700_000_000 + n) * per_s, "input_length": 5, "output_length": 6} for n in range(3))
    path = saved(tmp_path, lines(*rows))
    assert told(path, format="aiperf") == [(0, 5, 6), (1, 5, 6), (2, 5, 6)]
    text = f"Timestamp,Model,Request tokens,Response tokens\n{1_700_000_000 * per_s},m,5,6\n"
    with pytest.raises(ConfigError, match=r"are not s; as .* since 1970 they would be; divide them by"):
        read(saved(tmp_path, text, "burst.csv"))


def test_what_is_strange_is_said(tmp_path: Path) -> None:
    text = "arrival_s,input_tokens,output_tokens\n" + "".join(f"{n / 10000},5,6\n" for n in range(20))
    assert "a mean rate of 1e+04 requests/s is out of the ordinary" in read(saved(tmp_path, text, "t.csv")).remarks[0]
    text = "arrival_s,input_tokens,output_tokens\n0,5000000,6\n"
    assert "input_tokens of 5,000,000 is beyond any context" in read(saved(tmp_path, text, "t.csv")).remarks[0]
    path = saved(tmp_path, lines(*(turn(3000 * n, 3000 + n, 512) for n in range(12))))
    assert "fit blocks of 512 tokens rather than the 16" in read(path, "mooncake", block_tokens=16).remarks[0]


# ---------------------------------------------------------------- wrappings

HEADER = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
START = datetime(2024, 5, 1, 10, 0, 0)
ROWS = [(START + timedelta(seconds=n * 1.25), 100 + n, 10 + n) for n in range(5)]
EXPECTED = [(n * 1.25, 100 + n, 10 + n) for n in range(5)]


def table(separator: str = ",", quoting: int = csv.QUOTE_MINIMAL, above: str = "") -> str:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator, quoting=quoting)
    writer.writerows([HEADER, *((str(at), *counts) for at, *counts in ROWS)])
    return above + file.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        table(),
        table(";"),
        table("\t"),
        table("|"),
        table(quoting=csv.QUOTE_ALL),
        table(";", csv.QUOTE_ALL, above="# exported by x\n\n# twice\n"),
        "\ufeff" + table(),
        table().replace("\r\n", "\r\n# a remark\r\n"),
        gzip.compress(table().encode()),
        bz2.compress(table().encode()),
        lzma.compress(table().encode()),
        lines(*(dict(zip(HEADER, (str(at), *counts), strict=True)) for at, *counts in ROWS)),
        json.dumps([dict(zip(HEADER, (str(at), *counts), strict=True)) for at, *counts in ROWS], indent=1),
    ],
)
def test_the_same_trace_however_it_is_wrapped(tmp_path: Path, text: str | bytes) -> None:
    path = saved(tmp_path, text, "trace.anything")
    assert guess_format(path) == "azure"
    assert told(path) == EXPECTED


def test_zstandard_and_parquet_with_dates(tmp_path: Path) -> None:
    import pandas as pd
    import pyarrow as pa

    path = tmp_path / "t.zst"
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(table().encode())
    assert told(path) == EXPECTED
    frame = pd.DataFrame(ROWS, columns=list(HEADER))
    frame.to_parquet(tmp_path / "t.parquet")
    assert told(tmp_path / "t.parquet") == EXPECTED
    pd.DataFrame([turn(3000 * n, 3000 + n, 512) for n in range(12)]).to_parquet(tmp_path / "m.pq")
    requests = list(read(tmp_path / "m.pq"))
    assert (requests[-1].arrival_s, len(requests[-1].prefix)) == (33.0, 5)


def test_a_compressed_file_that_is_cut_or_damaged(tmp_path: Path) -> None:
    whole = gzip.compress(table().encode())
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read(saved(tmp_path, whole[:-20])))
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read(saved(tmp_path, whole[:12] + b"\xff" * 9 + whole[21:])))


# ---------------------------------------------------------------- turns, texts, columns


def test_a_delay_is_the_time_to_think_of_a_session(tmp_path: Path) -> None:
    rows = (
        {"session_id": "a", "timestamp": 0, "input_length": 30, "output_length": 4},
        {"session_id": "a", "delay": 5000, "input_length": 10, "output_length": 4},
        {"session_id": "b", "timestamp": 1000, "input_length": 30, "output_length": 4},
    )
    reader = read(saved(tmp_path, lines(*rows)))
    assert reader.delayed
    requests = list(reader)
    assert [(r.session, r.arrival_s, r.think_s) for r in requests] == [("a", 0, None), ("b", 1, None), ("a", 5, 5)]
    source = Sessions(requests, think_s=1)
    first = {r.session: r for r in source.next(0.0, None)}
    (after,) = source.next(7.0, first["a"])
    assert (after.arrival_s, after.input_tokens) == (12.0, 44)
    with pytest.raises(ConfigError, match="no timestamp, and is not the next turn"):
        list(read(saved(tmp_path, lines(rows[1], rows[0]))))


def test_texts_are_counted_by_one_rule(tmp_path: Path) -> None:
    prompts = saved(tmp_path, lines({"prompt": "12345678", "output_tokens": 10}))
    assert guess_format(prompts) == "vllm-custom"
    assert told(prompts, characters_per_token=4) == [(0, 2, 10)]
    inputs = saved(tmp_path, lines(*({"timestamp": n, "text_input": "12345", "output_length": 3} for n in (0, 500))))
    assert told(inputs, characters_per_token=4) == [(0, 2, 3), (0.5, 2, 3)]
    for path in (prompts, inputs):
        with pytest.raises(ConfigError, match="the file holds text, not token counts; give --tokenizer"):
            read(path)


@pytest.mark.parametrize("key", ["conversation", "conversations", "messages"])
def test_roles_and_contents_read_like_from_and_value(tmp_path: Path, key: str) -> None:
    parts = [{"type": "text", "text": "1234"}, {"type": "text", "text": "5678"}]
    talk = [{"role": "system", "content": "1234"}, {"role": "user", "content": parts},
            {"role": "assistant", "content": "1234"}]  # fmt: skip
    path = saved(tmp_path, lines({"model": "m", key: talk}))
    assert guess_format(path) == "sharegpt"
    assert told(path, characters_per_token=4) == [(0, 3, 1)]


def test_any_table_by_the_names_of_its_columns(tmp_path: Path) -> None:
    path = saved(tmp_path, "sent,prompt_tokens,completion_tokens,who\n1500,100,20,x\n3000,200,30,y\n", "t.csv")
    with pytest.raises(
        ConfigError, match="--columns arrival_s=sent,input_tokens=prompt_tokens,output_tokens=completion_t"
    ):
        read(path)
    reader = read(path, columns="arrival_s=sent/1000, input_tokens=prompt_tokens, output_tokens=completion_tokens")
    assert [(r.arrival_s, r.input_tokens, r.output_tokens) for r in reader] == [(0, 100, 20), (1.5, 200, 30)]
    assert reader.remarks == ("columns not used: who",)
    dated = saved(tmp_path, lines({"t": "2024-05-01T10:00:00+02:00", "i": 5, "o": 6},
                                  {"t": "2024-05-01T08:00:02Z", "i": 5, "o": 6}))  # fmt: skip
    assert told(dated, columns={"arrival_s": "t", "input_tokens": "i", "output_tokens": "o"}) == [(0, 5, 6), (2, 5, 6)]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ("arrival_s=a", "input_tokens is missing"),
        ("arival_s=a,input_tokens=b,output_tokens=c", "did you mean 'arrival_s'"),
        ("arrival_s=a/0,input_tokens=b,output_tokens=c", "must be a number > 0"),
        ("session=a/2,input_tokens=b,output_tokens=c", "session is no quantity"),
        ("input_tokens=b,input_tokens=c", "named twice"),
        ("prefix=p,input_tokens=b,output_tokens=c", "give block_tokens"),
        ("", "write it like"),
    ],
)
def test_columns_that_are_refused(tmp_path: Path, columns: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read(saved(tmp_path, "a,b,c\n1,2,3\n", "t.csv"), columns=columns)


def test_llmservingsim_counts_nanoseconds(tmp_path: Path) -> None:
    path = saved(
        tmp_path, lines(*({"input_toks": 5, "output_toks": 6, "arrival_time_ns": n * 500_000_000} for n in (1, 2)))
    )
    assert told(path) == [(0, 5, 6), (0.5, 5, 6)]
