"""The explorer in a real browser: what a click, a slider and a button do, and how fast."""

from __future__ import annotations

import re
import statistics
import time

import pytest
from labserver import errors, open_notebook, run_all, screenshot, write_notebook

pytestmark = pytest.mark.browser

START = """\
import numpy as np
import workbench as wb
model = wb.load_model()
examples = [e for e in wb.load_examples("testbed", users=6) if e.task == "testbed-headline"]
own = wb.score_heads(model, examples, progress=False)
others = wb.counterfactual_scores(model, examples, ("stranger",), progress=False)
explorer = wb.explore(model, examples, {"own": own, **others})
explorer"""
# A model of 32 x 32 heads with scores of 200 users, made up; it is the drawing that is looked at.
LARGE = """\
from dataclasses import replace
import numpy as np
import workbench as wb
import xarray as xr
large = wb.load_model("./large")
one = wb.Example("0", "u", "LaMP-4", "article : a", "the lamp", ({"text": "b", "title": "c"},))
many = [replace(one, id=f"{i}", user=f"user {i % 200}") for i in range(600)]
rng = np.random.default_rng(0)
data = xr.Dataset(
    {
        "nll": ("example", rng.random(600)),
        "target_tokens": ("example", np.ones(600, dtype=int)),
        "pcs": (("example", "layer", "head"), rng.normal(0, 0.1, (600, 32, 32))),
    },
    coords={
        "example": [e.name for e in many],
        "user": ("example", [e.user for e in many]),
        "task": ("example", ["LaMP-4"] * 600),
        "layer": np.arange(32),
        "head": np.arange(32),
    },
)
wb.explore(large, many, wb.HeadScores(data, {}))"""
MAP = ".workbench-explorer .js-plotly-plot .nsewdrag"
# The heads that the panel of the target's tokens is about.
SHOWN = """() => {
  const panel = document.querySelector(".workbench-explorer [data-heads]");
  return panel === null ? null : panel.dataset.heads;
}"""
HAS = f"heads => ({SHOWN})() === heads"


@pytest.fixture(scope="module")
def explored(lab, chromium):
    """A page with an explorer of the testbed; all tests of this file go on with it."""
    from labserver import Watch

    write_notebook(lab.folder / "explorer.ipynb", [START])
    context = chromium.new_context(viewport={"width": 1400, "height": 1500})
    watch = Watch(context)
    page = context.new_page()
    open_notebook(page, lab, "explorer")
    page.locator(".jp-Cell").first.click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector(".workbench-explorer [data-heads]", timeout=120_000)
    page.wait_for_selector(MAP)
    page.locator(".workbench-explorer").scroll_into_view_if_needed()
    yield page
    assert errors(page) == []
    watch.check()
    context.close()


def click(page, layer, head, layers=4, heads=8):
    """Click a head on the map, as a hand does that rests before it presses."""
    box = page.locator(MAP).first.bounding_box()
    x = box["x"] + box["width"] * (head + 0.5) / heads
    y = box["y"] + box["height"] * (layers - layer - 0.5) / layers
    page.mouse.move(x, y)
    page.wait_for_timeout(120)
    begun = time.perf_counter()
    page.mouse.down()
    page.mouse.up()
    return begun


def shown(page, heads, timeout=15_000):
    page.wait_for_function(HAS, arg=heads, timeout=timeout, polling=5)


def preset(page, name):
    # A button with a picture has the picture's letter in its name.
    found = page.locator(".workbench-explorer button", has_text=re.compile(f"^\\W*{name}$"))
    found.click()


def test_a_click_takes_a_head_in_and_another_out(explored):
    preset(explored, "none")
    shown(explored, "no heads")
    click(explored, 0, 7)
    shown(explored, "L0H7")
    click(explored, 2, 6)
    shown(explored, "L0H7, L2H6")
    click(explored, 0, 7)
    shown(explored, "L2H6")
    # Without moving the hand, as somebody does who changes their mind.
    explored.mouse.down()
    explored.mouse.up()
    shown(explored, "L2H6, L0H7")
    screenshot(explored, "explorer-clicked")


def test_twenty_clicks_are_answered_and_their_times_are_listed(explored, listing):
    preset(explored, "none")
    shown(explored, "no heads")
    taken, heads = [], []
    for i in range(20):
        head = f"L{i % 4}H{i // 4}"
        heads.append(head)
        begun = click(explored, i % 4, i // 4)
        shown(explored, ", ".join(heads))
        taken.append(time.perf_counter() - begun)
    listing(
        "the explorer's clicks",
        f"median of 20: {statistics.median(taken):.3f} s (asked .5), slowest {max(taken):.3f} s",
    )


def test_the_text_field_sets_the_heads_and_says_what_is_wrong(explored):
    field = explored.get_by_label("heads", exact=True)
    field.fill("L1H1, L3H0")
    field.press("Enter")
    shown(explored, "L1H1, L3H0")
    field.fill("L9H9")
    field.press("Enter")
    explored.wait_for_function(
        "() => document.querySelector('.workbench-explorer [role=status]')"
        "?.innerText.includes('L9H9 is not a head of this model')"
    )
    assert field.input_value() == "L1H1, L3H0"


def test_sliders_move_the_steered_column(explored):
    def steered():
        return explored.locator(".workbench-explorer tbody tr:first-child td").nth(3).inner_text()

    preset(explored, "top K")
    explored.wait_for_function(f"() => ({SHOWN})().split(', ').length === 8")
    before = steered()
    readout = explored.locator(".widget-hslider", has_text="γ").locator(".widget-readout")
    readout.click()
    explored.keyboard.press("Control+a")
    explored.keyboard.type("2.5")
    explored.keyboard.press("Enter")
    explored.wait_for_function(
        "before => document.querySelectorAll("
        "'.workbench-explorer tbody tr:first-child td')[3].innerText !== before",
        arg=before,
    )
    readout = explored.locator(".widget-hslider", has_text=re.compile(r"^K")).locator(
        ".widget-readout"
    )
    readout.click()
    explored.keyboard.press("Control+a")
    explored.keyboard.type("3")
    explored.keyboard.press("Enter")
    explored.wait_for_function(f"() => ({SHOWN})().split(', ').length === 3")


def test_writing_puts_both_texts_side_by_side_with_what_each_step_cost(explored):
    preset(explored, "write")
    explored.wait_for_selector(".wb-pair ins, .wb-pair blockquote", timeout=20_000)
    explored.wait_for_function(
        "() => document.querySelector('.workbench-explorer [role=status]')"
        "?.innerText.startsWith('writing: done')"
    )
    assert "nats in all" in explored.locator(".workbench-explorer").inner_text()
    screenshot(explored, "explorer-written")


def test_attention_of_the_chosen_head_is_drawn(explored):
    tokens = explored.locator(
        ".workbench-explorer div[id^=wb-attention] span, "
        ".workbench-explorer div[id^=wb-attention] div"
    )
    explored.wait_for_function(
        "() => (document.querySelector('div[id^=wb-attention]')?.innerText ?? '').length > 40"
    )
    assert tokens.count() > 20


def test_the_map_shows_the_specific_part(explored):
    explored.get_by_label("showing").select_option("own - stranger")
    explored.wait_for_function(
        "() => document.querySelector('.workbench-explorer .wb-title')"
        ".innerText.includes('own - stranger')"
    )
    screenshot(explored, "explorer-specific")
    explored.get_by_label("showing").select_option("PCS")


def test_in_a_window_of_800_pixels_nothing_but_the_map_scrolls_sideways(explored):
    explored.set_viewport_size({"width": 800, "height": 1500})
    explored.wait_for_timeout(800)
    # Beside the open file browser there is less room than the map needs: it scrolls by itself.
    whole, around, box = explored.evaluate(
        "() => ['.workbench-explorer', '.workbench-explorer .jupyter-widgets:has(> "
        ".plotly-graph-div, > .js-plotly-plot, .js-plotly-plot)', '.jp-OutputArea-output:has("
        ".workbench-explorer)'].map(one => document.querySelector(one))"
        ".map(e => [e.scrollWidth, e.clientWidth])"
    )
    assert whole[0] <= whole[1] + 1
    assert around[1] <= whole[1]
    assert box[0] <= box[1] + 1
    screenshot(explored, "explorer-800")
    explored.set_viewport_size({"width": 1400, "height": 1500})


def test_a_map_of_a_thousand_heads_and_200_users_is_drawn(lab, page, listing):
    from architectures import write_model

    write_model("large", lab.folder / "large")
    write_notebook(lab.folder / "large.ipynb", [LARGE])
    open_notebook(page, lab, "large")
    run_all(page)
    page.wait_for_selector(MAP, timeout=60_000)
    page.wait_for_function(f"() => ({SHOWN})() !== null", timeout=60_000)
    page.locator(".workbench-explorer").scroll_into_view_if_needed()
    begun = time.perf_counter()
    page.get_by_label("map of").select_option("everyone")
    page.wait_for_function(
        "() => document.querySelector('.workbench-explorer .wb-text').innerText"
        ".includes('600 examples of 200 users')",
        polling=5,
    )
    drawn = time.perf_counter() - begun
    page.wait_for_timeout(800)  # while a thousand cells are drawn a click finds no head
    begun = click(page, 31, 0, 32, 32)
    shown(page, "L31H0")
    clicked = time.perf_counter() - begun
    told = f"32 x 32 heads, 200 users: the map in {drawn:.2f} s, a click in {clicked:.2f} s"
    listing("the explorer's clicks", told)
    screenshot(page, "explorer-32x32")
