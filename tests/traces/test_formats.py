"""Reading traces: every format gives the same kind of stream, and bad files say where and why."""

import time
import tracemalloc
from pathlib import Path

import pytest

from sim.types import ConfigError, Request
from traces import FORMATS, guess_format, read

AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:00.0000001,879,55
"""

# One file per format: name, suffix, text, and the (arrival_s, input_tokens, output_tokens) it stands for.
EXAMPLES = [
    ("azure", ".csv", AZURE, [(0.0, 374, 44), (4.314579, 396, 109), (13.3194101, 879, 55)]),
    (
        "mooncake",
        ".jsonl",
        '{"timestamp": 3000, "input_length": 1030, "output_length": 5, "hash_ids": [7, 8, 9]}\n'
        '{"timestamp": 3000, "input_length": 400, "output_length": 6, "hash_ids": [7]}\n'
        '{"timestamp": 4500, "input_length": 512, "output_length": 1, "hash_ids": [3]}\n',
        [(0.0, 1030, 5), (0.0, 400, 6), (1.5, 512, 1)],
    ),
    (
        "burstgpt",
        ".csv",
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,,1.5,ChatGPT,472,18,490,API log\n45.5,12,9,GPT-4,1087,230,1317,Conversation log\n",
        [(0.0, 472, 18), (40.5, 1087, 230)],
    ),
    (
        "splitwise-sim",
        ".csv",
        "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n"
        "0,2,0,0.25,1,374,44\n1,2,0,0.75,1,396,109\n",
        [(0.0, 374, 44), (0.5, 396, 109)],
    ),
    (
        "vidur",
        ".csv",
        "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,374,44\n4.25,396.0,109.0\n",
        [(0.0, 374, 44), (4.25, 396, 109)],
    ),
    (
        "vidur-lengths",
        ".csv",
        "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3772,54,3826,69.8\n2015,156,2171,12.9\n",
        [(0.0, 3772, 54), (0.0, 2015, 156)],
    ),
    (
        "sharegpt",
        ".json",
        '[{"id": "a", "conversations": [{"from": "human", "value": "12345678"}, {"from": "gpt", "value": "1234"}]}]',
        [(0.0, 2, 1)],
    ),
    (
        "phasewise",
        ".csv",
        "arrival_s,input_tokens,output_tokens\n0.5,10,2\n0.75,20,3\n",
        [(0.5, 10, 2), (0.75, 20, 3)],
    ),
]
ELSEWHERE = {"bailian", "llmservingsim", "vllm-custom", "columns"}
"""Tested in test_guess.py."""
MINIMAL = """\
{"timestamp": 100, "input_length": 256, "output_length": 128}
{"timestamp": 102, "input_length": 1, "output_length": 2}
"""


def saved(folder: Path, text: str, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path, **options: object) -> str:
    with pytest.raises(ConfigError) as error:
        list(read(path, **options))
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(path), "FILE")


def test_a_trace_file_is_a_stream_of_requests(tmp_path):
    requests = list(read(saved(tmp_path, AZURE)))
    assert requests[0] == Request(id=0, arrival_s=0.0, input_tokens=374, output_tokens=44)
    assert [request.id for request in requests] == [0, 1, 2]


@pytest.mark.parametrize(("name", "suffix", "text", "expected"), EXAMPLES, ids=[example[0] for example in EXAMPLES])
def test_every_format_is_recognised_and_read(tmp_path, name, suffix, text, expected):
    path = saved(tmp_path, text, "trace" + suffix)
    assert guess_format(path) == name
    options = {"characters_per_token": 4} if name == "sharegpt" else {}
    found = [(request.arrival_s, request.input_tokens, request.output_tokens) for request in read(path, **options)]
    assert found == expected


def test_every_format_is_covered_here():
    assert {example[0] for example in EXAMPLES} | {"aiperf", "guidellm"} | ELSEWHERE == set(FORMATS)


def test_the_time_unit_of_bare_replay_files_must_be_told(tmp_path):
    path = saved(tmp_path, MINIMAL, "trace.jsonl")
    assert refused(path) == (
        "FILE: the file fits several formats (0.5 requests/s if they are in s, 500 requests/s if they are in ms); "
        "name one of: aiperf, guidellm"
    )
    assert [request.arrival_s for request in read(path, "guidellm")] == [0.0, 2.0]
    assert [request.arrival_s for request in read(path, "aiperf")] == [0.0, 0.002]
    assert [request.arrival_s for request in read(path, "aiperf", time_unit="us")] == [0.0, 2e-6]


def test_mooncake_keeps_the_hashes_of_full_blocks(tmp_path):
    path = saved(tmp_path, EXAMPLES[1][2], "trace.jsonl")
    assert [request.prefix for request in read(path)] == [(7, 8), (), (3,)]
    assert [request.prefix_block_tokens for request in read(path)] == [512, None, 512]
    assert [request.prefix for request in read(path, block_tokens=16)] == [(7, 8, 9), (7,), (3,)]


def test_sessions_and_classes_are_kept(tmp_path):
    requests = list(read(saved(tmp_path, EXAMPLES[2][2])))
    assert [(request.session, request.klass) for request in requests] == [(None, "ChatGPT"), ("12", "GPT-4")]


def test_burstgpt_before_version_2_has_no_sessions(tmp_path):
    text = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,API log\n"
    assert [request.session for request in read(saved(tmp_path, text))] == [None]


@pytest.mark.parametrize(
    ("written", "arrival_s"),
    [
        ("2024-05-10 00:00:01.009930+00:00", 1.00993),
        ("2024-05-10 00:00:01+00:00", 1.0),
        ("2024-05-10 02:00:01.5+02:00", 1.5),
        ("2024-05-10T00:00:02Z", 2.0),
        ("2024-05-11 00:00:00.0000000", 86400.0),
    ],
)
def test_azure_dates_with_fractions_and_zones(tmp_path, written, arrival_s):
    text = f"TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.0000000,1,1\n{written},1,1\n"
    assert list(read(saved(tmp_path, text)))[1].arrival_s == arrival_s


@pytest.mark.parametrize("written", ["2024-05-10", "2024-13-10 00:00:00", "2024-05-10 00:00:61.0000000", "12.5", ""])
def test_what_is_not_a_date_is_refused(tmp_path, written):
    text = f"TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.0000000,1,1\n{written},1,1\n"
    assert refused(saved(tmp_path, text)).startswith(f"FILE:3: field TIMESTAMP is '{written}'; expected a time such as")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "FILE: the file fits no known format (found no names)"),
        ('[{"a": 1}]', "FILE: the file fits no known format (found a)"),
        ('{"timestamp": ', "FILE: item 1 is '{\"timestamp\": '; expected JSON"),
        (" \n", "FILE: the file is empty; expected a trace"),
    ],
)
def test_json_that_is_no_trace(tmp_path, text, message):
    assert refused(saved(tmp_path, text, "trace.json")).startswith(message)


def test_requests_without_tokens_are_left_out_and_counted(tmp_path):
    reader = read(saved(tmp_path, AZURE.replace("374,44", "374,0")))
    assert [request.input_tokens for request in reader] == [396, 879]
    assert reader.skipped == 1
    assert next(iter(reader)).arrival_s == 0.0


def test_a_reader_can_be_read_again(tmp_path):
    reader = read(saved(tmp_path, AZURE.replace("374,44", "374,0")))
    assert list(reader) == list(reader)
    assert reader.skipped == 1


def test_limit_reads_no_further(tmp_path):
    path = saved(tmp_path, AZURE + "not a time,1,1\n")
    assert len(list(read(path, limit=3))) == 3
    assert refused(path, limit=4).startswith("FILE:5: field TIMESTAMP is 'not a time'")
    assert refused(path, limit=0) == "FILE: limit is 0; expected a whole number >= 1, or None for all"


def test_order_is_checked_or_made(tmp_path):
    header, first, second, third = AZURE.splitlines()
    path = saved(tmp_path, "\n".join([header, second, third, first]))
    assert refused(path) == "FILE:4: arrives before the line above it; sort the file or read with sort=True"
    assert [request.input_tokens for request in read(path, sort=True)] == [374, 396, 879]
    assert next(iter(read(path, sort=True))).arrival_s == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "arrival_s,input_tokens,output_tokens\n0,5.5,2\n",
            "FILE:2: field input_tokens is '5.5'; expected a whole number >= 0",
        ),
        (
            "arrival_s,input_tokens,output_tokens\n0,5,-2\n",
            "FILE:2: field output_tokens is '-2'; expected a whole number >= 0",
        ),
        (
            "arrival_s,input_tokens,output_tokens\nnan,5,2\n",
            "FILE:2: field arrival_s is 'nan'; expected a number of seconds",
        ),
        ("arrival_s,input_tokens,output_tokens\n1,5\n", "FILE:2: the line has 2 cells; expected 3, as in the header"),
        (
            "arrival_s,input_tokens,output_tokens\n-1,5,2\n",
            "FILE:2: request 0: arrival_s is -1.0; it must be a number >= 0",
        ),
        (
            "arrival_s,input_tokens,output_tokens\n1,5,0\n",
            "FILE:2: request 0: input_tokens 5 and output_tokens 0 must both be >= 1",
        ),
        (
            "arrival_s,input_tokens,output_tokens,prefix\n1,5,1,3 4\n",
            "FILE:2: request 0: prefix hashes need prefix_block_tokens",
        ),
        ("arrival_s,input_tokens,output_tokens\n", "FILE: no request in the file (0 without tokens left out)"),
        ("", "FILE: the file is empty; expected a trace"),
        ("arrival_s,input_tokens,output_tokens,sesion\n", "FILE:1: column 'session' is absent; rename 'sesion'"),
    ],
)
def test_malformed_files_say_where_and_why(tmp_path, text, message):
    assert refused(saved(tmp_path, text)) == message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2]", "FILE:2: the line is '[1, 2]'; expected one JSON object"),
        ('{"timestamp": ', "FILE:2: the line is '{\"timestamp\":'; expected one JSON object"),
        ('{"input_length": 5, "output_length": 6}', "FILE:2: field timestamp is absent; expected a number, in s"),
        (
            '{"timestamp": 101, "input_length": true, "output_length": 6}',
            "FILE:2: field input_length is True; expected a whole number >= 0",
        ),
    ],
)
def test_malformed_json_lines(tmp_path, line, message):
    path = saved(tmp_path, MINIMAL.splitlines()[0] + "\n" + line + "\n", "trace.jsonl")
    assert refused(path, format="guidellm") == message


def test_wrong_names_are_told_with_the_nearest_right_one(tmp_path):
    path = saved(tmp_path, AZURE)
    assert refused(path, format="azur").startswith("FILE: format is 'azur'; did you mean 'azure'?")
    assert refused(path, format="azure", block=3) == "FILE: format azure has no option 'block'; it has none"
    assert "did you mean 'block_tokens'?" in refused(path, format="mooncake", block_token=3)
    assert "did you mean 'ms'?" in refused(path, format="mooncake", time_unit="msec")
    assert refused(path, format="vidur").startswith("FILE:1: column 'arrived_at' is absent; found TIMESTAMP")
    assert "fits no known format (found a, b)" in refused(saved(tmp_path, "a,b\n1,2\n"))


def test_files_that_cannot_be_read(tmp_path):
    assert refused(tmp_path / "absent.csv", format="azure").endswith("cannot be read: No such file or directory")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read: 'utf-8' codec" in refused(tmp_path / "bytes.csv")
    (tmp_path / "text.parquet").write_bytes(b"PAR1 and no more")
    assert "text.parquet: cannot be read:" in refused(tmp_path / "text.parquet").replace("FILE", "text.parquet")


def long_azure_trace(folder: Path, lines: int) -> Path:
    body = "".join(
        f"2023-11-16 18:{i // 1200 % 60:02}:{i % 1200 // 20:02}.{i % 20:02}34567,{i % 999 + 1},7\n"
        for i in range(lines)
    )
    return saved(folder, AZURE.splitlines()[0] + "\n" + body)


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = long_azure_trace(tmp_path, 30_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read(path)) == 30_000
        assert tracemalloc.get_traced_memory()[1] < 500_000  # the requests alone would be about 5 MB
    finally:
        tracemalloc.stop()


def test_reading_is_quick(tmp_path):
    path = long_azure_trace(tmp_path, 19_366)
    spent_s = []
    for _ in range(3):
        start_s = time.process_time()
        assert len(list(read(path))) == 19_366
        spent_s.append(time.process_time() - start_s)
    assert min(spent_s) < 0.3  # about 0.09 s on the machine it was written on


def test_the_published_traces_have_their_published_sizes(shared_data):
    azure = list(read(shared_data / "traces" / "azure" / "AzureLLMInferenceTrace_conv.csv"))
    assert len(azure) == 19366
    assert azure[0] == Request(id=0, arrival_s=0.0, input_tokens=374, output_tokens=44)
    assert azure[-1].arrival_s == 3501.721937
    mooncake = list(read(shared_data / "traces" / "mooncake" / "conversation_trace.jsonl"))
    assert len(mooncake) == 12031
    assert len(mooncake[0].prefix) == 6758 // 512
