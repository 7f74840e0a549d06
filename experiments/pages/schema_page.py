"""``docs/reference/scenario.md``: every key of a scenario file, out of the models that check it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from inspect import cleandoc
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from experiments.scenario.file import Scenario
from experiments.scenario.part import parts

UNITS = {
    "_s": "s", "_us": "µs", "_gbps": "10⁹ bits/s", "gbps": "10⁹ bits/s", "usd_per_hour": "$/h",
    "usd_per_hour_spot": "$/h", "rate": "requests/s", "_tokens": "tokens", "_len": "tokens", "block_size": "tokens",
    "input": "tokens", "output": "tokens", "_seqs": "sequences", "_blocks": "blocks", "count": "GPUs",
    "nodes": "machines", "requests": "requests", "limit": "requests", "clients": "clients", "turns": "turns",
    "attainment": "share", "gpu_memory_utilization": "share",
}  # fmt: skip
"""By a key's name, or by its end where that begins with ``_``."""
TOP = "The file"
INTRODUCTION = """\
# The scenario file

One YAML file describes one experiment: a model on a cluster, the requests that come, and the system that serves them.
This page lists every key; `phasewise schema --markdown` prints it, `phasewise schema` the JSON schema. An unknown key
is an error that names the nearest key there is. `--set key.sub=value` changes a key on the command line
(`--set cluster.nodes[0].count=4`).

```yaml
model: llama-2-70b
cluster:
  nodes: [{gpu: A100-80G-SXM, count: 8, nodes: 2}]
  links: {inter_node: {gbps: 200, latency_us: 10}}
workload: {trace: sample, rate: 4}
system: {name: splitwise, prefill: {replicas: 1, tp: 8}, decode: {replicas: 1, tp: 8}}
slo: {ttft_s: 2, tpot_s: 0.1}
```

A workload answers three questions apart: *which* requests (`trace`, `generate`, or a `mix` of classes), *when* they
come (as recorded, or drawn at a `rate`), and *who waits* for whom (nobody, the clients of a `closed_loop`, the turns
of `sessions`):

```yaml
workload:                       # 64 clients who think for 20 s on average
  generate: {requests: 2000, input: {mean: 1155, median: 1020}, output: {mean: 211, median: 129}}
  closed_loop: {clients: 64, think_s: 20}
```

```yaml
workload:                       # conversations whose prompts repeat what was said, beside bursts of long documents
  mix:
    chat:
      generate: {requests: 500, input: {fixed: 150}, output: {mean: 211, median: 129}, turns: {uniform: [1, 8]}}
      share: 1
    documents:
      generate: {requests: 1000, input: {uniform: [4000, 8000]}, output: {fixed: 300}}
      share: 2
      priority: 1
      arrivals: bursts
      arrival_options: {on_s: 10, off_s: 50}
  rate: 3                       # 1 conversation/s and 2 documents/s; each class ends when it is used up
  sessions: {think_s: 30}
slo: {ttft_s: 1, tpot_s: 0.05, classes: {documents: {e2e_s: 120, attainment: 0.5}}}
```

A saved run is a workload too: `phasewise export RUN_DIR --trace log.csv` writes its requests with the times at which
they came, and `workload: {trace: log.csv}` gives the same run again, also where it was a closed loop or sessions (if
the layout is set by hand: a planner that looks at the rate may choose another). `phasewise trace workload SCENARIO OUT`
writes what a workload asks without a simulation. For a closed loop a planner is told a rate of clients / (think_s +
10 s), since nothing has run yet.

Relative paths are those beside the scenario file, else those in the current folder.

"""


def page() -> str:
    """The page as Markdown: one table per mapping, each before what it holds."""
    sections = [_section(title, model) for title, model in _models("", Scenario)]
    return INTRODUCTION + "\n".join(sections)


def _models(place: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """(its place in the file, model) of each mapping, each model once."""
    found: dict[type[BaseModel], list[str]] = {}
    todo = [(place, model)]
    while todo:
        place, model = todo.pop(0)
        places = found.setdefault(model, [])
        places.append(place)
        if len(places) == 1:
            todo[:0] = [
                (f"{place}.{name}".removeprefix(".") + mark, part)
                for name, field in model.model_fields.items()
                for part, mark in parts(field.annotation)
            ]
    return ((", ".join(f"`{place}`" for place in places if place) or TOP, model) for model, places in found.items())


def _section(title: str, model: type[BaseModel]) -> str:
    rows = [_row(name, field) for name, field in model.model_fields.items()]
    said = cleandoc(model.__doc__ or "").split("\n\n")[0].replace("\n", " ").replace("``", "`")
    lines = [
        f"## {title}",
        "",
        said,
        "",
        "| key | meaning | unit | default | example |",
        "|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, field: FieldInfo) -> str:
    choices = _choices(field.annotation)
    meaning = (field.description or "") + (f" (one of {', '.join(choices)})" if choices else "")
    example = f"`{name}: {_yaml((field.examples or [None])[0])}`"
    cells = (f"`{name}`", meaning, unit(name), "required" if field.is_required() else _default(field), example)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def unit(name: str) -> str:
    """Unit of a key; nothing for what has none."""
    ends = (UNITS[end] for end in UNITS if end.startswith("_") and name.endswith(end))
    return UNITS.get(name) or next(ends, "")


def _choices(annotation: Any) -> list[str]:
    """The words a key may take."""
    if getattr(annotation, "__origin__", None) is dict:
        return []
    arguments = get_args(annotation)
    words = [argument for argument in arguments if isinstance(argument, str)]
    return words or [word for argument in arguments for word in _choices(argument)]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its keys' defaults"
    return "null" if value is None else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    """A value as it would stand in the file, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)
