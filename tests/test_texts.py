"""Texts as HTML: escaped, coloured by sign, with every number to read."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import xarray as xr

import workbench as wb
from workbench.figures.template import DIVERGING

BAD = "<script>alert(1)</script>&\"'"


class Page(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def changes(plain, ablated, steered, texts=None, counted=None):
    count = len(plain)
    return xr.Dataset(
        {
            name: ("token", np.array(v, dtype=float))
            for name, v in (
                ("plain", plain),
                ("ablated", ablated),
                ("steered", steered),
                ("kl", [0.1] * count),
            )
        },
        coords={
            "token": np.arange(count),
            "text": ("token", texts or ["a"] * count),
            "counted": ("token", counted or [True] * count),
        },
        attrs={"example": "t/1", "user": "u", "heads": "L0H1", "contrast": "DPS"},
    )


def red(color):
    channels = [int(found) for found in re.findall(r"\d+", color)]
    return channels[0] - channels[2]


def shades(html):
    styles = [attrs["style"] for tag, attrs in Page(html).tags if tag == "b"]
    return [re.search(r"background:([^;]+)", style)[1] for style in styles]


def test_tokens_that_need_the_heads_are_red_and_the_others_blue():
    table = changes([-1.0, -1.0, -1.0], [-3.0, -1.0, 0.0], [-1.0, -1.0, -1.0])
    html = wb.figures.token_change(table)
    first, none, last = map(red, shades(html))
    assert first > 50
    assert none == 0
    assert last < -50
    assert "+2.00" in html
    assert "-1.00" in html


def test_the_joint_pcs_is_over_the_tokens_that_count():
    table = changes([-1, -1], [-2, -9], [-1, -1], counted=[True, False])
    assert "removed together: +1.0000 nats per token" in wb.figures.token_change(table)


def test_the_steered_view_is_red_where_steering_helps():
    table = changes([-1.0, -1.0], [-1.0, -1.0], [-0.5, -1.5])
    helped, hurt = map(red, shades(wb.figures.token_change(table, "steered")))
    assert helped > 50 > -50 > hurt
    with pytest.raises(ValueError, match="view must be"):
        wb.figures.token_change(table, "plain")


def test_tiny_changes_stay_pale():
    table = changes([-1.0], [-1.001], [-1.0])
    assert abs(red(shades(wb.figures.token_change(table))[0])) < 10
    strong = shades(wb.figures.token_change(changes([-1.0], [-2.0], [-1.0])))[0]
    assert strong == "rgb" + str(tuple(int(DIVERGING[-1][i : i + 2], 16) for i in (1, 3, 5)))


def test_a_token_that_a_cut_rules_out_is_named_and_left_out_of_the_mean():
    table = changes([-1.0, -1.0, -1.0], [-2.0, -2.0, -2.0], [-0.5, -np.inf, -1.5])
    html = wb.figures.token_change(table, "steered")
    assert "+0.0000 nats per token (1 of 3 are ruled out by the cut and left out here)" in html
    assert "cut</small>" in html
    assert "up to ±0.5." in html
    helped, cut, hurt = map(red, shades(html))
    assert helped > 50 > -50 > hurt
    assert cut < -50
    assert "cut" not in wb.figures.token_change(table)
    gone = changes([-1.0], [-2.0], [-np.inf])
    assert "no token is left" in wb.figures.token_change(gone, "steered")


def test_tokens_that_do_not_count_are_pale_and_said_so():
    table = changes([-1, -1], [-2, -9], [-1, -1], counted=[True, False])
    html = wb.figures.token_change(table)
    assert "over the 1 of 2 tokens that count" in html
    rows = [attrs for tag, attrs in Page(html).tags if tag == "span"]
    assert [row.get("class") for row in rows] == [None, "wb-out"]


def test_every_panel_says_what_it_is_about():
    table = changes([-1.0], [-2.0], [-1.0])
    table.attrs["contrast"] = "DPS γ=0.5"
    assert "t/1: PCS of L0H1" in wb.figures.token_change(table)
    assert "t/1: DPS γ=0.5, heads L0H1" in wb.figures.token_change(table, "steered")


def pages():
    table = changes([-1.0], [-2.0], [-1.0], texts=[BAD])
    table.attrs |= {"heads": BAD, "contrast": BAD}
    yield wb.figures.token_change(table)
    yield wb.figures.token_change(table, "steered")
    rows = xr.Dataset(
        {name: ("candidate", [0.5]) for name in ("plain", "ablated", "steered")},
        coords={"candidate": [7], "text": ("candidate", [BAD]), "target": ("candidate", [False])},
        attrs={"before": BAD, "example": BAD, "contrast": BAD, "heads": BAD},
    )
    yield wb.figures.next_tokens(rows)
    yield wb.figures.side_by_side([("plain", BAD), ("steered", BAD)], [BAD], [0.5], BAD)
    example = wb.Example("1", BAD, "LaMP-4", BAD, BAD, ({"text": BAD, "title": BAD},))
    yield wb.figures.example_text(example, (0,))


@pytest.mark.parametrize("html", list(pages()))
def test_text_from_data_stays_text(html):
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "alert(1)" in page.text


def test_next_tokens_mark_what_the_user_wrote_or_say_that_it_is_not_there():
    rows = xr.Dataset(
        {name: ("candidate", [0.5, 0.25]) for name in ("plain", "ablated", "steered")},
        coords={
            "candidate": [7, 8],
            "text": ("candidate", [" x", " y"]),
            "target": ("candidate", [False, True]),
        },
        attrs={"before": "", "example": "t/1", "contrast": "DPS", "heads": "L0H1"},
    )
    text = Page(wb.figures.next_tokens(rows)).text
    assert "y ←" in text.replace("\xa0", "")
    assert "first token" in text
    rows["target"] = ("candidate", [False, False])
    rows.attrs["before"] = "some words"
    text = Page(wb.figures.next_tokens(rows)).text
    assert "none of them" in text
    assert "behind “some words”" in text


def test_different_words_are_marked_in_their_own_column():
    words = [("same", "the"), ("plain", "old"), ("steered", "new"), ("same", "sun")]
    html = wb.figures.side_by_side(words, [" the", " new", " sun"], [0.0, 1.5, 0.25])
    left, right = re.findall(r"<blockquote>(.*?)</blockquote>", html)
    assert left == "the <del>old</del> sun"
    assert right == "the <ins>new</ins> sun"
    assert "1.750 nats in all" in html
    assert "nats" not in wb.figures.side_by_side(words)


def test_an_empty_answer_is_named():
    assert "(nothing)" in wb.figures.side_by_side([("steered", "x")])


def test_items_that_the_prompt_leaves_out_are_told_apart():
    items = tuple({"text": f"item {i}"} for i in range(3))
    example = wb.Example("1", "u", "LaMP-4", "q", "t", items)
    page = Page(wb.figures.example_text(example, (2, 0), cut_tokens=1234))
    rows = [attrs.get("class") for tag, attrs in page.tags if tag == "li"]
    assert rows == [None, None, "wb-out"]
    assert page.text.index("item 2") < page.text.index("item 0") < page.text.index("item 1")
    assert "2 of 3 items are in the prompt" in page.text
    assert "cut 1,234 tokens" in page.text


def test_a_very_long_field_is_cut_and_says_so():
    example = wb.Example("1", "u", "LaMP-4", "word " * 5000, "t", ())
    html = wb.figures.example_text(example)
    assert len(html) < 10_000
    assert "…" in html
    assert "no profile" in html
