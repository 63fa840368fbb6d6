"""The documentation: it builds without a warning, is whole, and says what is so."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
import threading
import zlib
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from operator import attrgetter
from types import SimpleNamespace

import nbformat
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from typer.main import get_command
from typer.testing import CliRunner

import workbench as wb
from workbench.cli.commands import app
from workbench.discovery.shapes import read_config, shape_of
from workbench.evaluation.grid import _Grid

PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md", ROOT / "README.md"])
CONTRIBUTING = ROOT / "CONTRIBUTING.md"


def page_id(path):
    return path.stem


def script(name):
    """A module of `docs/`, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The built site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` builds it: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,  # the code is looked at below, with what was printed
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def anchors(site):
    """What the site's inventory lists: a name's page and anchor."""
    data = (site / "objects.inv").read_bytes().split(b"zlib.\n", 1)[1]
    found = {}
    for line in zlib.decompress(data).decode().splitlines():
        name, _kind, _priority, place, _shown = line.split(" ", 4)
        found[name] = place.replace("$", name)
    return found


@pytest.fixture(scope="module")
def reference():
    return script("reference")


class Elements(HTMLParser):
    """The elements of a page: their names and attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def elements(path):
    return Elements(path.read_text(encoding="utf-8")).found


def test_every_public_name_has_its_place_in_the_reference(site, anchors):
    names = [f"workbench.{name}" for name in wb.__all__]
    names += [f"workbench.figures.{name}" for name in wb.figures.__all__]
    assert [name for name in names if name not in anchors] == []
    ids = {}
    for name in names:
        page, anchor = anchors[name].split("#")
        if page not in ids:
            ids[page] = {attributes.get("id") for _, attributes in elements(site / page)}
        assert anchor in ids[page], f"{page} lacks {anchor}"


def test_every_public_name_is_summed_up_as_its_docstring_begins(reference):
    public = reference.public()
    assert len(public) >= len(wb.__all__)
    rows = dict(
        re.findall(r"^\| \[`([\w.]+)`\]\[[^]]+\] \| (.*) \|$", reference.names_page(), re.M)
    )
    for shown in public:
        value = attrgetter(shown.removeprefix("wb."))(wb)
        if callable(value):
            first = (value.__doc__ or "").split("\n\n")[0]
            assert first.strip(), f"{shown} has no docstring"
            assert rows[shown].replace("\\|", "|").split() == first.split()
    assert rows["wb.generate"]


def test_every_module_of_the_tree_is_in_the_reference(anchors):
    wanted = []
    for path in (ROOT / "workbench").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if not re.search(r"\._|^workbench$|^workbench\.cli", name):
            wanted.append(name)
    assert len(wanted) > 100
    assert [name for name in sorted(wanted) if name not in anchors] == []


def test_every_command_is_on_the_page_of_commands(site):
    ids = {attributes.get("id") for _, attributes in elements(site / "reference/cli.html")}
    assert {f"workbench-{'-'.join(words)}" for words, _ in commands(get_command(app))} <= ids


LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


def test_no_page_loads_anything_from_another_host(site):
    foreign = re.compile(r"(?:https?:)?//")
    for path in site.rglob("*.html"):
        for tag, attributes in elements(path):
            assert not foreign.match(attributes.get(LOADS.get(tag), "") or ""), (path, attributes)
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        urls = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", text)
        assert [url for pair in urls for url in pair if foreign.match(url)] == [], path


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(site):
    """The site's address on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.browser
def test_a_browser_finds_its_way_at_800_pixels_and_asks_no_other_host(site, served, browser):
    from playwright.sync_api import sync_playwright

    asked, wrong = [], []
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        try:
            page = chromium.new_page(viewport={"width": 800, "height": 900})
            page.on("request", lambda request: asked.append(request.url))
            page.goto((site / "index.html").as_uri())  # from the folder, without a server
            assert page.get_by_role("heading", name="Three ways in").is_visible()
            page.on("pageerror", lambda error: wrong.append(str(error)))
            for name in ("index", "llama-3-8b", "reference/steering", "reference/cli"):
                page.goto(f"{served}/{name}.html")
                inside = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
                assert inside, f"{name} runs over the side of a window of 800 pixels"
            page.goto(f"{served}/search.html?q=score_heads")
            found = page.locator("#mkdocs-search-results a").first
            found.wait_for()
            assert found.get_attribute("href").endswith("workbench.discovery.run.score_heads")
        finally:
            chromium.close()
    assert [url for url in asked if not url.startswith(("file:", served))] == []
    assert wrong == []


def test_only_sources_are_set_apart_and_no_prose_is_taken_for_a_section(site):
    kinds = {
        attributes.get("class")
        for path in site.glob("reference/*.html")
        for tag, attributes in elements(path)
        if tag == "details"
    }
    assert kinds == {"source"}


def test_a_page_shows_shapes_types_errors_and_source(site):
    text = (site / "reference/steering.html").read_text(encoding="utf-8")
    after = text[text.index('id="workbench.steering.rules.join"') :]
    shown = re.sub(r"<[^>]+>", "", after[: after.index('<h3 id="workbench.')])
    shown = re.sub(r"\s+", " ", shown.replace("&#39;", '"').replace("&quot;", '"'))
    assert 'full: Float[Tensor, "batch d_vocab"]' in shown
    assert "Parameters:" in shown
    assert "Source Section 4 of the paper" in shown
    assert "Raises:" in text and "Returns:" in text


# What the pages say


def blocks(path, language):
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(command, words=()):
    inner = getattr(command, "commands", None)
    if inner is None:
        yield words, command
    for name, one in (inner or {}).items():
        yield from commands(one, (*words, name))


def documented():
    """Every command line of ours in a page's shell blocks, unless a part is left open in it."""
    for path in PAGES:
        lines = "\n".join(blocks(path, "sh")).replace("\\\n", " ").splitlines()
        for line in map(str.strip, lines):
            if line.startswith("workbench ") and "..." not in line:
                yield pytest.param(line, id=f"{path.stem}: {line[:60]}")


@pytest.mark.parametrize("line", list(documented()))
def test_a_documented_command_parses(line):
    words = shlex.split(line, comments=True)[1:]
    command = get_command(app)
    while hasattr(command, "commands"):
        assert words[0] in command.commands, line
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, words)  # unknown options and wrong values raise


def test_the_pages_have_commands_to_check():
    assert sum(1 for _ in documented()) >= 15


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_make_targets_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    there = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"`make ((?:[a-z]+ ?)+)`|^make ((?:[a-z]+ ?)+)", text, re.MULTILINE)
    assert {word for pair in named for part in pair for word in part.split()} <= there


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_python_in_the_pages_uses_names_and_parameters_that_exist(path):
    nodes = [node for code in blocks(path, "python") for node in ast.walk(ast.parse(code))]
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        chain = re.fullmatch(r"wb((?:\.\w+)+)", ast.unparse(call.func))
        if chain:
            target = attrgetter(chain[1][1:])(wb)  # an unknown name raises
            given = {word.arg for word in call.keywords if word.arg}
            assert given <= set(inspect.signature(target).parameters), ast.unparse(call)


def test_what_contributing_names_is_there():
    text = CONTRIBUTING.read_text(encoding="utf-8")
    known = {path.name for folder in ("workbench", "tests", "docs") for path in all_files(folder)}
    for name in re.findall(r"`([\w./-]+\.(?:py|md|yml))`", text):
        if not re.search(r"NAME|NN|utils", name):
            assert (ROOT / name).is_file() if "/" in name else name in known | roots(), name
    pairs = re.findall(r"((?:`\w+`(?:, | and )?)+) of\s`([\w./]+\.py)`", text)
    assert len(pairs) >= 10
    for names, file in pairs:
        (path,) = [p for f in ("workbench", "tests") for p in all_files(f) if p.match(file)][:1]
        code = path.read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(?:    )?(?:def |class )?{name}\b", code, re.MULTILINE), (
                f"{file} has no {name}"
            )


def all_files(folder):
    return (ROOT / folder).rglob("*.*")


def roots():
    return {path.name for path in ROOT.iterdir()}


# What `make notebooks` ends with


def test_a_new_notebook_is_tidy_after_it_and_keeps_what_it_says(tmp_path, monkeypatch):
    wild = new_notebook(
        cells=[new_markdown_cell("# What?"), new_code_cell("1"), new_code_cell("2")],
        metadata={
            "language_info": {"name": "python", "version": "3.12"},
            "kernelspec": {"name": "env", "display_name": "Mine"},
        },
    )
    wild.cells[1].update(outputs=[new_output("stream", text="1")], execution_count=1)
    wild.cells[1].metadata = {"scrolled": True, "tags": []}
    wild.cells[2].metadata = {"tags": ["live"], "trusted": True}
    nbformat.write(wild, tmp_path / "a.ipynb")
    tidy = script("tidy_notebooks")
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "a.ipynb")])
    tidy.main()
    after = nbformat.read(tmp_path / "a.ipynb", as_version=4)
    committed = nbformat.read(ROOT / "notebooks/01_quickstart.ipynb", as_version=4)
    assert after.metadata == committed.metadata
    assert [cell.id for cell in after.cells] == ["cell-00", "cell-01", "cell-02"]
    assert [cell.metadata for cell in after.cells] == [{}, {}, {"tags": ["live"]}]
    assert [cell.source for cell in after.cells] == ["# What?", "1", "2"]
    assert (after.cells[1].outputs, after.cells[1].execution_count) == (wild.cells[1].outputs, 1)


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=page_id)
def test_committed_notebooks_are_as_they_are_left(path):
    notebook = nbformat.read(path, as_version=4)
    script("tidy_notebooks").tidy(notebook)
    assert nbformat.writes(notebook) + "\n" == path.read_text(encoding="utf-8")


# The how-to's hours


@pytest.fixture(scope="module")
def hours():
    return script("hours")


def test_the_committed_hours_are_those_that_plan_prints_now(hours):
    text = hours.PAGE.read_text(encoding="utf-8")
    assert hours.with_blocks(text) == text, "run `make docs`"


def test_the_hours_of_the_table_are_those_of_the_command(hours, monkeypatch):
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, [*shlex.split(hours.PLAN)[1:], "--json"])
    found = {row["method"]: row for row in json.loads(done.stdout)["methods"]}
    (row,) = re.findall(r"2,500 examples \| 2,048 \|(.*)\|\n", hours.jobs())
    expected = [found[name]["hours_one_gpu"] for name in ("replay", "screened", "attribution")]
    assert [float(cell) for cell in row.split("|")] == pytest.approx(expected, rel=0.05)


def answers_of(hours):
    """The table of answers: a job's ways to write and answers."""
    rows = re.findall(
        r"^\| (.*) \| (\d+) \| (\d+) \| ([\d,]+) \|$", hours.answers(page(hours)), re.M
    )
    return {job: (int(ways), int(n.replace(",", ""))) for job, ways, _, n in rows}


def page(hours):
    return hours.PAGE.read_text(encoding="utf-8")


def option(hours, command, name):
    """What the page's command says behind an option."""
    (line,) = re.findall(rf"^workbench {command} .*$", page(hours).replace("\\\n", " "), re.M)
    return re.search(rf"{name} (\S+)", line)[1]


def test_the_answers_of_the_evaluation_are_those_that_its_bar_counts(hours):
    users = int(option(hours, "evaluate", "--users"))
    validating = int(option(hours, "evaluate", "--validation-users"))
    example = wb.Example("0", "u", "LaMP-4", "q", "t", ({"title": "a", "text": "b"},))
    asked = SimpleNamespace(validation=[example] * validating, test=[example] * users)
    settings = wb.GridSettings()
    sets = dict.fromkeys(settings.head_counts(1024), wb.HeadSet(()))
    grid = _Grid(settings, asked, ["LaMP-4"], {"LaMP-4": sets}, (32,) * 32, None, None)
    grid.retrieval = sets
    parts = [n for job, (_, n) in answers_of(hours).items() if job.startswith("`evaluate`")]
    assert sum(parts) == grid._count()


def test_the_answers_of_the_sweep_are_those_that_it_asks_for(hours, testbed_model, monkeypatch):
    asked = []

    class Counted:
        def __init__(self, model, examples, *_):
            self.examples = examples

        def texts(self, contrast):
            asked.append(contrast)
            return [""] * len(self.examples)

    monkeypatch.setattr("workbench.analysis.sweep.Answers", Counted)
    found_on = wb.load_examples("testbed", users=1)
    scores = wb.score_heads(testbed_model, found_on, method="attribution", progress=False)
    one = [e for e in wb.load_examples("testbed", "test", users=1) if e.task == found_on[0].task]
    counts = option(hours, "probe", "--sweep-k").split(",")
    wb.sweep_head_count(testbed_model, one, scores, [2**i for i in range(len(counts))], draws=5)
    ways, answers = answers_of(hours)["`probe`: the sweep, 5 K"]
    assert ways == len(asked) - 1  # the plain model is asked twice, and its answers are kept
    assert answers == ways * int(option(hours, "probe", "--eval-users"))


def test_a_page_without_the_markers_is_refused(hours):
    text = hours.PAGE.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="needs the markers <!-- jobs: begin -->"):
        hours.with_blocks(text.replace("<!-- jobs: begin -->", ""))


def test_the_configs_shape_is_llama_3_8b_as_its_model_card_says():
    shape = shape_of(read_config(ROOT / "docs/llama-3-8b"))
    assert shape.parameters == 8_030_261_248
    assert (shape.layers, sum(shape.heads), shape.context) == (32, 1024, 8192)
    assert shape.dtype == "bfloat16"
