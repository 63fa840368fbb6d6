"""The report on paper, as a browser lays it out."""

from __future__ import annotations

import plotly.graph_objects as go
import pytest
from jinja2 import Environment, PackageLoader
from plotly.offline import get_plotlyjs

from workbench.figures.template import TEMPLATE
from workbench.report.page import _figure

pytestmark = pytest.mark.browser
PAPER_WIDTH = 718  # pixels between the margins of a sheet of A4


def printed(page, tmp_path):
    """The report of made-up findings, as paper would show it to a reader of a dark screen."""
    wide = go.Figure(layout={"template": TEMPLATE, "width": 1100, "height": 400, "title": "wide"})
    row = dict.fromkeys(("example", "query", "target", "plain", "steered"), "several words " * 9)
    section = {"lines": ["a finding"], "figures": {"wide": _figure("wide", wide)}, "tables": []}
    environment = Environment(loader=PackageLoader("workbench", "templates"), autoescape=True)
    environment.filters["cell"] = str
    text = environment.get_template("report.html.j2").render(
        summary={
            "headline": ["a verdict"],
            "users": {"discovery": 2, "evaluation": 2},
            "settings": {"depth": "full"},
            "truncation": {"discovery": {f"items cut {i}": 1152 for i in range(7)}},
        },
        samples=[row],
        settings={"data": "0123456789abcdef" * 8},
        versions={},
        plotly=get_plotlyjs(),
        circuitsvis="",
        attention=[],
        sections=[{"key": key, "title": key, **section} for key in ("heads", "texts", "origin")],
    )
    file = tmp_path / "report.html"
    file.write_text(text, encoding="utf-8")
    page.set_viewport_size({"width": PAPER_WIDTH, "height": 1000})
    page.emulate_media(media="print", color_scheme="dark")
    page.goto(file.as_uri())
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    return page


def test_a_printed_report_is_dark_on_white_and_nothing_is_cut_at_the_edge_of_the_paper(
    page, tmp_path
):
    sheet = printed(page, tmp_path)
    assert sheet.evaluate("document.documentElement.scrollWidth") <= PAPER_WIDTH
    plots = sheet.locator(".figure > div").evaluate_all(
        "all => all.map(one => one.getBoundingClientRect().right)"
    )
    assert len(plots) == 3
    assert all(0 < right <= PAPER_WIDTH for right in plots)
    assert sheet.locator("section:visible").count() == 3
    assert not sheet.locator("nav").is_visible()
    colors = sheet.locator("body").evaluate(
        "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]"
    )
    assert colors == ["rgb(26, 26, 26)", "rgb(255, 255, 255)"]
