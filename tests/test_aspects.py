"""Aspects of a target: the labels, the masked loss on every route, and what is made of both."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from plain import output_weights, plain_copy
from torch.nn.functional import cross_entropy

from workbench import runs
from workbench.batches import collate, losses
from workbench.data.aspects import aspects_of, token_aspects, with_aspect, word_aspects
from workbench.data.examples import Example
from workbench.data.prompts import PromptSettings, build_prompts
from workbench.data.sources import load_examples
from workbench.discovery.attribution import attribute
from workbench.discovery.replay import Replay
from workbench.discovery.run import score_heads
from workbench.discovery.scorer import REFERENCE, Job, Scorer
from workbench.errors import InputError
from workbench.models import context_length
from workbench.steering.prompts import PromptCache

ACTOR_FIRST = "wow grim news , mayor commences bridge - amen"
OBJECT_FIRST = "wow grim news , bridge : mayor starts - amen"


@pytest.fixture(scope="module")
def headlines():
    return load_examples("testbed", "discovery", users=3, tasks=["testbed-headline"])[:7]


def built(model, examples, aspect=None):
    settings = PromptSettings(aspect=aspect)
    return build_prompts(examples, model.tokenizer, context_length(model), settings)


def labels(task, text):
    return [(text[a:b], label) for a, b, label in word_aspects(task, text)]


# Labels


@pytest.mark.parametrize(
    ("text", "middle"),
    [
        (ACTOR_FIRST, "order register topic"),
        (OBJECT_FIRST, "order frame topic register"),
    ],
)
def test_a_headline_is_labelled_by_its_grammar(text, middle):
    found = [label for _, label in labels("testbed-headline", text)]
    wanted = f"opener intensifier frame frame {middle} frame closing"
    assert found == wanted.split()


def test_every_headline_of_the_corpus_has_each_aspect_of_style_once(headlines):
    for example in headlines:
        found = [label for _, label in labels(example.task, example.target)]
        for aspect in ("opener", "intensifier", "order", "register", "closing", "topic"):
            assert found.count(aspect) == 1, example.target


def test_labels_and_ratings_are_one_aspect():
    assert labels("LaMP-2", "true story") == [("true", "answer"), ("story", "answer")]
    assert labels("testbed-rating", "5") == [("5", "answer")]


def test_other_texts_are_content_and_function_words():
    text = "Don't Panic: 5 tips for the well-known \N{GRINNING FACE} of Israel's #one"
    content = ["Panic", "5", "tips", "well-known", "\N{GRINNING FACE}", "Israel's", "#one"]
    found = labels("LaMP-4", text)
    assert [word for word, label in found if label == "content"] == content
    assert [w for w, label in found if label == "function"] == ["Don't", ":", "for", "the", "of"]


class Pieces:
    """A slow tokenizer of given pieces, a space before a word belonging to it."""

    is_fast = False

    def __init__(self, *pieces):
        self.pieces = pieces

    def decode(self, ids, **_):
        return "".join(self.pieces[i] for i in ids)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "slow"])
def test_all_pieces_of_a_word_share_its_aspect(kind):
    example = Example("1", "u", "LaMP-4", "q", "the unbelievable mayor of", ({"title": "t"},))
    if kind == "slow":
        pieces = ["the", " un", "believ", "able", " ma", "yor", " of"]
        tokenizer, ids = Pieces(*pieces), list(range(len(pieces)))
    else:
        tokenizer, pieces, ids = trained(kind, example.target)
    text, at, wanted = example.target, 0, []
    for piece in pieces:  # the label of the first letter of a piece that is no space
        at += len(piece) - len(piece.lstrip())
        word = text[: text.find(" ", at) if " " in text[at:] else None].split()[-1]
        wanted.append("function" if word in ("the", "of") else "content")
        at += len(piece.lstrip())
    assert token_aspects(example, tokenizer, ids) == wanted


def trained(kind, text):
    """A small tokenizer whose pieces of the text are shorter than its words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    if kind == "byte_level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "byte_level" else [*set(text), "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 12, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text, "the of mayor"], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    found = wrapped(text, add_special_tokens=False)
    pieces = [
        t.replace("Ġ", " ").replace("▁", " ")
        for t in wrapped.convert_ids_to_tokens(found["input_ids"])
    ]
    pieces[0] = pieces[0].lstrip()
    assert "".join(pieces) == text
    assert len(pieces) > 4
    return wrapped, pieces, found["input_ids"]


def test_a_token_over_several_words_is_of_the_one_it_holds_most_of():
    example = Example("1", "u", "LaMP-4", "q", "of the mayor", ({"title": "t"},))
    assert token_aspects(example, Pieces("of the mayo", "r"), [0, 1]) == ["content"] * 2
    assert token_aspects(example, Pieces("of the m", "ayor"), [0, 1]) == ["function", "content"]


def test_examples_without_the_aspect_are_left_out_or_refused(testbed_model):
    examples = load_examples("testbed", "discovery", users=1)
    tokenizer = testbed_model.tokenizer
    kept = with_aspect(examples, tokenizer, "answer")
    assert kept == [e for e in examples if e.task != "testbed-headline"]
    missing = next(e for e in examples if e.task == "testbed-headline")
    with pytest.raises(InputError, match=f"{missing.name}.*'answer'.*opener"):
        built(testbed_model, [*kept, missing], "answer")
    assert aspects_of([missing])[:2] == ["opener", "intensifier"]
    assert aspects_of(kept) == ["answer"]


def test_an_unknown_aspect_is_refused():
    with pytest.raises(InputError, match="unknown aspect 'tone'; known are opener"):
        PromptSettings(aspect="tone")


# The masked loss


def test_the_masked_loss_is_the_mean_over_the_aspects_tokens(testbed_model, headlines):
    twin = plain_copy(testbed_model)
    # One token that counts, several apart, and rows of different lengths in one batch.
    for aspect in ("opener", "frame", "topic"):
        found = losses(testbed_model, built(testbed_model, headlines, aspect))
        for example, value in zip(headlines, found.tolist(), strict=True):
            (prompt,) = built(testbed_model, [example])
            wanted = masked_nll(twin, prompt, example, aspect)
            assert value == pytest.approx(wanted, abs=2e-5)  # float32, sums in another order


def masked_nll(twin, prompt, example, aspect):
    """One prompt, no padding, PyTorch's own cross entropy, and words picked by hand."""
    ids = torch.tensor([[*prompt.ids, *prompt.target_ids]])
    start = len(prompt.ids)
    with torch.inference_mode():
        each = cross_entropy(twin(ids).logits[0, start - 1 : -1], ids[0, start:], reduction="none")
    assert len(each) == len(example.target.split())  # the testbed has a token a word
    found = [label for _, label in labels(example.task, example.target)]
    return each[[label == aspect for label in found]].mean().item()


def test_replay_and_the_reference_give_the_same_masked_scores(testbed_model, headlines):
    prompts = built(testbed_model, headlines, "frame")
    exact, nll = Scorer(testbed_model, Job("exact", "replay", 4096)).scores(prompts)
    slow, slow_nll = Scorer(testbed_model, Job("exact", REFERENCE, 4096)).scores(prompts)
    torch.testing.assert_close(exact, slow, atol=3e-5, rtol=0)  # as `check.ROUNDING`
    torch.testing.assert_close(nll, slow_nll, atol=3e-5, rtol=0)
    whole, _ = Scorer(testbed_model, Job("exact", "replay", 4096)).scores(
        built(testbed_model, headlines)
    )
    assert (exact - whole).abs().max() > 0.01


def test_attribution_is_the_derivative_of_the_masked_loss(testbed_model, headlines):
    prompts = built(testbed_model, headlines[:2], "register")
    engine = Replay(testbed_model)
    found, _ = attribute(engine, engine.rows(prompts))
    # A head's output scaled by its rows of W_O, up and down a little: an independent route.
    for layer, head in ((1, 3), (3, 5)):
        step = 1e-2
        moved = []
        for factor in (1 + step, 1 - step):
            twin = plain_copy(testbed_model)
            output_weights(twin, layer).unflatten(0, (8, -1))[head] *= factor
            moved.append([masked_nll(twin, p, p.example, "register") for p in prompts])
        slope = (np.array(moved[0]) - np.array(moved[1])) / (2 * step)
        # A central difference of float32 losses: rounding over the step.
        np.testing.assert_allclose(found[:, layer, head], -slope, atol=2e-4)


def test_the_mask_is_kept_in_padded_rows_and_in_packed_prompts(testbed_model, headlines):
    examples = [headlines[0], replace(headlines[1], profile=())]
    prompts = built(testbed_model, examples, "closing")
    batch = collate(prompts, 0, "cpu")
    assert batch.target_mask.sum(dim=1).tolist() == [1, 1]
    assert batch.tokens[batch.target_mask].tolist() == [p.target_ids[-1] for p in prompts]
    assert batch.longest_target == 1
    cache = PromptCache(testbed_model)
    settings = PromptSettings(aspect="closing")
    assert cache.build(examples, settings, 0) == prompts
    # Decoding scores nothing, and examples that lack the aspect are answered, too.
    assert cache.build(examples, PromptSettings(aspect="answer"), 4)[0].counted is None


# Runs


def test_a_run_kept_without_the_setting_goes_on_and_another_aspect_is_refused(
    testbed_model, headlines, tmp_path
):
    first = score_heads(testbed_model, headlines[:2], folder=tmp_path, progress=False)
    manifest = runs.read_manifest(tmp_path)
    assert manifest["settings"]["prompt"].pop("aspect") is None  # as an older version wrote it
    runs.write_manifest(tmp_path, manifest)
    again = score_heads(testbed_model, headlines[:2], folder=tmp_path, progress=False)
    assert again.data.equals(first.data)
    with pytest.raises(InputError, match="prompt"):
        score_heads(
            testbed_model,
            headlines[:2],
            prompt=PromptSettings(aspect="opener"),
            folder=tmp_path,
            progress=False,
        )


def test_the_digest_of_a_run_tells_masks_apart(testbed_model, headlines):
    digests = {
        score_heads(
            testbed_model, headlines[:1], prompt=PromptSettings(aspect=aspect), progress=False
        ).manifest["settings"]["data_sha256"]
        for aspect in (None, "opener", "closing")
    }
    assert len(digests) == 3
