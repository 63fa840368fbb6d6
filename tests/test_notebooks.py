"""Notebooks run from top to bottom in a fresh kernel, and read well as they are committed."""

from __future__ import annotations

import ast
import base64
import json
import os
import re
import struct
import subprocess
import sys
from itertools import groupby, starmap, zip_longest
from pathlib import Path

import nbformat
import plotly.graph_objects as go
import plotly.io as pio
import psutil
import pytest
from conftest import ROOT

from workbench.figures import inline
from workbench.figures.inline import INTERACTIVE, PICTURE, RENDERER

NAMES = (
    "01_quickstart",
    "02_paper_figures",
    "03_probe_a_new_model",
    "04_is_it_preference",
    "05_steering",
)
LIVE = "live"  # the tag of cells whose output lives in a running kernel only
TIMING = "timing"  # of cells that print how long something took
SHARED = os.environ.get("WORKBENCH_SHARED", str(ROOT.parent / "shared"))


def path_of(name):
    return ROOT / "notebooks" / f"{name}.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_tagged(cell, tag):
    return tag in cell.metadata.get("tags", [])


def is_live(cell):
    return is_tagged(cell, LIVE)


def outputs_of(notebook):
    """What stays of a notebook's outputs."""
    return [output for cell in code_cells(notebook) if not is_live(cell) for output in cell.outputs]


def figures_of(notebook):
    return [o for o in outputs_of(notebook) if INTERACTIVE in o.get("data", {})]


def size_of(picture):
    """Width and height of a PNG in base64."""
    data = base64.b64decode(picture)
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


@pytest.fixture(params=NAMES)
def committed(request):
    return nbformat.read(path_of(request.param), as_version=4)


@pytest.fixture(scope="module", params=NAMES)
def ran(request, tmp_path_factory):
    """A notebook after a fresh kernel has run it, what is committed of it, and where it ran."""
    from nbclient import NotebookClient

    before = nbformat.read(path_of(request.param), as_version=4)
    notebook = nbformat.read(path_of(request.param), as_version=4)
    folder = tmp_path_factory.mktemp(request.param)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, "WORKBENCH_SHARED": SHARED})
    return notebook, before, folder


def of_a_kernel(test):
    """The kernel's ports and sockets are closed by its own process, after the test has ended."""
    ports = pytest.mark.filterwarnings("ignore:.*zmq.*:RuntimeWarning")
    return ports(pytest.mark.filterwarnings("ignore::ResourceWarning")(test))


# Run


@of_a_kernel
def test_notebook_runs_from_top_to_bottom_and_says_what_the_committed_one_says(ran):
    notebook, before, folder = ran
    everything = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert [o.output_type for o in everything if o.output_type == "error"] == []
    assert [o.text for o in everything if o.get("name") == "stderr"] == []
    assert figures_of(notebook)
    assert {path.name for path in folder.iterdir()} <= {"runs"}
    for fresh, kept in zip(code_cells(notebook), code_cells(before), strict=True):
        if is_live(kept):
            continue
        if not (Path(SHARED) / "official").is_dir() and names_in(kept.source) & AUTHORS:
            assert "not at hand" in printed(fresh)
            continue
        assert kinds_of(fresh) == kinds_of(kept), fresh.source
        if not is_tagged(kept, TIMING):
            assert differences(printed(kept), printed(fresh)) == []
    live = [cell for cell in code_cells(notebook) if is_live(cell)]
    assert all("application/vnd.jupyter.widget-view+json" in kinds_of(cell)[-1] for cell in live)


def kinds_of(cell):
    """The kinds of a cell's outputs, pieces of one stream together.

    Without pictures, for which a browser is needed.
    """
    kinds = [
        tuple(sorted(set(output.get("data", {output.output_type: ""})) - {PICTURE}))
        for output in cell.outputs
    ]
    return [kind for kind, _ in groupby(kinds)]


AUTHORS = {"published", "official"}  # names in cells that read the authors' files


def names_in(source):
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?%?")


def differences(kept, fresh):
    """Lines, beside what became of them, that don't say the same.

    Words and whole numbers are the same; the order of sums, which other threads change, may move
    the last place that is printed of a fraction by two, and a percentage by one.
    """
    pairs = zip_longest(kept.splitlines(), fresh.splitlines())
    return [pair for pair in pairs if not (all(map(is_str, pair)) and says_the_same(*pair))]


def is_str(line):
    return isinstance(line, str)


def says_the_same(kept, fresh):
    numbers = zip(NUMBER.findall(kept), NUMBER.findall(fresh), strict=False)
    return NUMBER.split(kept) == NUMBER.split(fresh) and all(starmap(is_close, numbers))


def is_close(one, other):
    """Whether two numbers, as they are printed, are one but for rounding."""
    places = [len(number.partition(".")[2].rstrip("%")) for number in (one, other)]
    units = 1 if one.endswith("%") else 2 if places[0] else 0
    far = abs(float(one.rstrip("%")) - float(other.rstrip("%")))
    same_kind = places[0] == places[1] and one.endswith("%") == other.endswith("%")
    return same_kind and far <= (units + 0.01) * 10 ** -places[0]


@of_a_kernel
def test_every_figure_of_a_run_has_its_picture(browser, ran):
    for output in figures_of(ran[0]):
        layout = output.data[INTERACTIVE]["layout"]
        assert size_of(output.data[PICTURE]) == (layout["width"], layout["height"])


@pytest.mark.parametrize(
    ("kept", "fresh"),
    [
        ("a rise of +0.001 nats\n18 heads", "a rise of -0.001 nats\n18 heads"),
        ("13% (+0.156, 0.9)", "14% (+0.158, 1.0)"),
    ],
)
def test_rounding_makes_no_difference(kept, fresh):
    assert differences(kept, fresh) == []


@pytest.mark.parametrize(
    ("kept", "fresh"),
    [
        ("helps: +0.156", "helps: +0.159"),
        ("18 heads", "17 heads"),
        ("L0H3, L0H5", "L0H3, L0H4"),
        ("13% of it", "15% of it"),
        ("0.15 nats", "15 nats"),
        ("no effect shown (+0.001)", "better than (+0.001)"),
        ("one line", "one line\nand another"),
        ("one line\nand another", "one line"),
        ("says 0.1", "says"),
    ],
)
def test_what_a_run_says_otherwise_is_seen(kept, fresh):
    assert differences(kept, fresh)


def test_paper_figures_do_without_the_authors_files(tmp_path):
    cells = [cell.source for cell in code_cells(nbformat.read(path_of(NAMES[1]), as_version=4))]
    script = tmp_path / "cells.py"
    script.write_text("\n".join([cells[0], *(c for c in cells[1:] if "tables" in c)]))
    done = subprocess.run(
        [sys.executable, script.name],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "WORKBENCH_SHARED": str(tmp_path)},
        timeout=120,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.count("not at hand") == 2


# As committed


def test_these_are_the_notebooks():
    assert sorted(path.stem for path in path_of("").parent.glob("*.ipynb")) == list(NAMES)


def test_committed_outputs_are_whole(committed):
    code = code_cells(committed)
    wanted = [None if is_live(cell) else i for i, cell in enumerate(code, 1)]
    assert [cell.execution_count for cell in code] == wanted
    assert [cell for cell in code[:-1] if is_live(cell)] == []
    assert [o.get("name") for o in outputs_of(committed) if o.get("name") == "stderr"] == []
    assert [cell.outputs for cell in code if is_live(cell)] in ([], [[]])
    assert not any("widget" in kind for o in outputs_of(committed) for kind in o.get("data", {}))


def test_a_picture_lies_beside_every_committed_figure(committed):
    drawn = figures_of(committed)
    assert drawn
    for output in drawn:
        assert min(size_of(output.data[PICTURE])) > 200


def test_committed_notebooks_are_short_and_small(committed):
    assert len(committed.cells) <= 20
    assert all(path_of(name).stat().st_size < 3_000_000 for name in NAMES)


def test_committed_metadata_changes_with_no_run(committed):
    assert set(committed.metadata) == {"kernelspec"}
    assert committed.metadata.kernelspec.name == "python3"
    assert [cell.id for cell in committed.cells] == [
        f"cell-{i:02d}" for i in range(len(committed.cells))
    ]
    for cell in committed.cells:
        assert cell.metadata in ({}, {"tags": [LIVE]}, {"tags": [TIMING]})


def test_a_notebook_begins_with_its_question(committed):
    first = committed.cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# [^\n]+\?(\n|$)", first.source)


FRACTION = re.compile(r"\d[.,]\d|\d ?%(?<!95 %)(?<!100 %)(?<!\b0 %)")


TIME = re.compile(
    r"\d+ ?(?:ms|s|seconds?|minutes?|hours?)\b"
    r"|\b(?:under|below|within|less than|at most) an? (?:second|minute|hour)\b"
)


def results_in(text):
    """What looks like a result in Markdown, outside code and links; times are results too."""
    text = re.sub(r"```.*?```|`[^`]*`|\[[^\]]*\]\([^)]*\)", "", text, flags=re.DOTALL)
    # Thousands, as in 2,500 examples.
    return FRACTION.findall(re.sub(r"\d,\d{3}\b", "", text)) + TIME.findall(text)


def test_no_result_is_typed_into_the_text(committed):
    for cell in committed.cells:
        if cell.cell_type == "markdown":
            assert results_in(cell.source) == [], cell.source


@pytest.mark.parametrize(
    "text",
    [
        *("rises by 0.25 nats", "a share of 42 %", "42% of it", "0,3 nats"),
        *("in well under a minute", "takes 40 seconds", "a token in 12 ms", "within an hour"),
    ],
)
def test_a_typed_result_is_seen(text):
    assert results_in(text)


@pytest.mark.parametrize(
    "text",
    [
        *("at `gamma=0.5`", "[2604.22345](https://x/2604.22345)", "95 %"),
        *("in about a minute", "the 8 highest heads, 12 users"),
    ],
)
def test_settings_and_links_are_no_results(text):
    assert results_in(text) == []


def test_code_imports_the_workbench_and_standard_modules_only(committed):
    allowed = {"workbench", "plotly", "IPython", *sys.stdlib_module_names}
    tree = ast.parse("\n".join(cell.source for cell in code_cells(committed)))
    named = [
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else map(_name, node.names))
    ]
    assert {name.partition(".")[0] for name in named} <= allowed


def _name(alias):
    return alias.name


def test_no_folder_of_a_machine_is_in_the_outputs(committed):
    texts = json.dumps([without_bytes(output) for output in outputs_of(committed)])
    assert re.findall(r"/(?:home|work|root|tmp|Users|opt|var)/[^\"]*", texts) == []


def without_bytes(value):
    """An output without pictures and arrays in base64, which may hold any letters."""
    if isinstance(value, dict):
        return {k: without_bytes(v) for k, v in value.items() if k not in (PICTURE, "bdata")}
    return [without_bytes(one) for one in value] if isinstance(value, list) else value


# Pictures beside figures


@pytest.fixture
def renderers():
    """Plotly's renderers as they were, afterwards; and no browser left."""
    before = pio.renderers.default
    yield pio.renderers
    pio.renderers.default = before
    if RENDERER in pio.renderers:
        pio.renderers[RENDERER].artist.close()
        del pio.renderers._renderers[RENDERER]


@pytest.fixture
def figure():
    return go.Figure(go.Bar(y=[3, 1, 2]), layout={"width": 420, "height": 260})


def children():
    """The processes that this one has started itself, and that run."""
    return {
        child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE
    }


def test_a_figure_is_shown_interactive_and_as_a_picture_of_its_size(browser, renderers, figure):
    inline(scale=1.5)
    bundle = figure._repr_mimebundle_()
    assert set(bundle) == {INTERACTIVE, PICTURE}
    assert bundle[INTERACTIVE]["data"][0]["y"] == [3, 1, 2]
    assert size_of(bundle[PICTURE]) == (630, 390)


def test_one_browser_draws_all_pictures_and_ends(browser, renderers, figure):
    before = children()
    inline()
    started = children() - before
    assert started
    inline(scale=2)  # the cell run again
    for _ in range(2):
        assert size_of(figure._repr_mimebundle_()[PICTURE]) == (840, 520)
    assert children() - before == started
    renderers[RENDERER].artist.close()
    assert children() - before == set()


def test_pictures_are_drawn_without_a_page_of_the_network(browser, renderers, monkeypatch):
    import kaleido

    asked = {}

    class Spy(kaleido.Kaleido):
        def __init__(self, **options):
            asked.update(options)
            super().__init__(**options)

    monkeypatch.setattr(kaleido, "Kaleido", Spy)
    inline()
    assert asked["mathjax"] is False


def test_without_a_browser_figures_are_interactive_and_a_line_says_so(
    renderers, figure, monkeypatch, capsys
):
    monkeypatch.setenv("BROWSER_PATH", "/nowhere/chromium")
    inline()
    said = capsys.readouterr()
    assert "interactive only" in said.out
    assert "apt install chromium" in said.out
    assert set(figure._repr_mimebundle_()) == {INTERACTIVE}
    assert capsys.readouterr() == ("", "")


def test_a_browser_that_does_not_start_is_told_and_nothing_waits(
    renderers, figure, monkeypatch, capsys, tmp_path
):
    broken = tmp_path / "chromium"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(broken))
    inline()
    assert "the browser failed" in capsys.readouterr().out
    assert set(figure._repr_mimebundle_()) == {INTERACTIVE}


def test_a_browser_that_dies_costs_the_pictures_and_no_figure(browser, renderers, figure, capsys):
    before = children()
    inline()
    assert PICTURE in figure._repr_mimebundle_()
    for pid in children() - before:
        for process in (*psutil.Process(pid).children(recursive=True), psutil.Process(pid)):
            process.kill()
    capsys.readouterr()
    assert set(figure._repr_mimebundle_()) == {INTERACTIVE}
    assert capsys.readouterr().out.count("the browser failed") == 1
    assert set(figure._repr_mimebundle_()) == {INTERACTIVE}
    assert capsys.readouterr().out == ""
    inline()  # another browser
    assert PICTURE in figure._repr_mimebundle_()


@pytest.mark.parametrize("scale", [0, -1])
def test_a_picture_of_no_size_is_refused(renderers, scale):
    with pytest.raises(ValueError, match="scale must be above 0"):
        inline(scale=scale)
