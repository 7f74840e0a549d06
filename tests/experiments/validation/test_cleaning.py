"""What a server says is shown without the key and without control characters, whatever it does."""

import pytest

from experiments.validation.cleaning import clean
from experiments.validation.completions import AnswerError, Listener

KEY = "sk-secret-0123456789"


@pytest.mark.parametrize(
    "text",
    [
        KEY,
        f"bad key {KEY}!",
        KEY[:-1],
        KEY[3:],
        "sk-\nsecret-\t0123456789",
        f"\\u0073{KEY[1:]}",
        "sk-sec\x00ret-0123456789",
    ],
)
def test_no_part_of_a_key_is_repeated(text: str) -> None:
    shown = clean(text, KEY)
    dense = "".join(shown.split())
    assert not any(KEY[start : start + 8] in dense for start in range(len(KEY) - 7))


def test_controls_become_question_marks_and_long_texts_are_cut() -> None:
    assert clean("\x1b[31mred\n\x1b]0;pwn\x07 end", None) == "?[31mred ?]0;pwn? end"
    assert len(clean("x" * 1000, None)) == 203
    assert clean("a plain message", KEY) == "a plain message"
    assert clean("key ab", "ab") == "key **"


TOKEN = b'data: {"choices":[{"text":"x"}]}\n\n'


@pytest.mark.parametrize(
    ("received", "says"),
    [
        (TOKEN * 100, "events for 2 tokens"),
        (b": ping\n\n" * 1_000_000, "bytes for 2 tokens"),
        ((b"data: " + b"x" * 100_000 + b"\n") * 20, "an event of more than 1 MiB"),
        (b'data: {"choices":[],"usage":{"completion_tokens":99999999999}}\n\n', "counts 1e.11 tokens"),
        (b'data: {"choices":[],"usage":{"prompt_tokens":1000000000000000000000}}\n\n', "counts 1e.21 tokens"),
    ],
)
def test_an_answer_is_bounded_in_bytes_events_and_counts(received: bytes, says: str) -> None:
    with pytest.raises(AnswerError, match=says):
        Listener(most_tokens=2).hear(received, 0.0)
