"""Tables that sort by a click on a heading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from bokeh.models import ColumnDataSource, DataTable, NumberFormatter, StringFormatter, TableColumn

ROW_PX = 26
WIDEST_PX = 620
MOST_ROWS = 14
"""Shown at once; a longer table scrolls."""
STYLE = """
:host { font: 13px system-ui, sans-serif; }
.slick-cell, .slick-header-column { background: transparent; color: inherit; border-color: #8884 !important; }
.slick-header-columns, .bk-data-table, .slick-viewport, .slick-pane { background: transparent !important; }
.slick-header-column { font-weight: 600; }
.slick-row, .slick-row.odd { background: transparent !important; }
.slick-row:hover { background: #8882 !important; }
.slick-cell.selected { background: #3b8fd933 !important; }
"""


def table(rows: pd.DataFrame, *, name: str) -> DataTable:
    """A frame as a table; columns keep their names. Numbers of a column have the decimals that its small ones need."""
    columns = [
        TableColumn(
            field=str(column),
            title=str(column),
            formatter=_formatter(rows[column]),
            width=_width_px(str(column), rows[column]),
        )
        for column in rows.columns
    ]
    source = ColumnDataSource({str(column): _values(rows[column]) for column in rows.columns})
    return DataTable(
        source=source, columns=columns, name=name, index_position=None, sizing_mode="stretch_width",
        height=ROW_PX * (min(len(rows), MOST_ROWS) + 1) + 26, row_height=ROW_PX, selectable=True,
        autosize_mode="none", reorderable=False, stylesheets=[STYLE], min_width=320,
    )  # fmt: skip


def facts(pairs: Sequence[tuple[str, Any]], *, name: str) -> DataTable:
    """Two columns: what, and its value as text."""
    frame = pd.DataFrame([(what, "-" if value is None else str(value)) for what, value in pairs], columns=["", "value"])
    return table(frame, name=name)


def _width_px(name: str, column: pd.Series[Any]) -> int:
    """Wide enough for most cells; the rest is cut, and shown in full when the column is dragged wider."""
    text = 0 if pd.api.types.is_numeric_dtype(column) else max((len(str(value)) for value in column), default=0)
    return min(WIDEST_PX, max(72, 8 * len(name) + 26, 7 * text + 18))


def _formatter(column: pd.Series[Any]) -> NumberFormatter | StringFormatter:
    if not pd.api.types.is_numeric_dtype(column):
        return StringFormatter()
    return NumberFormatter(format=_form(column), text_align="right", nan_format="-")


def _form(column: pd.Series[Any]) -> str:
    """Of numeral.js: whole numbers as such, else so that the smallest that is not 0 has a digit or two to show."""
    values = np.abs(column.dropna().to_numpy(dtype=float))
    values = values[values > 0]
    if pd.api.types.is_integer_dtype(column) or not values.size:
        return "0,0"
    forms = ((100.0, "0,0.0"), (1.0, "0,0.00"), (0.0, "0,0.0000"))
    return next(form for least, form in forms if values.min() >= least)


def _values(column: pd.Series[Any]) -> Any:
    if pd.api.types.is_numeric_dtype(column):
        return column.to_numpy(dtype=float)
    return ["-" if value is None or (isinstance(value, float) and np.isnan(value)) else str(value) for value in column]
