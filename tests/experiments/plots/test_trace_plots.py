"""The picture of a trace: its numbers by hand, and that it draws whatever there is."""

from math import exp

import pytest

from experiments.plots.style import save
from experiments.plots.trace import INTERVALS, LENGTH_POINTS, PANELS, draw_trace
from sim.types import Request
from traces import Fixed, Lognormal, generate, survey


def requests(*arrivals: float, prefix: bool = False) -> list[Request]:
    blocks = {"prefix": (1, 2), "prefix_block_tokens": 10} if prefix else {}
    return [Request(id=i, arrival_s=t, input_tokens=40, output_tokens=i + 1, **blocks) for i, t in enumerate(arrivals)]


def points(drawing, panel: str, series: str) -> list[tuple[float, float]]:
    rows = drawing.table[(drawing.table["panel"] == panel) & (drawing.table["series"] == series)]
    return list(zip(rows["x"], rows["y"], strict=True))


def test_a_picture_and_its_numbers(tmp_path):
    drawing = draw_trace(survey(requests(0.0, 1.0, 3.0, 4.0, prefix=True)), "four requests")
    assert points(drawing, "Lengths", "output") == [(1, 0), (1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    assert points(drawing, "Lengths", "input") == [(40, 0), (40, 1.0)]
    gaps = points(drawing, "Gaps", "trace")
    assert gaps[0] == (pytest.approx(2**-0.25), 1.0)
    assert [share for _, share in gaps] == pytest.approx([1, 1, 1 / 3, 1 / 3, 1 / 3, 1 / 3, 0])
    assert dict(points(drawing, "Gaps", "Poisson"))[1.0] == exp(-1 / (4 / 3))
    assert [path.suffix for path in save(drawing, tmp_path, "trace")] == [".png", ".svg", ".csv"]
    assert all(path.stat().st_size for path in tmp_path.iterdir())


def test_rates_and_loads_over_time_add_up():
    found = survey(generate(3000, 7.0, input=Lognormal(mean_tokens=90, median_tokens=50), output=Fixed(tokens=3)))
    drawing = draw_trace(found, "t")
    for panel, series, total in (("Arrivals", "requests/s", 3000), ("Input load", "tokens/s", sum(
        tokens * number for tokens, number in found.inputs.items()))):  # fmt: skip
        line = points(drawing, panel, series)
        assert len(line) <= 2 * INTERVALS
        area = sum((end - start) * value for (start, value), (end, _) in zip(line[::2], line[1::2], strict=True))
        assert area == pytest.approx(total, rel=0.02)
    assert len(points(drawing, "Lengths", "input")) <= LENGTH_POINTS + 2


def test_reuse_over_time():
    drawing = draw_trace(survey(requests(*range(200), prefix=True)), "t")
    shares = [share for _, share in points(drawing, "Prefix reuse", "trace")]
    assert shares[:2] == [0.25, 0.25]  # the first of two requests sees nothing, the second 20 of its 40 tokens
    assert shares[2:] == pytest.approx([0.5] * (len(shares) - 2))


@pytest.mark.parametrize("arrivals", [(0.0,), (5.0, 5.0, 5.0), (0.0, 1.0)])
def test_what_there_is_not_is_said(tmp_path, arrivals):
    drawing = draw_trace(survey(requests(*arrivals)), "t")
    shown = {text.get_text() for axes in drawing.figure.axes for text in axes.texts}
    at_once = {PANELS[name].empty for name in ("Arrivals", "Gaps", "Burstiness")}
    assert shown == {"the trace has no prefix hashes"} | ({"too few gaps"} if arrivals[1:] == (1.0,) else at_once)
    save(drawing, tmp_path, "trace")


def test_every_axis_has_its_unit():
    drawing = draw_trace(survey(requests(0.0, 1.0, 2.5, prefix=True)), "t")
    for axes in drawing.figure.axes:
        assert any(unit in axes.get_xlabel() for unit in ("(s)", "tokens"))
        assert axes.get_ylabel()
