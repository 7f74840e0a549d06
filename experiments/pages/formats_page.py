"""``docs/formats.md``: every file format that is read, from the readers themselves.

``python -m experiments.pages.formats_page`` prints it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator

from calibrate.commands_import import FORMATS as IMPORTS
from experiments.readers.others import REFUSED
from experiments.readers.read import READERS
from sim.outside import DEEPEST, LONGEST_INTEGER, MOST_BYTES, MOST_RESULT_BYTES
from traces.formats import FORMATS, Format
from traces.formats.base import TICKS_PER_S, TIME_UNITS

HEAD = """# Formats

What is read, in which units, and what is left aside. This page is written from the readers
(`python -m experiments.pages.formats_page > docs/formats.md`).

## Traces

A trace is a table with a header (separated by commas, semicolons, tabs or bars; quoted or not; comment lines with
`#`), JSON lines, one JSON array, or Parquet; plain, or compressed by gzip, Zstandard, bzip2 or xz. All of it is told
from the content, and so are the format, the unit of time (epochs, rates) and the size of prefix blocks (how many hashes
a prompt has). Where two readings remain, both are named with their rates, and `--time-unit`, `--block-tokens` or
`--format` decides. Columns that are not used are listed, and figures outside physical sense are a warning.
"""
COLUMNS = """
Any other table is read by the names of its columns:

```csv log.csv
ts_ms,prompt,completion
1500,100,20
3000,200,30
```

```bash
phasewise trace stats log.csv --columns arrival_s=ts_ms/1000,input_tokens=prompt,output_tokens=completion
```

In a scenario the same stands under `workload.format_options`. `NAME/1000` and `NAME*60` bring a number into seconds or
tokens; dates are seconds since 1970. Text is counted with `--tokenizer FILE` (a `tokenizer.json`) or
`--characters-per-token 4`.
"""
RESULTS = """
## Results

`phasewise compare-run SCENARIO RESULT` and `python -m experiments.fidelity.unseen RESULT` read one JSON object, one a
line, or a list, compressed or not; `--benchmark N` chooses one of several. Latencies are in seconds afterwards; what
can only be in another unit is refused, and so is a file of another model size, GPU or tensor parallelism than the
scenario's (`--despite` compares all the same).
"""
OURS = f"""
## Our own files

Scenarios, plans and events are YAML; profiles, and a model's `config.json`, are JSON. No key may stand twice; nothing
is nested deeper than {DEEPEST} levels; a whole number has at most {LONGEST_INTEGER} digits; a file has at most
{MOST_BYTES >> 20} MiB (a result {MOST_RESULT_BYTES >> 20} MiB). Dates, `1:30` and `010` are text, true and false are
not numbers. Times are at most 1e9 s, counts at most 1e9, a cluster at most 65,536 GPUs.
"""


def page() -> str:
    """The page's text."""
    lines = [
        HEAD,
        *table(("format", "what it is", "arrival", "read", "options"), _traces()),
        COLUMNS,
        RESULTS,
        *table(("tool", "read", "units in the file", "left aside"), _results()),
        "",
        "Known, and refused by name:",
        "",
        *(f"- {reader.tool}: {reader.leaves}" for reader in REFUSED),
        "",
        "## Measurements",
        "",
        "`phasewise calibrate import FORMAT PATH --out FILE` makes a latency profile of:",
        "",
        *table(("format", "path"), IMPORTS.items()),
        OURS,
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """A Markdown table, an empty line before and after it."""
    names = list(header)
    yield ""
    yield f"| {' | '.join(names)} |"
    yield "|" + "---|" * len(names)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


def _traces() -> Iterator[tuple[str, ...]]:
    for name, make in FORMATS.items():
        options = list(inspect.signature(make).parameters)
        what = " ".join((inspect.getdoc(make) or "").split("\n\n")[0].split())
        if name == "columns":
            yield f"`{name}`", what, "as named", "as named", _code(options)
            continue
        form = make()
        read = {column.name: "" for column in form.columns if column.field != "arrival_s"}
        yield f"`{name}`", what, _arrival(form), _code(read), _code(options)


def _arrival(form: Format) -> str:
    column = next((column.name for column in form.columns if column.field == "arrival_s"), None)
    if column is None:
        return "none: all at 0"
    unit = next((unit for unit, per_s in TIME_UNITS.items() if per_s == form.per_s), None)
    if form.per_s == TICKS_PER_S:
        unit = "a date"
    return f"`{column}`, {unit}" + (" unless the content says otherwise" if form.open_unit else "")


def _results() -> Iterator[tuple[str, ...]]:
    for reader in READERS:
        if reader not in REFUSED:
            yield reader.tool, reader.reads, reader.unit, reader.leaves


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    print(page(), end="")
