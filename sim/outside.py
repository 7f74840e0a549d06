"""The one guarded reader of files that people bring: YAML, JSON, TOML and plain text, from a path that may be anything.

Every function raises ``ConfigError`` in one line that names the file and what is wrong with it, and returns plain
data that is safe to walk: at most ``DEEPEST`` levels deep, without a key that stands twice, without a number
that no field could take. What the data means is checked by whoever asked for it.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from sim.types import ConfigError

MOST_BYTES = 2**26
"""Of a file whose reader does not say otherwise: plans, profiles and configurations are far smaller."""
MOST_RESULT_BYTES = 2**30
"""Of results and logs: every token of a long benchmark."""
DEEPEST = 64
LONGEST_INTEGER = 80  # digits: a SHA-256 as a number has 78
MOST_VALUES = 2**22  # of a YAML file with its aliases written out


@contextmanager
def opening(path: str | Path, what: str) -> Iterator[None]:
    """Turns what the system says about a path that cannot be read into a ``ConfigError`` that names it."""
    shown = clip(str(path))
    try:
        yield
    except UnicodeDecodeError:
        raise ConfigError(f"{shown}: not a text file; a {what} is text in UTF-8") from None
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{shown}: cannot be read: {reason}; give the path of a {what} file") from None
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        raise ConfigError(f"{shown}: a path cannot hold a NUL character; give the path of a {what} file") from None


def is_file(path: str | Path) -> bool:
    """Whether there is such a file; False too for what cannot be a path (too long, a NUL, a closed folder)."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def exists(path: str | Path) -> bool:
    """Whether there is such a file or folder; False for what cannot be a path."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def clip(text: str, most: int = 160) -> str:
    """On one line, without control characters, cut where it would flood the screen."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[: 2 * most])
    return shown if len(text) <= most and len(shown) <= most else f"{shown[: most - 4]} ..."


def read_text(path: str | Path, what: str, most_bytes: int = MOST_BYTES) -> str:
    """The text of a file in UTF-8, a byte-order mark dropped. ``what`` it should be: plan, profile, ..."""
    with opening(path, what):
        with Path(path).open("rb") as file:
            data = file.read(most_bytes + 1)
        if len(data) > most_bytes:
            raise ConfigError(f"{clip(str(path))}: longer than {most_bytes >> 20} MiB; a {what} file is smaller")
        return data.decode("utf-8-sig")


def read_json(path: str | Path, what: str, most_bytes: int = MOST_BYTES, *, mend: str = "copy it anew") -> Any:
    """The data of a JSON file."""
    return parse_json(read_text(path, what, most_bytes), clip(str(path)), mend=mend)


def read_yaml(path: str | Path, what: str) -> Any:
    """The data of a YAML file."""
    return parse_yaml(read_text(path, what), clip(str(path)), what)


def read_toml(path: str | Path, what: str) -> dict[str, Any]:
    """The data of a TOML file."""
    try:
        found: dict[str, Any] = _shallow(tomllib.loads(read_text(path, what)), str(path))
        return found
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {clip(str(error))}") from None


def parse_json(text: str | bytes, place: str, *, mend: str = "copy it anew") -> Any:
    """The value of a JSON text; ``place`` names it in errors."""
    try:
        return _shallow(json.loads(text, parse_int=_integer, object_pairs_hook=_mapping), place)
    except (RecursionError, MemoryError):
        raise ConfigError(f"{place}: nested too deeply; expected at most {DEEPEST} levels") from None
    except ConfigError as error:
        raise ConfigError(f"{place}: {str(error).removeprefix(f'{place}: ')}") from None
    except ValueError as error:
        raise ConfigError(f"{place}: is not JSON ({clip(str(error))}); {mend}") from None


def parse_yaml(text: str, place: str, what: str) -> Any:
    """The value of a YAML text. Dates, sexagesimals (``1:30``) and numbers that begin with 0 stay text: nothing here
    wants them, and a name may look like one."""
    import yaml

    try:
        return _shallow(yaml.load(text, _loader()), place)
    except RecursionError:
        raise ConfigError(f"{place}: nested too deeply; expected at most {DEEPEST} levels") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "check the text"
        raise ConfigError(f"{place}{line}: not valid YAML: {clip(str(problem))}") from None
    except ValueError as error:
        raise ConfigError(f"{place}: not a valid {what}: {clip(str(error))}") from None


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_INTEGER:
        raise ConfigError(f"a whole number of {len(digits)} digits ({digits[:12]}...); no field takes that")
    return int(digits)


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ConfigError(f"the key {clip(repr(twice), 60)} stands twice; drop one")
    return found


def _shallow(data: Any, place: str) -> Any:
    """The data, if it is at most ``DEEPEST`` levels deep: what walks it later may then recurse."""
    level = [data]
    for _ in range(DEEPEST):
        level = [item for value in level for item in _inside(value) if isinstance(item, dict | list)]
        if not level:
            return data
    raise ConfigError(f"{place}: nested too deeply; expected at most {DEEPEST} levels")


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


@cache
def _loader() -> Any:
    """PyYAML's safe loader with what surprises people taken out of it."""
    import yaml

    base: Any = yaml.SafeLoader

    class Loader(base):  # type: ignore[misc]
        def get_single_node(self) -> Any:
            node = super().get_single_node()
            if node is not None:
                _count_values(node, {}, set())
            return node

        def flatten_mapping(self, node: Any) -> None:
            seen: set[Any] = set()
            for key, _ in node.value:
                name = (key.tag, key.value if isinstance(key.value, str) else id(key))
                if name in seen:
                    problem = f"the key {clip(repr(key.value), 60)} stands twice; drop one"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(name)
            super().flatten_mapping(node)

    Loader.yaml_implicit_resolvers = _plain_forms(base.yaml_implicit_resolvers)
    Loader.add_constructor("tag:yaml.org,2002:int", _constructed(base.construct_yaml_int))
    return Loader


def _plain_forms(resolvers: dict[Any, Any]) -> dict[Any, Any]:
    """What looks like a number: whole ones in decimal and hexadecimal, and fractions; no octals, binaries, base 60 or
    dates. A fraction needs its point, as
    PyYAML has it: it writes the text 1e3 without quotes, and fields take such a text for the number."""
    integer = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
    power = r"(?:[eE][-+]?[0-9]+)?"
    fraction = re.compile(
        rf"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*{power}|[-+]?\.[0-9][0-9_]*{power}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    )
    forms = {"tag:yaml.org,2002:int": integer, "tag:yaml.org,2002:float": fraction}
    return {
        first: [(tag, forms.get(tag, form)) for tag, form in pairs if tag != "tag:yaml.org,2002:timestamp"]
        for first, pairs in resolvers.items()
    }


def _constructed(construct: Callable[[Any, Any], int]) -> Callable[[Any, Any], int]:
    """As PyYAML reads whole numbers, but for those that no field could take."""
    import yaml

    def integer(loader: Any, node: Any) -> int:
        if len(str(node.value)) > LONGEST_INTEGER:
            problem = f"a whole number of {len(node.value)} digits ({node.value[:12]}...); no field takes that"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return construct(loader, node)

    return integer


def _count_values(node: Any, sizes: dict[int, int], above: set[int]) -> int:
    """How many values a node stands for with its aliases written out; errors for too many, and for a circle."""
    import yaml

    if id(node) in sizes:
        return sizes[id(node)]
    if id(node) in above:
        raise yaml.constructor.ConstructorError(None, None, "an alias that holds itself; write it out", node.start_mark)
    children = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else (
        node.value if isinstance(node, yaml.SequenceNode) else [])  # fmt: skip
    size = 1 + sum(_count_values(child, sizes, above | {id(node)}) for child in children)
    if size > MOST_VALUES:
        problem = f"more than {MOST_VALUES:,} values; its aliases multiply"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    sizes[id(node)] = size
    return size
