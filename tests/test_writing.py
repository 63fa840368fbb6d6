"""Plain and steered text side by side."""

import pytest

import workbench as wb
from workbench.steering.loop import Generation
from workbench.steering.writing import Pair, write_steps

HEADS = wb.HeadSet.parse("L0H7, L0H5, L3H0")


@pytest.fixture(scope="module")
def example():
    return next(e for e in wb.load_examples("testbed", users=4) if e.task == "testbed-headline")


def test_both_texts_are_those_that_generate_writes(testbed_model, example):
    contrast = wb.DPS(HEADS, 3.0)
    pair = wb.write(testbed_model, example, contrast, max_new_tokens=12)
    plain = wb.generate(testbed_model, example, max_new_tokens=12)
    steered = wb.generate(testbed_model, example, contrast, max_new_tokens=12)
    assert (pair.plain.tokens, pair.plain.text) == (plain.tokens, plain.text)
    assert (pair.steered.tokens, pair.steered.text) == (steered.tokens, steered.text)
    # A batch of two and one row add in another order.
    assert pair.steered.kl == pytest.approx(steered.kl, abs=1e-4)
    assert pair.kl == pytest.approx(sum(steered.kl), abs=1e-3)
    assert "".join(pair.pieces).strip() == steered.text


def test_sampled_texts_draw_from_the_same_numbers(testbed_model, example):
    sampling = wb.Sampling(temperature=1.0, seed=3)
    nothing = wb.DPS(HEADS, 0.0)
    pair = wb.write(testbed_model, example, nothing, sampling=sampling, max_new_tokens=8)
    assert pair.plain.tokens == pair.steered.tokens


def test_steps_may_be_given_up_and_the_model_used_in_between(testbed_model, example):
    plain = wb.generate(testbed_model, example, max_new_tokens=6)
    steps = write_steps(testbed_model, example, wb.DPS(HEADS, 3.0), max_new_tokens=6)
    first = next(steps)
    assert first.steps == 1
    assert wb.generate(testbed_model, example, max_new_tokens=6) == plain
    second = next(steps)
    assert second.plain.tokens[:1] == first.plain.tokens[:1]
    steps.close()
    assert wb.generate(testbed_model, example, max_new_tokens=6) == plain


def texts(plain, steered):
    example = wb.Example("1", "u", "t", "", "", ())
    made = [Generation(example, text, (), True) for text in (plain, steered)]
    return Pair(*made, (), wb.CAD(1.0), 8)


@pytest.mark.parametrize(
    ("plain", "steered", "words"),
    [
        ("a b c", "a x c", [("same", "a"), ("plain", "b"), ("steered", "x"), ("same", "c")]),
        ("a", "a", [("same", "a")]),
        ("", "a b", [("steered", "a"), ("steered", "b")]),
        ("a b", "", [("plain", "a"), ("plain", "b")]),
    ],
)
def test_words_are_told_apart(plain, steered, words):
    assert texts(plain, steered).words == words


def test_every_word_of_both_texts_is_there_in_order():
    left, right = "the old man and the sea and the sun", "an old man at the sea in the sun"
    words = texts(left, right).words
    assert [w for of, w in words if of != "steered"] == left.split()
    assert [w for of, w in words if of != "plain"] == right.split()


def test_bad_requests_are_named_when_the_first_step_is_asked_for(testbed_model, example):
    steps = write_steps(testbed_model, example, wb.DPS(wb.HeadSet.parse("L9H0")))
    with pytest.raises(wb.InputError, match="L9H0 is not a head"):
        next(steps)
    with pytest.raises(wb.InputError, match="max_new_tokens must be >= 1"):
        wb.write(testbed_model, example, wb.CAD(1.0), max_new_tokens=0)
