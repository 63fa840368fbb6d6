"""The report of `workbench probe`, opened from disk and driven in a real browser."""

from __future__ import annotations

import io
import json
import re

import pandas as pd
import pytest
from labserver import PLOT, SCREENSHOTS, covered, screenshot
from test_cli import PROBE, run

from workbench.report import SECTIONS

pytestmark = pytest.mark.browser
NARROW = (520, 800)
READABLE = 4.5  # WCAG 2, level AA, of text that is not large


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of a small probe."""
    folder = tmp_path_factory.mktemp("probe")
    run("probe", *PROBE, "--max-new-tokens", "12", "--out", "run", cwd=folder)
    return folder / "run" / "report.html"


@pytest.fixture
def opened(report, open_page):
    """The report in a window; what it asks for is its own file and what that holds."""
    asked = []

    def open_one(width=1280, **options):
        page = open_page(viewport={"width": width, "height": 900}, **options)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        return page

    yield open_one
    foreign = [url for url in asked if not url.startswith(("data:", "blob:"))]
    assert {url.partition("#")[0] for url in foreign} == {report.as_uri()}


def go_to(page, key):
    """Click a tab."""
    page.locator(f'nav a[href="#{key}"]').click()
    page.locator(f"section#{key}").wait_for(state="visible")
    return page.locator(f"section#{key}")


def shown(page):
    return page.locator("section").evaluate_all(
        "parts => parts.filter(part => part.offsetParent !== null).map(part => part.id)"
    )


def test_every_tab_shows_its_section_and_no_other(opened, report):
    page = opened()
    assert page.locator("nav a").all_inner_texts() == list(SECTIONS.values())
    first = next(iter(SECTIONS))
    assert shown(page) == [first]
    for key, title in SECTIONS.items():
        section = go_to(page, key)
        assert shown(page) == [key]
        assert section.locator("h2").inner_text() == title
        assert page.locator("nav a[aria-current]").all_inner_texts() == [title]
    page.go_back()
    assert shown(page) == [list(SECTIONS)[-2]]
    page.goto(f"{report.as_uri()}#steering")
    assert shown(page) == ["steering"]
    page.goto(f"{report.as_uri()}#no-such-section")
    page.reload()
    assert shown(page) == [first]


def test_print_shows_all_sections(opened):
    page = opened()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert shown(page) == list(SECTIONS)
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert shown(page) == [next(iter(SECTIONS))]


def test_figures_of_every_tab_are_drawn(opened):
    page = opened()
    page.set_viewport_size({"width": 1280, "height": 1600})
    counts = {}
    for key in SECTIONS:
        figures = go_to(page, key).locator(PLOT).all()
        counts[key] = len(figures)
        for figure in figures:
            name = figure.get_attribute("id")
            area = covered(page, figure)
            assert area, name
            assert min(area) > 50, f"{name}: marks cover {area} pixels"
    assert sum(counts.values()) == page.locator(PLOT).count() >= 13
    assert counts["heads"] >= 3


def test_every_table_can_be_downloaded_and_read(opened, report):
    page = opened()
    page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    names = []
    for key in SECTIONS:
        for details in go_to(page, key).locator("details").all():
            title = details.locator("summary").inner_text()
            name, rows = re.fullmatch(r"(.+): (\d+) rows", title).groups()
            link = details.locator("a[download]")
            with page.expect_download() as waited:
                link.click()
            assert waited.value.suggested_filename == f"{name}.csv"
            text = waited.value.path().read_text(encoding="utf-8")
            table = pd.read_csv(io.StringIO(text))
            assert len(table) == int(rows) > 0
            assert list(table.columns) == details.locator("th").all_inner_texts()
            own = report.parent / "figures" / f"{name}.csv"
            if own.is_file():  # written beside the figures, on another way
                pd.testing.assert_frame_equal(table, pd.read_csv(own))
                names.append(name)
    assert "figure-3-user-heatmaps" in names


@pytest.mark.parametrize("width", NARROW)
def test_a_narrow_window_is_not_wider_than_it_is(width, opened):
    page = opened(width)
    for key in SECTIONS:
        section = go_to(page, key)
        screenshot(page, f"report-{width}-{key}", whole=True)
        section.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{key}: the page is {wide} pixels wide"


CONTRASTS = """() => {
    const canvas = document.createElement('canvas').getContext('2d');
    const parse = text => {  // any notation of a colour, as red, green, blue, alpha
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = text;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const luminance = colour => {
        const [r, g, b] = colour.slice(0, 3).map(c => c / 255)
            .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = element => {
        for (let one = element; one; one = one.parentElement) {
            const colour = parse(getComputedStyle(one).backgroundColor);
            if (colour[3] === 255) return colour;
        }
        return [255, 255, 255, 255];
    };
    const found = [];
    for (const element of document.querySelectorAll('body *')) {
        const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
        const inPicture = element.closest('svg, .light, script, style');
        if (!own || inPicture || element.offsetParent === null) continue;
        const [front, back] = [parse(getComputedStyle(element).color), behind(element)];
        const [low, high] = [luminance(front), luminance(back)].sort((a, b) => a - b);
        found.push([element.tagName, element.textContent.trim().slice(0, 40),
                    (high + 0.05) / (low + 0.05)]);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(scheme, opened):
    page = opened(color_scheme=scheme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", paper)[:3])) / 3
    assert light > 200 if scheme == "light" else light < 60
    kinds = set()
    for key in SECTIONS:
        section = go_to(page, key)
        screenshot(page, f"report-{scheme}-{key}", whole=True)
        section.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
        measured = page.evaluate(CONTRASTS)
        assert [one for one in measured if one[2] < READABLE] == []
        kinds |= {tag for tag, _, _ in measured}
    assert {"H1", "H2", "LI", "A", "TD", "TH", "SUMMARY", "P"} <= kinds


def depths(view):
    """How far from white each token of an attention view is."""
    tokens = view.locator(".colored-tokens > span > span")
    colours = tokens.evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)")
    return [765 - sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours]


def test_attention_colours_the_tokens_that_a_chosen_head_looks_at(opened, report):
    page = opened()
    views = go_to(page, "texts").locator(".light").all()
    tables = json.loads((report.parent / "attention.json").read_text())
    assert len(views) == len(tables) > 0
    for number, (view, table) in enumerate(zip(views, tables, strict=True)):
        for label, weights in zip(table["coords"]["head"]["data"], table["data"], strict=True):
            # Where the mouse rests on a token CircuitsVis names the head in a table as well.
            view.locator("div").get_by_text(label, exact=True).and_(view.locator("div")).click()
            drawn = depths(view)
            assert len(drawn) == len(weights)
            highest = weights.index(max(weights))
            assert drawn[highest] == max(drawn) > 100
            # A token that gets almost nothing is white, and what gets more is never paler.
            order = sorted(range(len(weights)), key=weights.__getitem__)
            assert [drawn[i] for i in order] == sorted(drawn)
        view.screenshot(path=SCREENSHOTS / f"report-attention-{number}.png")
