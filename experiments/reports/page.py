"""The page: one HTML file with everything in it."""

from __future__ import annotations

from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from bokeh.embed import components
from bokeh.resources import Resources

from experiments.reports.folder import read_folder
from experiments.reports.sections import Report, Section, report
from sim.types import ConfigError
from traces.write import replacing

SCRIPTS = ("bokeh", "bokeh-widgets", "bokeh-tables")
CSS = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f7f8; --ink: #1c2126; --soft: #5d6670; --line: #8883; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --card: #1d2126; --ink: #e6e8ea; --soft: #9aa3ad; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 16px 60px; }
h1 { font-size: 15px; font-weight: 600; color: var(--soft); margin: 0 0 6px; }
.headline { font-size: 22px; line-height: 1.35; margin: 0 0 18px; max-width: 60em; }
h2 { font-size: 17px; margin: 34px 0 8px; }
p { color: var(--soft); margin: 0 0 10px; max-width: 70em; overflow-wrap: anywhere; }
.parts { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); }
.parts.wide { grid-template-columns: minmax(0, 1fr); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px; overflow-x: auto; }
.picture { background: #fff; }
.picture svg { display: block; width: 100%; height: auto; min-width: 640px; }
details { margin-top: 14px; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; overflow-x: auto; }
footer { color: var(--soft); margin-top: 40px; font-size: 13px; }
"""


def write_report(folder: Path, out: Path) -> Path:
    """The report of a folder as one file, whole or not at all; ``ConfigError`` if it cannot be read or written."""
    read = read_folder(folder)
    text = page(read.name, report(read), read.scenario)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}; name another file with --out") from None
    return out


def page(name: str, made: Report, scenario: str) -> str:
    """HTML whose scripts and figures are all inside."""
    models = [part for section in made.sections for part in section.parts if not isinstance(part, str)]
    script, divs = components(models)
    resources = Resources(mode="inline", components=list(SCRIPTS))
    placed = iter(divs)
    body = "".join(_section(section, placed) for section in made.sections)
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(name)}: phasewise report</title>
<style>{CSS}</style>
{resources.render()}
</head>
<body>
<main>
<h1>{escape(name)}</h1>
<p class="headline" style="color: inherit">{escape(made.headline)}</p>
{body}
<details><summary>The scenario, spelt out</summary><pre>{escape(scenario)}</pre></details>
<footer>phasewise, {when}. Simulated, not measured, unless it says otherwise.</footer>
</main>
{script}
</body>
</html>
"""


def _section(section: Section, placed: Any) -> str:
    if not section.parts:
        return ""
    cards = "".join(
        f'<div class="card picture">{part}</div>'
        if isinstance(part, str)
        else f'<div class="card">{next(placed)}</div>'
        for part in section.parts
    )
    text = f"<p>{escape(section.text.strip())}</p>" if section.text.strip() else ""
    wide = " wide" if section.wide else ""
    return f'<section><h2>{escape(section.title)}</h2>{text}<div class="parts{wide}">{cards}</div></section>\n'
