"""Legible: colours that survive colour blindness and grey print, one look, no text that is cut."""

from __future__ import annotations

import inspect
import re
from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest
from colorspacious import cspace_convert
from plotly.colors import hex_to_rgb
from plotly.offline import get_plotlyjs
from test_aspect_figures import make_aspects, make_position
from test_control_figures import make_classes, make_coherence, make_damage, make_specific
from test_figures import make_overlap, make_scores, make_sweep, references
from test_official import group_of, overlap_of
from test_routing_figures import make_routing, make_weights
from test_stability_figures import noise_table, precision_table
from test_stability_figures import random_scores as normal_scores
from test_transfer_figures import lent, two_models

from workbench import figures
from workbench.analysis import needed
from workbench.analysis.head_map import head_map
from workbench.analysis.recovery import recovery
from workbench.analysis.recurrence import recurrence
from workbench.figures import template
from workbench.figures.classes import COLOURS, SYMBOLS
from workbench.figures.marks import DARK, MINUS, WRITTEN
from workbench.figures.template import BODY, DIVERGING, GAP, SEQUENTIAL, TEMPLATE, TITLE, UNSCORED
from workbench.heads import HeadSet

# As Machado, Oliveira and Fernandes (2009) simulate the loss of one kind of cone.
KINDS = ("deuteranomaly", "protanomaly", "tritanomaly")
# Jet's colours, which are neither ordered in grey nor apart to all eyes.
JET = ("#000080", "#0000ff", "#00ffff", "#80ff80", "#ffff00", "#ff0000", "#800000")
RED_GREEN = ("#d73027", "#f46d43", "#ffffff", "#66bd63", "#1a9850")
NAMES = {"white": "#ffffff"}
TASKS = tuple(f"a-task-with-a-long-name-{i}" for i in range(3))


# Colours


def lab(color, kind=None):
    """CIELAB of a colour as it is seen with one kind of colour blindness."""
    rgb = np.array(hex_to_rgb(NAMES.get(color, color))) / 255
    if kind:
        space = {"name": "sRGB1+CVD", "cvd_type": kind, "severity": 100}
        rgb = np.clip(cspace_convert(rgb, space, "sRGB1"), 0, 1)
    return cspace_convert(rgb, "sRGB1", "CIELab")


def lightness(color):
    """What grey print leaves of a colour, from 0 to 100."""
    return lab(color)[0]


def apart(a, b):
    """The least distance between two colours to any eye."""
    return min(np.linalg.norm(lab(a, kind) - lab(b, kind)) for kind in (None, *KINDS))


def flaws_of_diverging(scale):
    """What is wrong with a scale around 0."""
    middle, found = len(scale) // 2, []
    if apart(scale[0], scale[-1]) < 40:
        found.append("ends")
    if apart(scale[middle // 2], scale[-1 - middle // 2]) < 20:
        found.append("quarters")
    for arm in (scale[middle:], scale[middle::-1]):
        if any(lightness(a) - lightness(b) < 5 for a, b in pairwise(arm)):
            found.append("not darker from the middle to the end")
    if abs(lightness(scale[0]) - lightness(scale[-1])) > 10:
        found.append("one end darker")
    return found


def flaws_of_sequential(scale):
    """What is wrong with a scale from 0 on."""
    steps = [lightness(a) - lightness(b) for a, b in pairwise(scale)]
    return ["not darker step by step"] * any(step < 5 for step in steps)


def test_scales_are_ordered_in_grey_and_told_apart_by_every_eye():
    assert not flaws_of_diverging(DIVERGING)
    assert not flaws_of_sequential(SEQUENTIAL)


def test_a_rainbow_and_a_scale_from_red_to_green_are_found_out():
    assert "quarters" in flaws_of_diverging(RED_GREEN)
    assert "not darker from the middle to the end" in flaws_of_diverging(JET)
    assert flaws_of_sequential(JET)


def test_gap_unscored_and_zero_differ_and_a_gap_in_grey_too():
    for a, b in combinations((GAP, UNSCORED, DIVERGING[len(DIVERGING) // 2], SEQUENTIAL[0]), 2):
        assert apart(a, b) > 6, (a, b)
    assert lightness("white") - lightness(GAP) > 10


def contrast(a, b):
    """Of two colours, as WCAG 2.1 defines it."""
    y = [
        cspace_convert(np.array(hex_to_rgb(NAMES.get(c, c))) / 255, "sRGB1", "XYZ1")[1]
        for c in (a, b)
    ]
    return (max(y) + 0.05) / (min(y) + 0.05)


def test_text_can_be_read_on_every_colour_it_stands_on():
    for color in (template.INK, template.FAINT):
        assert contrast(color, template.PAPER) > 4.5
    for scale in (DIVERGING, SEQUENTIAL):
        places = np.linspace(0, 1, 201)
        stops = np.array([hex_to_rgb(color) for color in scale])
        cells = np.stack(
            [np.interp(places, np.linspace(0, 1, len(scale)), part) for part in stops.T], axis=-1
        )
        for cell, text in zip(cells, template.readable_on(scale, places), strict=True):
            assert contrast(f"#{''.join(f'{round(v):02x}' for v in cell)}", text) > 3.9


# One look


@cache
def small_and_large():
    """Every public figure, of a small table and of a large one with long names."""
    square = np.random.default_rng(0).normal(0.02, 0.05, (24, 32, 32))
    users = [f"u{i // 2}" for i in range(24)]
    wide = make_scores(square, users, [TASKS[i % 3] for i in range(24)])
    few = normal_scores(tasks=("tag", "rating"))
    own = make_scores(square[:, :2, :4], users)
    planted, *many = (
        recovery(dict.fromkeys(noises, (own, own)), HeadSet.parse("L0H0"), counts=[4, 8, 16])
        for noises in ((0.0,), (0.0, 0.1, 0.2, 0.4))
    )
    official = [
        group_of(f"k{i}", [[1, 0.5], [-0.25 * i, 0]], 2, [[[1, 0.5], [0, 0]]]) for i in range(4)
    ]
    long = [f"a-user-with-a-long-name-{i:03d}" for i in range(30)]
    routed, routes = make_routing(), make_routing(TASKS)
    higher = ["higher"] * 3
    return {
        "aspect_heads": (make_aspects(), make_aspects(TASKS, 32, 32)),
        "aspect_overlap": (make_aspects(), make_aspects(TASKS)),
        "class_effects": (make_classes(), make_classes(TASKS)),
        "coherence": (make_coherence(), make_coherence(TASKS, better=higher)),
        "damage": (make_damage(), make_damage(TASKS, (32, 32))),
        "example_counts": (needed.by_examples(few, 3), overlap_of(*official)),
        "head_count": (make_sweep(), make_sweep(tuple(2**i for i in range(9)), TASKS[:2])),
        "head_map": (head_map(few), head_map(wide, "task", TASKS[0])),
        "head_weights": (make_weights(routed), make_weights(routes, 32, 32)),
        "lend": (lent(["a", "b"]), lent(long)),
        "overlap": (make_overlap(**references()), make_overlap(long)),
        "position": (make_position(), make_position(TASKS, "turns")),
        "precision": (precision_table(), precision_table(-0.5)),
        "profile_noise": (noise_table(), noise_table(TASKS)),
        "ranked_heads": (few, wide),
        "recovery": (planted, *many),
        "recurrence": (recurrence(few, 3), recurrence(wide, 3)),
        "resolution": (overlap_of(*official), overlap_of(*official[:1])),
        "routing": (routed, routes),
        "specific_heads": (make_specific(), make_specific(TASKS, shape=(32, 32))),
        "transfer": (two_models(), two_models(TASKS, ("a-model-of-a-long-name", "b"))),
        "user_heatmaps": (few, wide),
    }


@pytest.fixture(scope="module")
def drawn():
    return {
        f"{name}-{size}": getattr(figures, name)(table)
        for name, tables in small_and_large().items()
        for size, table in zip(("small", "large"), tables, strict=True)
    }


def walk(value, path=()):
    """Every entry of nested dictionaries and lists, with where it stands."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from walk(entry, (*path, key))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from walk(entry, path)
    else:
        yield path, value


def entries(figure):
    value = figure.to_dict()
    del value["layout"]["template"]
    return list(walk(value))


def test_every_public_figure_is_looked_at():
    public = {
        name
        for name in figures.__all__
        if inspect.signature(getattr(figures, name)).return_annotation == "go.Figure"
    }
    assert public == set(small_and_large())


def test_every_figure_has_the_template_and_a_title_of_one_line(drawn):
    for name, figure in drawn.items():
        assert figure.layout.template == TEMPLATE, name
        assert figure.layout.title.text, name
        assert "<br>" not in figure.layout.title.text, name
        assert figure.layout.title.subtitle.text.count("<br>") <= 1, name


def test_no_figure_has_a_size_of_type_or_a_colour_of_its_own(drawn):
    sizes = {
        value for path, value in walk(TEMPLATE.to_plotly_json()) if path[-2:] == ("font", "size")
    }
    assert sizes == {BODY, TITLE}
    constants = [value for name, value in vars(template).items() if name.isupper()]
    palette = {value for _, value in walk(constants) if isinstance(value, str)}
    for name, figure in drawn.items():
        for path, value in entries(figure):
            if path[-1] == "size" and any("font" in part for part in path):
                assert value == BODY, (name, path)
            elif path[-1] == "color" and "font" in path[-2]:
                assert value in (template.INK, template.FAINT, template.PAPER), (name, path)
            elif isinstance(value, str) and (
                path[-1].endswith("color") or path[-1] == "colorscale"
            ):
                assert value in palette, (name, path, value)


def test_a_scale_with_a_sign_is_centred_and_any_other_goes_from_0_to_1(drawn):
    signed = 0
    for name, figure in drawn.items():
        layout = figure.to_dict()["layout"]
        for axis in (layout[key] for key in layout if key.startswith("coloraxis")):
            colors = tuple(color for _, color in figure.layout.coloraxis.colorscale)
            if axis["cmin"] < 0:
                assert axis["cmid"] == 0 == axis["cmin"] + axis["cmax"], name
                assert axis["colorscale"][-1] in (DIVERGING[-1], [1, DIVERGING[-1]]), name
                signed += 1
            else:
                assert (axis["cmin"], axis["cmax"]) == (0, 1), name
                assert colors == SEQUENTIAL, name
            if axis.get("showscale", True):
                assert axis["colorbar"]["title"]["text"], name
    assert signed >= 10


def test_a_minus_stands_where_a_signed_scale_is_clearly_below_0_and_nowhere_else(drawn):
    seen = 0
    for name, figure in drawn.items():
        axes = figure.to_dict()["layout"]
        panels = {(t.xaxis, t.yaxis) for t in figure.data if t.type == "heatmap" and t.coloraxis}
        for panel in panels:
            traces = [t for t in figure.data if (t.xaxis, t.yaxis) == panel]
            cells = next(t for t in traces if t.type == "heatmap")
            axis = axes[cells.coloraxis]
            if axis["cmin"] == 0 or any(t.name == WRITTEN for t in traces):
                assert not [t for t in traces if t.name == MINUS], name
                continue
            z = np.nan_to_num(np.asarray(cells.z, dtype=float))
            expected = {(y, x) for y, x in np.argwhere(z < axis["cmin"] / 8).tolist()}
            marks = [t for t in traces if t.name == MINUS]
            found = {(int(y), int(x)) for t in marks for x, y in zip(t.x, t.y, strict=True)}
            assert found == expected, name
            for mark in marks:
                for y, x, color in zip(mark.y, mark.x, mark.marker.line.color, strict=True):
                    assert (color == template.PAPER) == (z[y, x] < DARK * axis["cmin"]), name
            seen += len(found)
    assert seen > 500


def test_every_axis_of_numbers_says_what_it_is(drawn):
    for name, figure in drawn.items():
        layout = figure.to_dict()["layout"]
        axes = {key: axis for key, axis in layout.items() if re.match("[xy]axis", key)}
        for key, axis in axes.items():
            if axis.get("showticklabels") is False or axis.get("ticktext"):
                continue
            # The panels of a row share a title, which stands beside the leftmost.
            row = [near for near in axes if near[0] == key[0] == "y"]
            shared = [near for near in row if axes[near].get("domain") == axis.get("domain")]
            said = [axes[near].get("title", {}).get("text") for near in (key, *shared)]
            assert said[0] or len(set(filter(None, said))) == 1, (name, key)
            for text in filter(None, said):
                if re.search("PCS|loss|damage|value of the profile", text):
                    assert "nats" in text, (name, text)


def looks(figure):
    """Each entry of a legend: its colours, and what else tells it from others beside it."""
    for trace in figure.data:
        if trace.name and trace.showlegend is not False and trace.type in ("scatter", "bar"):
            value = trace.to_plotly_json()
            marker, line = value.get("marker", {}), value.get("line", {})
            colors = [marker.get("color"), line.get("color"), marker.get("line", {}).get("color")]
            known = {c for _, c in walk(colors) if isinstance(c, str)} - {template.PAPER}
            symbol = "markers" in value.get("mode", "") and marker.get("symbol", "circle")
            yield trace.name, known, (trace.legend, trace.type, symbol, line.get("dash"))


def test_what_a_legend_names_is_told_apart_by_its_mark_or_by_every_eye_and_in_grey(drawn):
    pairs = 0
    for name, figure in drawn.items():
        for (a, one, mark), (b, two, other) in combinations(looks(figure), 2):
            if mark != other:
                # In two legends they stand in two panels.
                continue
            pairs += 1
            assert min(apart(c, d) for c in one for d in two) >= 10, (name, a, b)
            greys = (abs(lightness(c) - lightness(d)) for c in one for d in two)
            assert min(greys) >= 5, (name, a, b)
    assert pairs


def test_every_head_class_has_a_colour_and_a_symbol_of_its_own():
    assert set(COLOURS) == set(SYMBOLS)
    for one in (COLOURS, SYMBOLS):
        assert len(set(one.values())) == len(one)


# In a browser

MEASURE = """ids => Object.fromEntries(ids.map(id => {
  const root = document.getElementById(id);
  const frame = root.querySelector('.main-svg').getBoundingClientRect();
  const texts = [...root.querySelectorAll('.main-svg text')].filter(
    text => text.textContent.trim() && text.getBoundingClientRect().width);
  const boxes = texts.map(text => {
    const box = text.getBoundingClientRect();
    return {text: text.textContent, left: box.left - frame.left, right: box.right - frame.left,
            top: box.top - frame.top, bottom: box.bottom - frame.top};
  });
  // Plotly shrinks some text by a transform.
  const scale = text => { const m = text.getScreenCTM(); return Math.hypot(m.a, m.b); };
  const sizes = texts.flatMap(text => [text, ...text.querySelectorAll('tspan')].map(
    part => Math.round(10 * scale(text) * parseFloat(getComputedStyle(part).fontSize)) / 10));
  return [id, {boxes, sizes: [...new Set(sizes)], width: frame.width, height: frame.height}];
}))"""
# Of a line's box, what lies above and below its letters.
LEADING = 2


def flaws(found):
    """Texts that are cut or lie on one another, and sizes that are not the template's."""
    boxes = found["boxes"]
    cut = [
        f"cut: {box['text']}"
        for box in boxes
        if box["left"] < -1
        or box["right"] > found["width"] + 1
        or box["top"] < -LEADING
        or box["bottom"] > found["height"] + LEADING
    ]
    lie = [
        f"on one another: {a['text']} | {b['text']}"
        for a, b in combinations(boxes, 2)
        if min(a["right"], b["right"]) - max(a["left"], b["left"]) > 1
        and min(a["bottom"], b["bottom"]) - max(a["top"], b["top"]) > 1 + 2 * LEADING
    ]
    return cut + lie + [f"size {size}" for size in found["sizes"] if size not in (BODY, TITLE)]


def measured(page, tmp_path, shown):
    """What a browser makes of figures, by their names."""
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=False, div_id=name)
        for name, figure in shown.items()
    ]
    file = tmp_path / "figures.html"
    text = f"<!doctype html><meta charset=utf-8><script>{get_plotlyjs()}</script>{''.join(parts)}"
    file.write_text(text, encoding="utf-8")
    page.goto(file.as_uri())
    for name in shown:
        page.locator(f"[id='{name}'] .main-svg").first.wait_for()
    return page.evaluate(MEASURE, list(shown))


@pytest.mark.browser
def test_no_text_is_cut_or_lies_on_another_or_has_a_size_of_its_own(page, tmp_path, drawn):
    found = measured(page, tmp_path, drawn)
    assert all(len(one["boxes"]) > 5 for one in found.values())
    wrong = {name: flaws(one) for name, one in found.items()}
    assert not {name: list_ for name, list_ in wrong.items() if list_}


@pytest.mark.browser
def test_a_cut_title_texts_on_one_another_and_a_small_size_are_found_out(page, tmp_path):
    bad = figures.user_heatmaps(normal_scores())
    bad.update_layout(title_text="much too long " * 20)
    bad.add_annotation(text="one", x=1, y=1).add_annotation(text="two", x=1, y=1)
    bad.add_annotation(text="small", x=0, y=0, font_size=8)
    wrong = flaws(measured(page, tmp_path, {"bad": bad})["bad"])
    assert [flaw.split(":")[0] for flaw in wrong] == ["cut", "on one another", "size 8"]
