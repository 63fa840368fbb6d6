"""Whether the planted heads are found, against the number of examples and the noise."""

from __future__ import annotations

import math

import plotly.graph_objects as go
import xarray as xr

from workbench.figures.grid import Grid
from workbench.figures.labels import count, interval, missing
from workbench.figures.template import DPS, OKABE_ITO, PAPER, finish, whiskers

# Name, colour, symbol, and a step aside on the axis so that whiskers stand side by side.
METHODS = {
    "pcs": ("top K by PCS", DPS, "circle", 2**-0.08),
    "specific": ("specific against a stranger's profile", OKABE_ITO[2], "diamond", 2**0.08),
}
VALUES = ("precision", "recall")


def recovery(table: xr.Dataset) -> go.Figure:
    """Precision and recall of the planted heads against the number of examples.

    Args:
        table: From `analysis.recovery.recovery`.

    Returns:
        A column a level of noise, precision above recall. A marker is filled where every draw
        found exactly the planted heads. Whiskers are there where draws differ; there is no
        precision where no draw found anything.
    """
    noises = table["noise"].values.tolist()
    across = min(max((760 - 40 * (len(noises) - 1)) / len(noises), 150), 420)
    grid = Grid(
        2 * len(noises), (across,) * len(noises), 150, (40, 62), 72, right=24, bottom=56, top=58
    )
    titles = [f"<b>noise {noise:g}</b>, {name}" for name in VALUES for noise in noises]
    figure = grid.figure(titles)
    counts = table["count"].values.tolist()
    for row, value in enumerate(VALUES):
        for column, noise in enumerate(noises):
            panel = row * len(noises) + column
            place = grid.place(panel)
            for method in table["method"].values.tolist():
                part = table.sel({"method": method, "noise": noise})
                figure.add_trace(_curve(part, method, value, panel == 0), **place)
            low = grid.lowest(panel)
            figure.update_xaxes(title_text="examples (log scale)" if low else None, **place)
            if grid.leftmost(panel):
                figure.update_yaxes(title_text=value, **place)
    edges = [math.log10(counts[0] / 1.4), math.log10(counts[-1] * 1.4)]
    figure.update_xaxes(
        type="log", range=edges, tickvals=counts, ticktext=[str(n) for n in counts], tickangle=0
    )
    figure.update_yaxes(range=[-0.08, 1.08], tickvals=[0, 0.5, 1])
    figure.update_layout(
        legend={"x": 0, "xanchor": "left", "y": 1 + 26 / grid.inner[1], "yanchor": "bottom"}
    )
    return finish(figure, *_titles(table))


def _curve(part: xr.Dataset, method: str, value: str, legend: bool) -> go.Scatter:
    words, color, symbol, step = METHODS[method]
    counts = part["count"].values
    mean, low, high = (part[value + end].values.tolist() for end in ("", "_low", "_high"))
    exact = part["exact"].values.tolist()
    hover = []
    for i, number in enumerate(counts.tolist()):
        known = "nothing found" if missing(mean[i]) else interval(mean[i], low[i], high[i], ".2f")
        row = part.isel(count=i)
        share = interval(exact[i], float(row["exact_low"]), float(row["exact_high"]), ".2f")
        draws = count(int(row["draws"]), "draw")
        hover.append(
            f"<b>{words}</b>, {count(number, 'example')}<br>{value} {known}"
            f"<br>exactly the planted heads in a share of {share} of {draws}"
            f"<br>{float(row['found']):.1f} heads found"
        )
    return go.Scatter(
        x=counts * step,
        y=mean,
        name=words,
        legendgroup=method,
        mode="lines+markers",
        line={"color": color, "width": 2.5},
        marker={
            "color": [color if share == 1 else PAPER for share in exact],
            "size": 9,
            "symbol": symbol,
            "line": {"color": color, "width": 2},
        },
        error_y=whiskers(mean, low, high, color),
        hoverinfo="text",
        hovertext=hover,
        showlegend=legend,
        cliponaxis=False,
    )


def _titles(table: xr.Dataset) -> tuple[str, list[str]]:
    k = int(table.attrs["k"])
    draws = sorted({int(n) for n in table["draws"].values.flat})
    of = count(draws[-1], "draw") if len(draws) == 1 else f"{draws[0]} to {draws[-1]} draws"
    return f"Are the {count(k, 'planted head')} found?", [
        f"means over {of}; filled: every draw found exactly the planted heads; the top K is told K",
        "whiskers: 95 % intervals from resampled draws, where draws differ; "
        "no marker: nothing found",
    ]
