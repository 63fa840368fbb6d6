"""The explorer's parts: what is shown and what can be set, without what it does."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets as widgets
import plotly.graph_objects as go

from workbench.analysis.head_map import Preset
from workbench.heads import HeadSet
from workbench.lab.attention import Attention
from workbench.lab.maps import OF
from workbench.steering.contrast import CAD, DPS, Contrast, DoLa, Entropy, Strength

CONTRASTS = ("DPS", "CAD", "DPS + CAD", "DoLa")
STRENGTHS = ("constant", "times the entropy")
PRESETS: dict[str, tuple[Preset, str]] = {
    "top K": ("top", "the K heads with the highest score on the map"),
    "random": ("random", "in every layer as many heads as the top K have there, at random"),
    "capability": ("capability", "the K heads that text without a user needs most"),
    "none": ("none", "no heads"),
}
VIEWS = {"without the heads": "ablated", "steered": "steered"}


def _wide(**layout: str) -> widgets.Layout:
    return widgets.Layout(width="auto", **layout)


def _column(*parts: widgets.Widget, basis: str) -> widgets.VBox:
    # A column that has no room beside the others goes below them.
    return widgets.VBox(
        parts, layout=widgets.Layout(flex=f"1 1 {basis}", min_width="0", overflow="hidden")
    )


def _row(*parts: widgets.Widget) -> widgets.HBox:
    return widgets.HBox(
        parts, layout=widgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="4px")
    )


def _slider(kind: type, name: str, **options: object) -> widgets.Widget:
    return kind(
        description=name,
        continuous_update=False,
        layout=_wide(max_width="420px"),
        style={"description_width": "92px"},
        **options,
    )


def _select(name: str, options: object, **more: object) -> widgets.Dropdown:
    return widgets.Dropdown(
        description=name,
        options=options,
        layout=_wide(max_width="420px"),
        style={"description_width": "92px"},
        **more,
    )


def _button(name: str, tooltip: str, **options: object) -> widgets.Button:
    return widgets.Button(description=name, tooltip=tooltip, layout=_wide(), **options)


class Controls:
    """All widgets of an explorer, and how they are laid out.

    Args:
        figure: The head map.
        users: Their names.
        parts: What the map can show.
        clusters: Whether users have clusters.
        heads: Number of the model's heads.
        k: Heads of a preset, at first.
    """

    def __init__(
        self,
        figure: go.FigureWidget,
        users: Sequence[str],
        parts: Sequence[str],
        clusters: bool,
        heads: int,
        k: int,
    ) -> None:
        self.title = widgets.HTML()
        self.map = figure
        self.user = _select("user", list(users))
        self.example = _select("example", [])
        self.of = _select("map of", [name for name in OF if clusters or name != "cluster"])
        self.part = _select("showing", list(parts))
        self.score = _button("score these examples", "Score all heads; takes long", icon="play")
        self.text = widgets.HTML()
        self.heads = widgets.Text(
            description="heads",
            placeholder="L3H5, L4H0",
            continuous_update=False,
            layout=_wide(),
            style={"description_width": "92px"},
        )
        self.presets = {name: _button(name, said) for name, (_, said) in PRESETS.items()}
        self.k = _slider(widgets.IntSlider, "K", value=k, min=1, max=heads)
        self.path = widgets.Text(
            value="heads.json",
            description="file",
            layout=_wide(),
            style={"description_width": "92px"},
        )
        self.save = _button("save the set", "Write the heads as a HeadSet file", icon="save")
        self.code = widgets.HTML()
        self.contrast = _select("contrast", CONTRASTS)
        self.gamma = _slider(widgets.FloatSlider, "γ", value=0.5, min=0.0, max=4.0, step=0.1)
        self.strength = _select("strength", STRENGTHS)
        self.plausible = _slider(
            widgets.FloatSlider, "plausible", value=0.0, min=0.0, max=0.9, step=0.05
        )
        self.max_kl = _slider(
            widgets.FloatSlider, "most KL", value=0.0, min=0.0, max=5.0, step=0.25
        )
        self.max_kl.tooltip = "nats a step; 0 for no limit"
        self.tokens = _slider(widgets.IntSlider, "new tokens", value=32, min=1, max=256)
        self.write = _button("write", "Write the answer plain and steered", icon="pencil")
        self.cancel = _button("cancel", "End writing or scoring", icon="stop", disabled=True)
        self.progress = widgets.FloatProgress(
            value=0.0, min=0.0, max=1.0, layout=_wide(max_width="420px")
        )
        self.status = widgets.HTML()
        self.view = widgets.ToggleButtons(
            options=list(VIEWS), style={"button_width": "auto"}, layout=_wide()
        )
        self.change = widgets.HTML()
        self.position = _slider(widgets.IntSlider, "after token", value=0, min=0, max=0)
        self.next = widgets.HTML()
        self.attending = _select("head", [])
        self.attention = Attention()
        self.written = widgets.HTML()

    def layout(self) -> tuple[widgets.Widget, ...]:
        """The rows of the explorer, which give way to narrow windows."""
        chosen = _column(
            self.user,
            self.example,
            self.of,
            self.part,
            self.score,
            self.heads,
            _row(*self.presets.values()),
            self.k,
            self.contrast,
            self.gamma,
            self.strength,
            self.plausible,
            self.max_kl,
            self.tokens,
            _row(self.write, self.cancel),
            self.progress,
            self.status,
            basis="260px",
        )
        pictured = widgets.VBox(
            [self.title, self.map, self.text],
            layout=widgets.Layout(flex="0 1 540px", min_width="0", overflow="auto"),
        )
        return (
            widgets.HBox([pictured, chosen], layout=_wrapped()),
            widgets.HBox(
                [
                    _column(
                        _title("Target, token by token"), self.view, self.change, basis="420px"
                    ),
                    _column(
                        _title("Next token"),
                        self.position,
                        self.next,
                        basis="320px",
                    ),
                ],
                layout=_wrapped(),
            ),
            _title("Plain and steered"),
            self.written,
            _title("What a head looks at while the target is predicted"),
            self.attending,
            self.attention,
            _title("Take the set along"),
            _row(self.path, self.save),
            self.code,
        )

    def chosen_contrast(self, heads: HeadSet) -> tuple[Contrast, str]:
        """The contrast that is set, with some heads, and the code that makes it of `heads`."""
        gamma = round(float(self.gamma.value), 2)
        scaled = self.strength.value == STRENGTHS[1]
        strength: Strength = Entropy(gamma) if scaled else gamma
        limits = _limits(float(self.plausible.value), float(self.max_kl.value))
        said = f"wb.Entropy({gamma:g})" if scaled else f"{gamma:g}"
        more = "".join(f", {name}={value:g}" for name, value in limits.items())
        dps, cad = DPS(heads, strength, **limits), CAD(strength, **limits)
        codes = {
            "DPS": (dps, f"wb.DPS(heads, {said}{more})"),
            "CAD": (cad, f"wb.CAD({said}{more})"),
            "DPS + CAD": (dps + cad, f"wb.DPS(heads, {said}{more}) + wb.CAD({said}{more})"),
        }
        if self.contrast.value in codes:
            return codes[self.contrast.value]
        # Its own cut would be .1, and what is set is what is taken.
        cut, most = limits.get("plausible", 0.0), limits.get("max_kl")
        more = "" if most is None else f", max_kl={most:g}"
        return DoLa(plausible=cut, max_kl=most), f"wb.DoLa(plausible={cut:g}{more})"


def _limits(plausible: float, max_kl: float) -> dict[str, float]:
    """Cut and limit as a contrast takes them; 0 is none."""
    limits = {"plausible": round(plausible, 2), "max_kl": round(max_kl, 2)}
    return {name: value for name, value in limits.items() if value}


def _title(text: str) -> widgets.HTML:
    return widgets.HTML(f"<h4 style='margin:10px 0 2px'>{text}</h4>", layout=_wide())


def _wrapped() -> widgets.Layout:
    return widgets.Layout(flex_flow="row wrap", grid_gap="16px")
