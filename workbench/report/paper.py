"""The paper's data figures, 3 to 8, in its format: its order, its width, captions with numbers.

A figure on a screen has a title and explains itself; in a paper the caption does that. So the
title goes, the picture is drawn as wide as a text page at most, and what it says is written below
it with the numbers of the run.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import runs
from workbench.figures.export import draw
from workbench.figures.grid import HEADER
from workbench.report.pictures import DRAWN_USERS, probe_figures

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

    from workbench.probe import Probe

FOLDER = "paper"
PAGE = 6.3  # inches of a two-column conference page
# Letters of 12 pixels, scaled so, are of 7 points, a caption's size.
SCALE = 0.75 / 96


@dataclass(frozen=True)
class Plate:
    """A figure of the paper.

    Attributes:
        number: The paper's.
        name: The figure's file name in a run.
        caption: From the probe to what stands below it.
    """

    number: int
    name: str
    caption: Callable[[Probe], str]


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        paths: The files.
        missing: Figures of the paper that this run has no numbers for.
        note: Why pictures are missing; empty where none is.
    """

    paths: tuple[Path, ...]
    missing: tuple[int, ...]
    note: str


def write_paper(result: Probe, folder: Path) -> Written:
    """Lay a run's figures out as the paper does, in `folder/paper`.

    Each figure is written as PDF, SVG and PNG (of 300 dots an inch on the page); `figures.tex`
    includes them with captions, `figures.html` shows them in order.
    """
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    drawn = probe_figures(result)
    plates = [plate for plate in PLATES if plate.name in drawn]
    bare = {f"figure-{plate.number}": without_title(drawn[plate.name]) for plate in plates}
    # 300 dots an inch where the figure is at its full scale.
    note = draw(bare, place, ("pdf", "svg", "png"), scale=300 * SCALE)
    captions = {plate.number: plate.caption(result) for plate in plates}
    widths = {
        plate.number: min(PAGE, bare[f"figure-{plate.number}"].layout.width * SCALE)
        for plate in plates
    }
    runs.write_text(place / "figures.tex", _latex(captions, widths))
    runs.write_text(place / "figures.html", _page(captions, widths, result))
    missing = tuple(plate.number for plate in PLATES if plate not in plates)
    for number in missing:  # of an earlier, deeper probe
        for old in place.glob(f"figure-{number}.*"):
            old.unlink()
    written = sorted(path for path in place.iterdir() if path.is_file())
    return Written(tuple(written), missing, note)


def without_title(figure: go.Figure) -> go.Figure:
    """A copy without title and subtitle, and without the room that they took."""
    copy = type(figure)(figure)
    top = copy.layout.margin.t - HEADER
    return copy.update_layout(
        title={"text": "", "subtitle": {"text": ""}},
        height=copy.layout.height - HEADER,
        margin={"t": top},
    )


def _latex(captions: Mapping[int, str], widths: Mapping[int, float]) -> str:
    blocks = [
        "\\begin{figure*}[t]\n  \\centering\n"
        f"  \\includegraphics[width={widths[number]:.2f}in]{{figure-{number}}}\n"
        f"  \\caption{{{_tex(caption)}}}\n  \\label{{fig:{number}}}\n\\end{{figure*}}\n"
        for number, caption in captions.items()
    ]
    return "% Needs \\usepackage{graphicx}; the pictures are the PDF files beside this one.\n\n" + (
        "\n".join(blocks)
    )


_TEX = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}


def _tex(text: str) -> str:
    """Text as LaTeX shows it."""
    return re.sub(
        r"[\\~^&%$#_{}]", lambda found: _TEX.get(found[0], f"\\{found[0]}"), text
    ).replace("γ", "$\\gamma$")


def _page(captions: Mapping[int, str], widths: Mapping[int, float], result: Probe) -> str:
    figures = "\n".join(
        f'<figure><img src="figure-{number}.svg" alt="Figure {number}" '
        f'style="width: {widths[number]:.2f}in">\n'
        f"<figcaption><b>Figure {number}.</b> {html.escape(caption)}</figcaption></figure>"
        for number, caption in captions.items()
    )
    title = html.escape(f"Figures: {result.summary['model']}")
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>body {{ width: {PAGE}in; margin: 1in auto; font: 10pt/1.35 serif; }} "
        "figure { margin: 0 0 0.4in; text-align: center; } img { max-width: 100%; } "
        "figcaption { text-align: left; margin-top: 0.1in; }</style>\n"
        f"<body>\n{figures}\n</body></html>\n"
    )


def _by_task(table: xr.Dataset, values: Callable[[xr.Dataset], str]) -> str:
    """What is told of each task, behind its name and its metric."""
    parts = [table.sel(task=task) for task in table["task"].values]
    return "; ".join(f"{p['task'].item()}, {p['metric'].item()}: {values(p)}" for p in parts)


def _span(table: Mapping[str, Any] | xr.Dataset, name: str, spec: str = ".3f") -> str:
    """A mean with its interval, where it has one."""
    mean, low, high = (float(table[name + end]) for end in ("", "_low", "_high"))
    return f"{mean:{spec}}" + ("" if math.isnan(low) else f" [{low:{spec}}, {high:{spec}}]")


def _heatmaps(result: Probe) -> str:
    users = len(result.scores.groups("user"))
    shown = min(users, DRAWN_USERS)
    return (
        f"PCS of every head of {result.summary['model']} for {shown} of {users} users, the mean "
        "over each user's examples, in nats per target token; layers upwards, heads to the right, "
        "one colour scale for all. Red: the loss rises without the head."
    )


def _overlap(result: Probe) -> str:
    found = result.tables["overlap"]["jaccard"].attrs
    text = (
        f"Jaccard overlap of the users' top-{result.summary['k']} heads: mean {found['mean']:.3f} "
        f"over all pairs of {found['sets']} users, {found['layer_chance']:.3f} for random heads in "
        f"the same layers and {found['chance']:.3f} for any."
    )
    if math.isnan(found["gap"]):
        return text
    return text + (
        f" From half of the examples each, two halves of one user overlap by {found['same']:.3f} "
        f"and halves of two users by {found['others']:.3f}: a gap of {_span(found, 'gap', '+.3f')}."
    )


def _weights(result: Probe) -> str:
    table = result.tables["weights"]

    def values(part: xr.Dataset) -> str:
        return ", ".join(
            f"{name} {_span(part.sel(map=name), 'value')}" for name in part["map"].values
        )

    return (
        "Head weights as discovered, the same weights drawn to other heads, and a random mask of "
        f"as many heads, with the metric of DPS (γ = {table.attrs['gamma']:g}) under each. "
        f"{_by_task(table, values)}."
    )


def _sweep(result: Probe) -> str:
    table, k = result.tables["sweep"], result.summary["k"]

    def values(part: xr.Dataset) -> str:
        names = {"plain": "plain", "DPS": "dps", "random": "random"}
        return ", ".join(f"{word} {_span(part, name)}" for word, name in names.items())

    return (
        "Performance against the number of heads K, with 95 % intervals over users, and the "
        f"overlap of the sets. At K = {k}, γ = {table.attrs['gamma']:g}: "
        f"{_by_task(table.sel(k=k), values)}."
    )


def _examples(result: Probe) -> str:
    table = result.tables["examples"]
    tasks = []
    for name in table["group"].values.tolist():
        part = table.sel(group=name)
        whole = part["to_all"].isel(count=slice(-1)).dropna("count")
        if whole.size:
            last = whole.isel(count=-1)
            tasks.append(f"{name}: {float(last):.3f} from {last['count'].item()} examples")
    return (
        f"Overlap and rank correlation of the top-{table.attrs['k']} heads found from fewer "
        f"examples with one another and with those from all, means over {table.attrs['draws']} "
        f"draws. With the set from all examples, "
        f"{'; '.join(tasks) or 'none, as there are too few'}; by chance "
        f"{table.attrs['chance']:.3f}."
    )


def _routing(result: Probe) -> str:
    table = result.tables["routing"]

    def values(part: xr.Dataset) -> str:
        arms = ("plain", "global", "hard", "soft")
        told = ", ".join(f"{name} {_span(part.sel(arm=name), 'value')}" for name in arms)
        return f"{told} (routing entropy {float(part['entropy'].sel(arm='soft')):.3f})"

    return (
        f"Hard against soft routing of users to head weights of their clusters, beside one global "
        f"set and the plain model (γ = {table.attrs['gamma']:g}). {_by_task(table, values)}."
    )


PLATES = (
    Plate(3, "figure-3-user-heatmaps", _heatmaps),
    Plate(4, "figure-4-user-overlap", _overlap),
    Plate(5, "figure-5-head-weights", _weights),
    Plate(6, "figure-6-head-count", _sweep),
    Plate(7, "figure-7-examples", _examples),
    Plate(8, "figure-8-routing", _routing),
)
