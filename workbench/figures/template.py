"""The one look of every figure: template, colours with fixed roles, title, error bars."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.colors import hex_to_rgb

from workbench.figures.labels import missing

# Okabe and Ito's set, told apart with every common kind of colour blindness.
OKABE_ITO = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
    "#000000",
)
# A role has one colour in every figure.
PLAIN = "#6B6B6B"
DPS = OKABE_ITO[0]
RANDOM = OKABE_ITO[1]

# ColorBrewer's RdBu, reversed: blue below 0, red above. White is 0, so gaps must not be white.
DIVERGING = (
    "#2166ac",
    "#4393c3",
    "#92c5de",
    "#d1e5f0",
    "#ffffff",
    "#fddbc7",
    "#f4a582",
    "#d6604d",
    "#b2182b",
)
# ColorBrewer's Blues without the lightest, so that 0 is not taken for a blank.
SEQUENTIAL = ("#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#3182bd", "#08519c")
GAP = "#d4d4d4"
# Between the gap and white, which is 0; a stroke across the cell tells it from both.
UNSCORED = "#ededed"
# Heads of no class, behind those of one.
OTHER = "#a8a8a8"
INK = "#222222"
FAINT = "#666666"
LINES = "#e6e6e6"
PAPER = "white"
# Metric-compatible fonts first: a picture made in a container is laid out like one on a desktop.
FONT = "Arial, Helvetica, Liberation Sans, DejaVu Sans, sans-serif"
# Pixels: one size for everything that is read, one for the title.
BODY = 12
TITLE = 16

_AXIS = {
    "showline": True,
    "linecolor": FAINT,
    "ticks": "outside",
    "ticklen": 4,
    "tickcolor": FAINT,
    "tickfont": {"size": BODY},
    "title": {"font": {"size": BODY}, "standoff": 6},
    "gridcolor": LINES,
    "zeroline": False,
}
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": BODY, "color": INK},
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "colorway": OKABE_ITO,
        "title": {
            "font": {"size": TITLE},
            "subtitle": {"font": {"size": BODY, "color": FAINT}},
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yanchor": "top",
            "pad": {"l": 14, "t": 12},
        },
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "legend": {"orientation": "h", "font": {"size": BODY}},
        "coloraxis": {
            "colorbar": {
                "thickness": 14,
                "outlinewidth": 0,
                "ypad": 0,
                "tickfont": {"size": BODY},
                "title": {"font": {"size": BODY}},
            }
        },
        "annotationdefaults": {"font": {"size": BODY}, "showarrow": False},
        "hoverlabel": {"align": "left", "font": {"family": FONT, "size": BODY}},
        "hovermode": "closest",
        # Plotly 7 offers to send the figure, users' ids and all, to its maker's cloud.
        "modebar": {"remove": ["sendChartToCloud"]},
    },
    data={"heatmap": [{"hoverongaps": False, "xgap": 1, "ygap": 1}]},
)


def finish(figure: go.Figure, title: str, subtitle: list[str]) -> go.Figure:
    """Give a figure the template, its title and the lines that say what is seen.

    Args:
        figure: The figure, changed in place.
        title: One line; text from data in it must be escaped.
        subtitle: Up to two lines, likewise.
    """
    return figure.update_layout(
        template=TEMPLATE, title={"text": title, "subtitle": {"text": "<br>".join(subtitle)}}
    )


def centred(values: np.ndarray, units: str) -> dict[str, object]:
    """A colour axis as far below 0 as above, so that white is 0.

    Args:
        values: All values that are drawn on it; NaN is none.
        units: What the colour bar is titled.
    """
    # All 0 still need an extent.
    end = largest(values) or 1.0
    return {
        "colorscale": DIVERGING,
        "cmin": -end,
        "cmid": 0,
        "cmax": end,
        "colorbar": {"title": {"text": units, "side": "right"}},
    }


def shares(title: str) -> dict[str, object]:
    """A colour axis from 0 to 1."""
    return {
        "colorscale": SEQUENTIAL,
        "cmin": 0,
        "cmax": 1,
        "colorbar": {"title": {"text": title, "side": "right"}, "tickvals": [0, 0.5, 1]},
    }


def readable_on(scale: Sequence[str], places: np.ndarray) -> list[str]:
    """INK or PAPER for each place on a colour scale, whichever stands out more.

    Args:
        scale: Colours at equal distances.
        places: From 0, the scale's first colour, to 1, its last; any shape, which is flattened.

    Source:
        Relative luminance and contrast as WCAG 2.1 defines them. Plotly's own choice leaves 2.7 to
        1 between the text and the middle of a scale.
    """
    stops = np.array([hex_to_rgb(color) for color in scale]) / 255
    at = np.linspace(0, 1, len(stops))
    cells = np.stack([np.interp(places.ravel(), at, part) for part in stops.T], axis=-1)
    ink = _luminance(np.array(hex_to_rgb(INK)) / 255)
    light = _luminance(cells)
    return np.where((light + 0.05) ** 2 > 1.05 * (ink + 0.05), INK, PAPER).tolist()


def _luminance(rgb: np.ndarray) -> np.ndarray:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def largest(values: np.ndarray) -> float:
    """The largest distance of any value from 0; NaN is none."""
    return float(np.abs(values[~np.isnan(values)]).max(initial=0.0))


def whiskers(
    mean: Sequence[float], low: Sequence[float], high: Sequence[float], color: str
) -> dict[str, object]:
    """Plotly's error bars; None, which is not drawn, where there is no interval."""
    up = [None if missing(end) else end - m for m, end in zip(mean, high, strict=True)]
    down = [None if missing(end) else m - end for m, end in zip(mean, low, strict=True)]
    return {
        "type": "data",
        "symmetric": False,
        "array": up,
        "arrayminus": down,
        "color": color,
        "thickness": 1.4,
        "width": 3,
    }
