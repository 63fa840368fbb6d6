"""Profiles as vectors, each kind held against a plain computation."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from plain import plain_copy

import workbench as wb
from workbench.data.examples import Example
from workbench.errors import InputError
from workbench.steering.embeddings import (
    Encoder,
    Residual,
    Tfidf,
    load_embedder,
    make_embedder,
    profile_texts,
)

TEXTS = (
    "the dragon finds the wizard",
    "a dragon and a castle",
    "the boxer wins 5 : 1",
    "the dragon finds the wizard",
)


def example(user, task, items, query="asked ?", target="gold"):
    return Example(f"{user}-{query}", user, task, query, target, tuple(items))


def rating(text, score):
    return {"id": "not-a-field", "text": text, "score": score}


# Texts


def test_a_users_text_is_the_fields_of_the_first_items_and_nothing_else():
    items = [rating(f"item {n}", str(n)) for n in range(7)]
    texts = profile_texts([example("u", "LaMP-3", items), example("v", "LaMP-3", items[2:3])])
    assert texts == {
        "u": "item 0 0\nitem 1 1\nitem 2 2\nitem 3 3\nitem 4 4",
        "v": "item 2 2",
    }
    assert profile_texts([example("u", "LaMP-3", items)], items=1) == {"u": "item 0 0"}


def test_a_user_of_several_tasks_has_the_items_of_each_once():
    tag = {"description": "a dark tale", "tag": "war"}
    rows = [
        example("u", "LaMP-3", [rating("good", "4")], query="1"),
        example("u", "LaMP-2", [tag], query="2"),
        example("u", "LaMP-3", [rating("bad", "1")], query="3"),
    ]
    assert profile_texts(rows) == {"u": "good 4\na dark tale war"}


def test_a_user_without_profile_text_is_refused_by_name():
    with pytest.raises(InputError, match="user v has no profile text"):
        profile_texts([example("u", "LaMP-3", [rating("x", "1")]), example("v", "LaMP-3", [])])


# TF-IDF


def plain_tfidf(texts):
    """Cosines [text, text] of smoothed term weights, as scikit-learn's guide defines them."""
    counts = [Counter(text.replace(":", " ").split()) for text in texts]
    words = sorted(set().union(*counts))
    holding = {w: sum(w in c for c in counts) for w in words}
    idf = {w: math.log((1 + len(texts)) / (1 + holding[w])) + 1 for w in words}
    rows = np.array([[c[w] * idf[w] for w in words] for c in counts])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def test_distances_by_words_are_those_of_a_plain_computation():
    # Two texts are the same, so three directions hold all there is, and the SVD loses nothing.
    vectors = Tfidf.fit(TEXTS).embed(TEXTS)
    assert vectors.shape == (4, 3)
    np.testing.assert_allclose(vectors @ vectors.T, plain_tfidf(TEXTS), atol=1e-5)  # float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_a_rating_of_one_digit_is_a_word():
    fitted = Tfidf.fit(["lamp 5", "lamp 1", "kettle 5"])
    assert {"5", "1"} <= set(fitted.vocabulary)
    a, b = fitted.embed(["lamp 5", "lamp 1"])
    assert a @ b < 0.99


def test_a_text_is_embedded_alone_as_among_others_and_unknown_words_are_zero():
    fitted = Tfidf.fit(TEXTS)
    among = fitted.embed(["a dragon sleeps", "nothing known"])
    np.testing.assert_allclose(fitted.embed(["a dragon sleeps"])[0], among[0], atol=1e-6)
    np.testing.assert_allclose(fitted.embed(["a dragon"])[0], among[0], atol=1e-6)
    assert not among[1].any()


def test_equal_texts_are_one_point():
    vectors = Tfidf.fit(["a cat", "a cat", "a cat"]).embed(["a cat", "a cat"])
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert np.isfinite(vectors).all()


@pytest.mark.parametrize(
    ("texts", "message"),
    [((), "two users or more, got 0"), (("one",), "got 1"), (("?", "!"), "no word to learn from")],
)
def test_texts_that_teach_nothing_are_refused(texts, message):
    with pytest.raises(InputError, match=message):
        Tfidf.fit(texts)


# An encoder


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A random BERT of two blocks with a vocabulary of whole words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({w for t in TEXTS for w in t.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab={w: i for i, w in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@torch.inference_mode()
def plain_encoder(folder, text, most):
    from transformers import BertModel, BertTokenizerFast

    tokenizer = BertTokenizerFast.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    ids = ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]
    hidden = BertModel.from_pretrained(folder).eval()(torch.tensor([ids])).last_hidden_state
    mean = hidden[0].mean(dim=0)
    return (mean / mean.norm()).numpy()


@pytest.mark.parametrize("most", [256, 5])
def test_an_encoder_s_vector_is_the_mean_of_its_last_states_without_padding(encoder_folder, most):
    vectors = Encoder(str(encoder_folder), tokens=most, batch=2).embed(TEXTS)
    for text, vector in zip(TEXTS, vectors, strict=True):
        wanted = plain_encoder(encoder_folder, text, min(most, 32))
        np.testing.assert_allclose(vector, wanted, atol=1e-5)  # sums in another order


def test_a_missing_encoder_is_refused_with_what_to_do(tmp_path):
    nowhere = make_embedder(str(tmp_path / "nowhere"), TEXTS)
    with pytest.raises(InputError, match=r'no encoder at .*nowhere.*"tfidf" or "residual"'):
        nowhere.embed(TEXTS)


def test_pickled_weights_are_not_opened(encoder_folder, tmp_path):
    for path in encoder_folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n")
    with pytest.raises(InputError, match="no encoder at"):
        Encoder(str(tmp_path)).embed(TEXTS)


# The residual stream


@torch.inference_mode()
def test_the_residual_is_the_mean_behind_a_block_without_the_first_position(testbed_model):
    texts = [*profile_texts(wb.load_examples("testbed", "validation", users=3)).values(), "a"]
    twin, tokenizer = plain_copy(testbed_model), testbed_model.tokenizer
    for layer, given in ((1, None), (2, 2)):
        vectors = Residual(testbed_model, given, batch_tokens=300).embed(texts)
        for text, vector in zip(texts, vectors, strict=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[tokenizer.bos_token_id, *ids][:256]])
            mean = twin(ids, output_hidden_states=True).hidden_states[layer + 1][0, 1:].mean(dim=0)
            np.testing.assert_allclose(vector, mean / mean.norm(), atol=1e-4)  # another order


def test_a_long_text_is_cut_to_the_first_tokens(testbed_model):
    (lines,) = profile_texts(wb.load_examples("testbed", "validation", users=1)).values()
    text = " ".join(lines.split())  # a new line is a token too
    cut = Residual(testbed_model, tokens=9).embed([text, "the " + text])
    start = " ".join(text.split()[:8])  # behind the first token
    np.testing.assert_allclose(cut[0], Residual(testbed_model).embed([start])[0], atol=1e-5)
    assert np.abs(cut[1] - cut[0]).max() > 0.01


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_block_outside_the_model_is_refused(testbed_model, layer):
    with pytest.raises(InputError, match=f"between 0 and 3, got {layer}"):
        Residual(testbed_model, layer)


# By name, and back from a file


def test_every_kind_made_again_from_its_settings_gives_the_same_vectors(
    testbed_model, encoder_folder
):
    for kind in ("tfidf", "residual", str(encoder_folder)):
        made = make_embedder(kind, TEXTS, testbed_model)
        settings = json.loads(json.dumps(made.settings))
        again = load_embedder(settings, made.arrays, testbed_model)
        np.testing.assert_array_equal(made.embed(TEXTS), again.embed(TEXTS))


def test_the_residual_of_no_model_or_another_one_is_refused(testbed_model, tiny_model):
    with pytest.raises(InputError, match="residual stream of which model"):
        make_embedder("residual", TEXTS)
    settings = Residual(testbed_model).settings
    for model in (None, tiny_model("llama")):
        with pytest.raises(InputError, match="give model= it"):
            load_embedder(settings, {}, model)
    with pytest.raises(InputError, match="unknown embedder 'bow'"):
        load_embedder({"kind": "bow"}, {})


def test_what_a_user_was_asked_and_answered_is_not_in_the_vector():
    rows = wb.load_examples("testbed", "validation", users=2)
    other = [replace(row, query="something else :", target="hidden") for row in rows]
    assert profile_texts(rows) == profile_texts(other)
