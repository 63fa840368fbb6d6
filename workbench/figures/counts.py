"""Head sets from few and many examples, ours and the published ones (paper figure 7)."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures.grid import Grid
from workbench.figures.labels import count, escape, fits, missing, shorten, thinned, width
from workbench.figures.marks import LEGEND, minus, numbers, two_digits
from workbench.figures.reference import chance_entry, chance_line, first_groups, legend_above, say
from workbench.figures.template import DPS, PLAIN, RANDOM, centred, finish, shares, whiskers

MATRICES = (("jaccard", "Jaccard of the sets"), ("spearman", "Spearman of mean scores"))
# Overlap with what: column, words, colour and symbol.
AGAINST = (
    ("to_all", "with the set of all, of which they are a part", PLAIN, "square-open"),
    ("apart", "with the set of the other half of the users", DPS, "circle"),
)


def example_counts(table: xr.Dataset, limit: int = 6) -> go.Figure:
    """Head sets from few and many examples against each other (paper figure 7).

    Args:
        table: From `by_examples`, or from `official_overlap`.
        limit: Draw the first so many groups of a table of `by_examples`.

    Returns:
        A row a group: the matrices of Jaccard overlap and of Spearman's correlation, values
        written where cells have room for them; behind them, for a table of `by_examples`, the
        overlap against the number of examples, with all of them and with an independent half.

    Raises:
        InputError: There is no group to draw.
    """
    ours, note = "count" in table.dims, ""
    if ours:
        table, note = first_groups(table, limit)
    rows = table["group"].values.tolist() if ours else [table.attrs["task"]]
    names = table["count" if ours else "group"].values.tolist()
    side = float(min(max(31 * len(names), 200), 336 if ours else 448))
    label = width([shorten(name, 12) for name in names], 12) + 26
    columns = 3 if ours else 2
    grid = Grid(
        columns * len(rows),
        (side,) * columns,
        side,
        gap=(label + 26, 96),
        left=label + 24,
        right=30,
        bottom=56,
        top=24 + LEGEND * ours,
    )
    titles = []
    for name in rows:
        size = f", n = {int(table['examples'].sel(group=name)):,}" if ours else ""
        titles.append(f"<b>{shorten(name, 16)}</b>{size}: Jaccard of the sets")
        titles += ["Spearman of mean scores", *["Jaccard by examples"] * ours]
    figure = grid.figure(titles)
    signed = float(np.nanmin(table["spearman"].values, initial=0.0)) < 0
    for row, name in enumerate(rows):
        part = table.sel(group=name) if ours else table
        for column, (key, words) in enumerate(MATRICES):
            place = grid.place(columns * row + column)
            figure.add_trace(_counts_matrix(part, names, key, words), **place)
            for trace in _in_cells(part[key].values, side, signed and key == "spearman"):
                figure.add_trace(trace, **place)
            _name_cells(figure, names, side, place)
            figure.update_xaxes(title_text="examples" if ours else "group", **place)
        if ours:
            place = grid.place(columns * row + 2)
            figure.add_traces(_curves(part, names, row == 0), rows=place["row"], cols=place["col"])
            _count_axis(figure, part, names, table.attrs["chance"], place)
    if ours:
        figure.add_trace(chance_entry("random, any"), **grid.place(2))
    plain = shares("") | {"showscale": False}
    signs = centred(np.ones(1), "") | {"showscale": False}
    figure.update_layout(
        coloraxis=plain, coloraxis2=signs if signed else plain, legend=legend_above(grid, 24)
    )
    return finish(figure, *_count_titles(table, ours, note))


def _counts_matrix(part: xr.Dataset, names: list[str], key: str, words: str) -> go.Heatmap:
    values = part[key].values
    # Of the published table there is one matrix, and the groups are its rows.
    whose = "" if part["group"].ndim else f"{escape(part['group'].item())}<br>"
    shared = part["shared"].values if "shared" in part else np.full(values.shape, np.nan)
    hover = [
        [
            ""
            if missing(value)
            else f"{whose}{escape(a)} and {escape(b)}<br><b>{words} {value:.4f}</b>"
            + _in_common(both)
            for b, value, both in zip(names, row, common, strict=True)
        ]
        for a, row, common in zip(names, values.tolist(), shared.tolist(), strict=True)
    ]
    return go.Heatmap(
        z=values,
        coloraxis="coloraxis" if key == "jaccard" else "coloraxis2",
        hoverinfo="text",
        hovertext=hover,
    )


def _in_cells(values: np.ndarray, side: float, signed: bool) -> list[go.Scatter]:
    """The values where they fit, and else a minus on those below 0."""
    if fits(len(values), side):
        return [numbers(values, two_digits(values), 1.0 if signed else None)]
    return minus(values, 1.0, side / len(values))


def _in_common(examples: float) -> str:
    return f"<br>{count(int(examples), 'example')} in both" if examples > 0 else ""


def _name_cells(figure: go.Figure, names: list[str], side: float, place: dict[str, int]) -> None:
    ticks = thinned(len(names), int(side / 14))
    flat = width(names, 12) < side / len(names)
    axis = {
        "tickvals": ticks,
        "ticktext": [shorten(names[i], 12) for i in ticks],
        "showgrid": False,
        "ticks": "",
        "showline": False,
    }
    edges = (-0.5, len(names) - 0.5)
    figure.update_xaxes(range=edges, tickangle=0 if flat else -90, **axis, **place)
    figure.update_yaxes(range=edges[::-1], **axis, **place)


def _curves(part: xr.Dataset, names: list[str], legend: bool) -> list[go.Scatter]:
    places = list(range(len(names) - 1))
    traces = []
    for step, (key, words, color, symbol) in zip((-0.07, 0.07), AGAINST, strict=True):
        mean, low, high = (part[key + end].values[:-1].tolist() for end in ("", "_low", "_high"))
        traces.append(
            go.Scatter(
                x=[place + step for place in places],
                y=mean,
                name=words,
                legendgroup=key,
                showlegend=legend,
                mode="lines+markers",
                line={"color": color, "width": 2},
                marker={"color": color, "symbol": symbol, "size": 8},
                error_y=whiskers(mean, low, high, color),
                hoverinfo="text",
                hovertext=[
                    f"{count(int(name), 'example')}, {words}<br><b>{value:.3f}</b>, 95 % of draws "
                    f"{'unknown' if missing(a) else f'{a:.3f} to {b:.3f}'}"
                    for name, value, a, b in zip(names, mean, low, high, strict=False)
                ],
            )
        )
    return [*traces, _layer_chance(part, places, legend)]


def _layer_chance(part: xr.Dataset, places: list[int], legend: bool) -> go.Scatter:
    """What the overlap with the other half is judged by."""
    values = part["apart_chance"].values[:-1].tolist()
    name = "random, same layers"
    return go.Scatter(
        x=places,
        y=values,
        name=name,
        legendgroup="layer_chance",
        showlegend=legend,
        mode="lines",
        line={"color": RANDOM, "width": 2},
        hoverinfo="text",
        hovertext=[f"{name}<br><b>{value:.3f}</b>" for value in values],
    )


def _count_axis(
    figure: go.Figure, part: xr.Dataset, names: list[str], chance: float, place: dict[str, int]
) -> None:
    few = names[:-1]
    figure.update_xaxes(
        title_text="examples",
        tickvals=list(range(len(few))),
        ticktext=few,
        range=[-0.5, max(len(few), 1) - 0.5],
        **place,
    )
    figure.update_yaxes(title_text="Jaccard", range=[0, 1.03], tickvals=[0, 0.5, 1], **place)
    chance_line(figure, chance, place, horizontal=True)
    if part["to_all"].isnull().all():
        say(figure, "too few examples<br>to leave some out", place)


def _count_titles(table: xr.Dataset, ours: bool, note: str) -> tuple[str, list[str]]:
    attrs = table.attrs
    chance = f"random sets of any heads overlap by {attrs['chance']:.3f}"
    if not ours:
        sizes = sorted({int(k) for k in table["k"].values})
        k = " or ".join(map(str, sizes))
        few, many = int(table["examples"].min()), int(table["examples"].max())
        return f"Do few examples give the heads that many give? Published sets, K = {k}", [
            f"{escape(attrs['model'])}, {attrs['heads']:,} heads; means over {few:,} to {many:,} "
            f"examples; {chance}",
            "groups may share examples, and then agree partly by construction",
        ]
    drawn = "users drawn whole" if attrs["by_users"] else "examples drawn whosever they are"
    return f"Do few examples give the heads that many give? K = {attrs['k']}", [
        f"{note}mean of {count(attrs['draws'], 'draw')}, {drawn}; {chance}",
        "in a draw small subsets are part of larger ones and agree with them by construction; "
        "whiskers: 95 % of draws",
    ]
