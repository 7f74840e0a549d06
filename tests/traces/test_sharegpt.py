"""Conversations of the ShareGPT kind: turns, tokens by the counter that was asked for, and errors."""

import json
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.types import ConfigError, Request
from traces import guess_format, read


def words(text: str) -> int:
    return len(text.split())


def talk(*messages: str, name: str | None = None) -> dict:
    """Messages like 'human: how are you'."""
    pairs = (message.split(": ", 1) for message in messages)
    found = {"conversations": [{"from": author, "value": text} for author, text in pairs]}
    return found if name is None else {"id": name, **found}


TALKS = [
    talk("human: one two three", "gpt: four five", "human: six", "gpt: seven eight nine ten", name="a"),
    talk("system: be brief", "user: hello", "assistant: hi", "human: unanswered", name="b"),
    talk("gpt: welcome back", "human: thanks", "gpt: yes", "gpt: anything else", "human: no", "gpt: bye now"),
    talk("human: nobody answers"),
]


def saved(folder: Path, conversations: object = TALKS, **how: object) -> Path:
    path = folder / "talks.json"
    path.write_text(conversations if isinstance(conversations, str) else json.dumps(conversations, **how))
    return path


def test_the_first_turn_of_each_conversation(tmp_path):
    reader = read(saved(tmp_path), tokenizer=words)
    assert next(iter(reader)) == Request(id=0, arrival_s=0.0, input_tokens=3, output_tokens=2)
    assert [(r.input_tokens, r.output_tokens) for r in reader] == [(3, 2), (3, 1), (3, 1)]
    assert reader.skipped == 1


def test_all_turns_are_sessions_of_new_text(tmp_path):
    reader = read(saved(tmp_path), tokenizer=words, turns="all")
    assert [(r.session, r.input_tokens, r.output_tokens) for r in reader] == [
        ("a", 3, 2),
        ("a", 1, 4),
        ("b", 3, 1),
        ("3", 3, 1),
        ("3", 3, 2),
    ]
    assert reader.skipped == 2


def test_answers_in_a_row_are_context_of_the_next_turn(tmp_path):
    path = saved(tmp_path, [talk("human: a", "gpt: b", "gpt: c", "gpt: d", "human: e", "gpt: f g")])
    requests = read(path, tokenizer=words, turns="all")
    assert [(r.input_tokens, r.output_tokens) for r in requests] == [(1, 1), (3, 2)]


def test_tokens_by_a_rule_only_where_it_is_asked_for(tmp_path):
    path = saved(tmp_path, [talk("human: 123456789", "gpt: 1234")])
    assert [(r.input_tokens, r.output_tokens) for r in read(path, characters_per_token=4)] == [(3, 1)]
    with pytest.raises(ConfigError, match=r"talks.json: the file holds text.*give --tokenizer .*characters_per_"):
        list(read(path))


@pytest.mark.parametrize("how", [{}, {"indent": 1}, {"separators": (",", ":")}])
@pytest.mark.parametrize("chunk", [1, 7, 2**16])
def test_however_the_array_is_written_and_cut(tmp_path, monkeypatch, how, chunk):
    monkeypatch.setattr("traces.wrapping.CHUNK", chunk)
    path = saved(tmp_path, **how)
    assert guess_format(path) == "sharegpt"
    assert len(list(read(path, tokenizer=words, turns="all"))) == 5


def test_one_conversation_a_line(tmp_path):
    path = saved(tmp_path, "\n".join(map(json.dumps, TALKS)))
    assert guess_format(path) == "sharegpt"
    assert len(list(read(path, tokenizer=words))) == 3


@given(st.lists(st.text(max_size=40), min_size=1, max_size=6))
def test_no_text_is_lost(tmp_path_factory, texts):
    path = saved(tmp_path_factory.getbasetemp(), [talk(*(f"human: {t}" for t in texts), "gpt: x")], ensure_ascii=True)
    rows = [r.input_tokens for r in read(path, tokenizer=lambda text: len(text) + 1)]
    assert rows == [sum(len(text) + 1 for text in texts)]


def test_memory_is_for_one_conversation(tmp_path):
    path = saved(tmp_path, [talk("human: " + "word " * 800, "gpt: " + "word " * 800)] * 1000)
    assert path.stat().st_size > 8_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in read(path, "sharegpt", characters_per_token=4)) == 1000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_tokenizer_file_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match="needs the package tokenizers; install it, or give characters_per_token"):
        read(saved(tmp_path), tokenizer="tokenizer.json")


def test_a_tokenizer_file_is_loaded_by_its_package(tmp_path, monkeypatch):
    encoder = SimpleNamespace(encode=lambda text, add_special_tokens: SimpleNamespace(ids=text.split()))
    package = SimpleNamespace(Tokenizer=SimpleNamespace(from_file=lambda path: encoder))
    monkeypatch.setitem(sys.modules, "tokenizers", package)
    (tmp_path / "tokenizer.json").write_text("{}")
    requests = list(read(saved(tmp_path), tokenizer=str(tmp_path / "tokenizer.json")))
    assert [(r.input_tokens, r.output_tokens) for r in requests] == [(3, 2), (3, 1), (3, 1)]
    with pytest.raises(ConfigError, match=r"absent.json' is not a file"):
        read(saved(tmp_path), tokenizer="absent.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"conversations": 3}]', "conversation 1 is .*; expected an object with one list conversations"),
        ('[{"conversations": []}, 5]', "conversation 2 is 5"),
        (
            '[{"conversations": [{"from": "humn", "value": "a"}]}]',
            "field from .or role. is 'humn'; did you mean 'human'",
        ),
        ('[{"conversations": [{"from": "human", "value": null}]}]', "conversation 1: message .* expected texts"),
        ('[{"conversations": []}, {"conversations": [', "item 2 is .*; expected JSON"),
        ('[{"conversations": []}]', r"no request in the file \(0 without tokens left out\)"),
    ],
)
def test_malformed_conversations(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        list(read(saved(tmp_path, text), "sharegpt", characters_per_token=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": words, "characters_per_token": 4}, "drop one"),
        ({"characters_per_token": 0}, "characters_per_token is 0; expected a finite number > 0"),
        ({"turns": "al"}, "turns is 'al'; did you mean 'all'"),
    ],
)
def test_options_are_checked_at_once(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        read(saved(tmp_path), **options)
