"""What an answer is taken to say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from workbench.data.examples import Example
from workbench.data.tasks import TASKS
from workbench.errors import InputError
from workbench.evaluation.metrics import get_metric
from workbench.evaluation.reading import READINGS, read, readable


@pytest.mark.parametrize("text", ["[1]", " [1]\n", "The answer is [1].", "", "western"])
def test_a_strict_reading_is_the_text_without_spaces_at_its_ends(text):
    assert read("LaMP-1", text, "strict") == text.strip()


@pytest.mark.parametrize(
    ("task", "text", "label"),
    [
        ("LaMP-1", "The answer is [1].", "[1]"),
        ("LaMP-1", "see[2], not [1]", "[2]"),
        ("LaMP-2", "Dark comedy, I think", "dark comedy"),
        ("LaMP-2", "comedy, and a dark comedy at that", "comedy"),
        ("LaMP-2", "It is BASED ON\n a book!", "based on a book"),
        ("LaMP-2", "classical action", "action"),
        ("LaMP-2", "thought-provoking", "thought-provoking"),
        ("testbed-tag", "a warrior at war", "war"),
    ],
)
def test_a_lenient_reading_is_the_first_label_found(task, text, label):
    assert read(task, text, "lenient") == label


def test_of_two_labels_at_one_place_the_longer_is_meant(monkeypatch):
    labels = ("dark", "dark comedy", "dark comedy film")
    task = "a task whose labels begin alike"
    monkeypatch.setitem(TASKS, task, replace(TASKS["LaMP-2"], labels=labels))
    assert read(task, "a dark comedy, not just dark", "lenient") == "dark comedy"
    assert read(task, "dark, no comedy", "lenient") == "dark"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        *[("4", "4"), ("4.0", "4"), ("4.00 stars", "4"), ("4.", "4"), ("**4**", "4")],
        *[("4/5", "4"), ("4.0 / 5", "4"), ("4 out of 5", "4"), ("a rating of 4", "4")],
        *[("5-star", "5"), ("2-3", "2"), ("3.5, so rather 4", "4"), ("score:2", "2")],
    ],
)
def test_a_rating_is_read_where_it_stands_alone(text, label):
    assert read("LaMP-3", text, "lenient") == label


@pytest.mark.parametrize(
    "text",
    [
        *[
            "4.5",
            "4.05",
            "4,5",
            "1,4",
            "14",
            "41",
            "-4",
            "−4",
            "4th",
            "4.0x",
            "x4",
            "four",
            "0",
            "6",
        ],
        *["4.5/5", "4.5 / 5", "4.5 out of 5", "10/5", " no rating "],
    ],
)
def test_a_number_that_is_no_rating_is_left_as_it_is(text):
    assert read("LaMP-3", text, "lenient") == text


@pytest.mark.parametrize("text", ["1", "[3]", "[1", "", " neither "])
def test_a_text_without_a_label_is_left_as_it_is(text):
    assert read("LaMP-1", text, "lenient") == text


@pytest.mark.parametrize("how", READINGS)
def test_generated_texts_are_left_as_they_are(how):
    assert read("LaMP-4", " [1] 4 comedy \n", how) == " [1] 4 comedy \n"


@pytest.mark.parametrize("how", READINGS)
def test_every_label_of_every_task_is_read_as_itself(how):
    labels = [(task, label) for task, spec in TASKS.items() for label in spec.labels]
    assert len(labels) > 30
    for task, label in labels:
        assert read(task, label, how) == label
        said = f"It is {label.upper()}, of course."
        assert read(task, said, how) == (label if how == "lenient" else said)


def test_the_reading_decides_the_score():
    asked = Example("1", "u", "LaMP-1", "query", "[1]", ({"text": "t"},))
    scores = {
        how: get_metric("accuracy").score(asked, read("LaMP-1", "It is [1].", how))
        for how in READINGS
    }
    assert scores == {"strict": 0.0, "lenient": 1.0}


def test_only_a_label_is_a_readable_answer_to_a_label_task():
    asked = Example("1", "u", "LaMP-1", "query", "[1]", ({"text": "t"},))
    assert readable(asked, " [2] ")
    assert not readable(asked, "It is [2].")
    assert readable(Example("1", "u", "LaMP-4", "query", "x", ({"text": "t"},)), "anything")


def test_an_unknown_reading_is_refused():
    with pytest.raises(InputError, match="unknown reading 'loose'; known are strict, lenient"):
        read("LaMP-1", "[1]", "loose")
