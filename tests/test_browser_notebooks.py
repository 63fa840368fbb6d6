"""Every notebook in JupyterLab, driven in a real browser; and the checks themselves."""

from __future__ import annotations

import math
import time

import labserver
import plotly.graph_objects as go
import psutil
import pytest
from conftest import ROOT
from labserver import (
    PANEL,
    PLOT,
    Watch,
    code_cells,
    covered,
    end_kernel,
    errors,
    open_notebook,
    pictures,
    run_all,
    screenshot,
    write_notebook,
)
from plotly.offline import get_plotlyjs

pytestmark = pytest.mark.browser
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"
# Of a minute each on a machine of its own; tests of two workers and their browsers share two cores.
TIMEOUT = 300


def with_plotly(cells):
    """The outputs that hold a Plotly figure."""
    outputs = [output for cell in cells for output in cell["outputs"]]
    return [output for output in outputs if PLOTLY in output.get("data", {})]


def stderr(cells):
    """What cells wrote beside their results: warnings, and the bars of what runs long."""
    outputs = [output for cell in cells for output in cell["outputs"]]
    return ["".join(one["text"]) for one in outputs if one.get("name") == "stderr"]


def interactive(page):
    """The Plotly figures of a notebook, each drawn.

    Where there is a picture too, JupyterLab shows that until the mouse is over it.
    """
    outputs = page.locator(f"{PANEL} .jp-RenderedPlotly").all()
    for output in outputs:
        if not output.locator(".plot-container").count():
            output.locator(".plot-img").dispatch_event("mouseenter")
        output.locator(".nsewdrag").first.wait_for(state="attached")
    return outputs


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_in_jupyterlab_and_every_figure_is_drawn(name, lab, open_page):
    page = open_page(viewport={"width": 1280, "height": 1600})
    open_notebook(page, lab, name)
    run_all(page, TIMEOUT)
    figures = interactive(page)
    screenshot(page, f"notebook-{name}", whole=True)
    cells = code_cells(page)
    assert errors(page) == []
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert stderr(cells) == []
    assert len(figures) == len(with_plotly(cells)) > 0
    # In a narrow window wide figures are scrolled; a wide one shows all of each at once.
    page.set_viewport_size({"width": 2000, "height": 1600})
    for figure in page.locator(f"{PANEL} {PLOT}").all():  # those of widgets too
        area = covered(page, figure)
        assert area, "a figure has no axes"
        assert min(area) > 50, f"marks cover {area} pixels: {figure.inner_text()[:200]!r}"
    # Beside each interactive figure lies a picture for where nothing draws.
    assert all("image/png" in output["data"] for output in with_plotly(cells))
    widths = pictures(page)
    assert len(widths) >= len(figures)
    assert min(widths) > 300
    end_kernel(page)


# The checks can fail


def show(page, *figures):
    """A page of figures."""
    drawn = [figure.to_html(full_html=False, include_plotlyjs=False) for figure in figures]
    page.set_content(f"<script>{get_plotlyjs()}</script>" + "".join(drawn))
    page.locator(f"{PLOT} .nsewdrag").first.wait_for(state="attached")
    return page.locator(PLOT).all()


def test_blank_figures_are_told_from_drawn_ones(page):
    square = [[1.0, 2.0], [3.0, 4.0]]
    drawn, line, empty, missing = show(
        page,
        go.Figure(go.Heatmap(z=square)),
        go.Figure(go.Scatter(y=[1, 3, 2])),
        go.Figure(layout={"title": "a title and axes", "xaxis": {"range": [0, 1]}}),
        go.Figure(go.Heatmap(z=[[math.nan] * 2] * 2)),
    )
    assert covered(page, drawn)[0] > 50_000  # the whole area
    assert 50 < covered(page, line)[0] < 50_000
    assert covered(page, empty) == [0]
    assert covered(page, missing) == [0]
    assert covered(page, drawn)[0] > 50_000  # hidden marks are shown again


def test_errors_requests_and_broken_pictures_are_seen(chromium, lab):
    write_notebook(
        lab.folder / "broken.ipynb",
        [
            "from IPython.display import HTML, Javascript, display\n"
            "display(HTML('<img src=\"http://example.org/x.png\">'))",
            'display(Javascript(\'console.error("ouch"); new WebSocket("ws://example.com/");'
            'setTimeout(() => { throw Error("late") }, 10)\'))',
            "1 / 0",
            "'never reached'",
        ],
    )
    context = chromium.new_context()
    watch = Watch(context)
    page = context.new_page()
    open_notebook(page, lab, "broken")
    run_all(page)
    assert errors(page) == ["ZeroDivisionError: division by zero"]
    assert code_cells(page)[3]["execution_count"] is None
    assert 0 in pictures(page)
    wanted = ("http://example.org/x.png", "ws://example.com/", "ouch", "raised: late")
    end = time.monotonic() + 20  # what comes late is waited for
    while not all(one in complaints(watch) for one in wanted) and time.monotonic() < end:
        page.wait_for_timeout(50)
    context.close()
    for one in wanted:
        assert one in complaints(watch)


def complaints(watch):
    """What a page's watch says when the page is checked."""
    try:
        watch.check()
    except AssertionError as found:
        return str(found)
    return ""


def test_a_server_that_never_says_where_it_is_is_ended_and_its_log_shown(tmp_path, monkeypatch):
    # It names an address, and then nothing.
    silent = "import sys, time; print('at http://nowhere', flush=True); "
    silent += "print('stuck here', file=sys.stderr, flush=True); time.sleep(60); print('by itself')"
    monkeypatch.setattr(labserver, "LAB", silent)
    monkeypatch.setattr(labserver, "START", 3)
    before = {child.pid for child in psutil.Process().children()}
    with (
        pytest.raises(AssertionError, match=r"did not start:(?s:.*)stuck here") as ended,
        labserver.running(tmp_path),
    ):
        pass
    assert "by itself" not in str(ended.value)
    assert {child.pid for child in psutil.Process().children()} <= before
