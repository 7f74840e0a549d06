"""The guarded reader: what people bring is read as it is meant, or refused in one line that names the file."""

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.outside import is_file, parse_json, parse_yaml, read_json, read_text, read_toml, read_yaml
from sim.types import ConfigError


def test_the_smallest_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1\nb: [x, 1.5, true, null]\n")
    (tmp_path / "a.json").write_text('\ufeff{"a": 1}', encoding="utf-8")
    (tmp_path / "a.toml").write_text("a = 1\n")
    assert read_yaml(tmp_path / "a.yaml", "scenario") == {"a": 1, "b": ["x", 1.5, True, None]}
    assert read_json(tmp_path / "a.json", "profile") == {"a": 1}
    assert read_toml(tmp_path / "a.toml", "catalogue") == {"a": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:30", "1:30"),  # YAML 1.1 reads 90
        ("010", "010"),  # and 8
        ("2020-13-45", "2020-13-45"),
        ("2020-01-02", "2020-01-02"),
        ("1e3", "1e3"),
        ("1_000", 1000),
        ("0x10", 16),
        ("-.5", -0.5),
        ("0.5", 0.5),
        ("1.", 1.0),
        ("6.5e-3", 0.0065),
    ],
)
def test_numbers_are_numbers_and_the_rest_is_text(text: str, value: object) -> None:
    found = parse_yaml(f"a: {text}", "f.yaml", "scenario")["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: not valid YAML: the key 'a' stands twice"),
        ("a: {b: 1, 'b': 2}", "the key 'b' stands twice"),
        (f"a: {'9' * 5000}", "5000 digits"),
        ("a: &x [*x]", "an alias that holds itself"),
        ("[" * 3000, "nested too deeply"),
        ("a: " + "[" * 70 + "]" * 70, "nested too deeply"),
        ("a: b: c", "f.yaml:1: not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("x0: &x0 [1, 1]\n" + "".join(f"x{n + 1}: &x{n + 1} [{', '.join([f'*x{n}'] * 9)}]\n" for n in range(12)),
         "its aliases multiply"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)  # fmt: skip
def test_yaml_that_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"^f\.yaml") as refused:
        parse_yaml(text, "f.yaml", "scenario")
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * 70 + "]" * 70, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "5000 digits"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ("{x", "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_json_that_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"^f\.json: ") as refused:
        parse_json(text, "f.json")
    assert says in str(refused.value)


def test_paths_that_are_none(tmp_path: Path) -> None:
    for path in ("a\0b", "x" * 5000, str(tmp_path), str(tmp_path / "absent")):
        assert not is_file(path)
        with pytest.raises(ConfigError):
            read_text(path, "plan")
    (tmp_path / "big").write_bytes(b"x" * 2000)
    with pytest.raises(ConfigError, match="longer than"):
        read_text(tmp_path / "big", "plan", 1000)
    (tmp_path / "bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file; a plan is text in UTF-8"):
        read_text(tmp_path / "bin", "plan")


PLAIN = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text()


@given(st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)))
def test_what_pyyaml_writes_is_read_back(value: object) -> None:
    import yaml

    assert parse_yaml(yaml.safe_dump(value, allow_unicode=True), "f.yaml", "scenario") == value


@given(st.text(max_size=200))
def test_any_text_is_data_or_an_error_on_purpose(text: str) -> None:
    for parse in (lambda: parse_yaml(text, "f", "plan"), lambda: parse_json(text, "f")):
        with suppress(ConfigError):
            parse()
