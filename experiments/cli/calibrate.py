"""``phasewise calibrate report``: how well a profile fits what was measured, as tables and figures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from calibrate.profile.samples import Samples
    from experiments.plots.style import Drawing
    from sim.cost import Profile

ProfileName = Annotated[str, typer.Argument(metavar="PROFILE", help="a shipped profile's name, or a profile file")]


def register(app: typer.Typer) -> None:
    """Under ``phasewise calibrate``: here and not in calibrate/, which draws nothing."""
    app.command()(report)


def report(
    profile: ProfileName,
    against: Annotated[
        str | None, typer.Option(metavar="OTHER", help="another profile: its times at the shapes that both cover")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="folder for figures (PNG, SVG) and their CSV")] = None,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Print a profile's held-out errors by operator; --out draws predicted against measured, rates and times."""
    import json

    from calibrate.profile.report import errors, ratio_summary, ratios

    one, samples = _found(profile)
    tables = {"errors": errors(one, samples)}
    over = None if against is None else ratios(one, _found(against)[0])
    if over is not None:
        tables["ratios"] = ratio_summary(over)
    if json_:
        rows = {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}
        print(json.dumps({"profile": one.name, "samples": bool(samples), **rows}, indent=2))
    else:
        _print(one, samples, against, tables)
    if out is not None:
        _draw(one, samples, against, over, out)


def _found(name: str) -> tuple[Profile, tuple[Samples, ...]]:
    from calibrate.profile.file import read_profile, read_samples, shipped_profiles
    from sim.cluster import did_you_mean
    from sim.types import ConfigError

    shipped = shipped_profiles()
    if name not in shipped and not Path(name).is_file():
        raise ConfigError(f"PROFILE: {did_you_mean(name, list(shipped))}; or give the path of a file")
    path = shipped.get(name, Path(name))
    return read_profile(path), read_samples(path)


def _print(
    profile: Profile, samples: tuple[Samples, ...], against: str | None, tables: dict[str, pd.DataFrame]
) -> None:
    origin = profile.provenance
    print(f"{profile.name}: {origin.source} ({origin.licence}, {origin.date})\n  {origin.engine}\n  {origin.method}")
    if not samples:
        print("  the file carries no samples: errors are those its maker held out; figures show fitted times only")
    shares = dict.fromkeys(("noise", "mape", "largest"), "{:.1%}".format)
    print("\n" + _text(tables["errors"], shares))
    if "ratios" in tables:
        print(f"\ntimes over those of {against}, at shapes of the same model and TP degree that both cover")
        print(_text(tables["ratios"], dict.fromkeys(("median", "min", "max"), "{:.3g}".format)))


def _text(table: pd.DataFrame, forms: dict[str, Any]) -> str:
    """Plain columns; what is unknown is a dash."""
    cells = {name: [_cell(value, forms.get(str(name), _plain)) for value in table[name]] for name in table}
    return str(type(table)(cells).to_string(index=False))


def _cell(value: Any, form: Any) -> str:
    return "-" if value is None or value != value else str(form(value))  # NaN is not itself


def _plain(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _draw(
    profile: Profile, samples: tuple[Samples, ...], against: str | None, over: pd.DataFrame | None, out: Path
) -> None:
    from experiments.plots.style import save
    from sim.types import ConfigError

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be made: {error.strerror}; choose a writable folder") from None
    for stem, drawing in drawings(profile, samples, against, over):
        for path in save(drawing, out, stem):
            print(path)


def drawings(
    profile: Profile, samples: tuple[Samples, ...], against: str | None, over: pd.DataFrame | None
) -> Iterator[tuple[str, Drawing]]:
    """(file name, drawing) of every figure that the profile's samples, and ``over`` another, allow."""
    from calibrate.profile.report import peaks, predictions, prices, rates
    from experiments.plots import calibration

    if len(unseen := predictions(samples)):
        yield "predicted-measured", calibration.predicted_against_measured(profile.name, unseen)
    if len(achieved := rates(samples)):
        for dtype, rows in achieved.groupby("dtype"):
            yield f"rates-{dtype}", calibration.achieved_rates(profile.name, rows, peaks(profile, str(dtype)))
    yield "fitted-times", calibration.fitted_prices(profile.name, prices(profile))
    if over is not None:
        yield "ratios", calibration.prices_over(profile.name, str(against), over)
