"""Aspects of a target: the labels, the masked loss on every route, and what is made of both."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from plain import output_weights, plain_copy
from scipy.stats import spearmanr
from test_figures import make_scores
from torch.nn.functional import cross_entropy

from workbench import runs, tables
from workbench.analysis.agreement import highest
from workbench.analysis.aspects import aspect_scores, aspects, grouped, lines
from workbench.analysis.halves import set_gap
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
from workbench.heads import Head, HeadSet, top_k
from workbench.models import context_length
from workbench.scores import HeadScores
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


# Tables


def test_the_aspects_weighted_scores_add_up_to_the_whole(testbed_model, headlines):
    whole = score_heads(testbed_model, headlines, progress=False)
    parts = aspect_scores(testbed_model, headlines, progress=False)
    assert list(parts) == aspects_of(headlines)
    names = whole.data["example"].values.tolist()
    for place, name in enumerate(names):
        pcs, tokens = np.zeros((4, 8)), 0
        for part in parts.values():
            row = part.data.sel(example=name)
            pcs += row["pcs"].values * int(row["target_tokens"])
            tokens += int(row["target_tokens"])
        assert tokens == int(whole.data["target_tokens"][place])
        # Rounding of two exact runs; weights up to 1.
        np.testing.assert_allclose(pcs / tokens, whole.data["pcs"].values[place], atol=3e-5)
    joined = grouped(parts, {"all": list(parts)})["all"]
    np.testing.assert_allclose(joined.data["pcs"], whole.data["pcs"], atol=3e-5)
    np.testing.assert_allclose(joined.data["nll"], whole.data["nll"], atol=3e-5)
    assert joined.data["example"].values.tolist() == names
    assert joined.data["user"].equals(whole.data["user"])


def test_aspects_are_scored_where_they_are_and_kept_in_folders(testbed_model, tmp_path):
    examples = load_examples("testbed", "discovery", users=1)[::8]
    options = {"aspects": ["answer", "closing"], "folder": tmp_path, "progress": False}
    found = aspect_scores(testbed_model, examples, **options)
    assert {name: len(s.data["example"]) for name, s in found.items()} == {
        "answer": 2,
        "closing": 1,
    }
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/scores/*.parquet")}
    assert {path.parts[-3] for path in kept} == {"answer", "closing"}
    again = aspect_scores(testbed_model, examples, **options)
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    assert again["closing"].data.equals(found["closing"].data)
    with pytest.raises(InputError, match="aspect content; these have answer, opener"):
        aspect_scores(testbed_model, examples, ["content"], progress=False)


def made(means, users=24, noise=0.3, seed=0, **settings):
    """Scores of 2 layers of 10 heads: a mean a head, and noise by example, two a user."""
    rng = np.random.default_rng(seed)
    mean = np.asarray(means, dtype=float).reshape(2, 10)
    pcs = mean + rng.normal(0, noise, (2 * users, 2, 10))
    scores = make_scores(pcs, [f"u{i // 2}" for i in range(2 * users)])
    return HeadScores(scores.data, {"settings": settings})


STRONG = np.r_[np.ones(4), np.zeros(16)]
OTHERS = np.r_[np.zeros(10), np.ones(4), np.zeros(6)]


def test_different_heads_are_found_and_equal_ones_are_not_called_different():
    scores = {
        "a": made(STRONG),
        "same": made(3 * STRONG, noise=1.5, seed=1),  # five times the noise, three times the score
        "other": made(OTHERS, seed=2),
    }
    table = aspects(scores, k=4)
    assert float(table["gap_low"].sel(aspect="a", other="other")) > 0.5
    assert float(table["gap_p"].sel(aspect="a", other="other")) < 0.01
    assert float(table["gap_low"].sel(aspect="a", other="same")) <= 0
    assert float(table["shared"].sel(aspect="a", other="a")) == pytest.approx(1, abs=0.02)
    assert float(table["jaccard"].sel(aspect="a", other="other")) == 0
    told = lines(table)
    assert any(line.startswith("a and other") and "differ beyond noise" in line for line in told)
    assert any(line.startswith("a and same") and "not shown to differ" in line for line in told)


def test_the_gap_rarely_calls_equal_heads_different():
    rng = np.random.default_rng(5)
    means = rng.standard_exponential(20) ** 2 * 0.3
    wrong = sum(
        set_gap(made(means, 16, 0.7, seed=2 * i), made(2 * means, 16, 4.0, seed=2 * i + 1), 5).low
        > 0
        for i in range(40)
    )
    # 5 % of 40 is 2; more than 6 has a probability below 0.01 if the interval holds its level.
    assert wrong <= 6


def test_the_gap_is_measured_from_the_geometric_mean_of_the_two_kinds():
    found = set_gap(made(STRONG), made(STRONG, noise=3.0, seed=1), 4)
    chance = 4 / 20
    assert found.second < 0.8 < found.first
    within = np.sqrt((found.first - chance) * (found.second - chance))
    assert found.gap == pytest.approx(within - (found.across - chance))


def test_a_noisy_set_has_no_interval_and_few_users_have_none():
    noisy = set_gap(made(STRONG), made(np.zeros(20), seed=3), 4)
    assert np.isnan(noisy.low)
    assert set_gap(made(STRONG, users=3), made(OTHERS, users=3), 4).users == 3
    assert np.isnan(set_gap(made(STRONG, users=3), made(OTHERS, users=3), 4).low)
    alone = aspects({"a": made(STRONG, users=1), "b": made(OTHERS, users=1, seed=1)}, k=4)
    assert np.isnan(alone["low"].values).all()
    assert np.isnan(alone["gap"].values).all()
    assert any("no interval: a single user" in line for line in lines(alone))
    assert any("takes two users" in line for line in lines(alone))


def test_an_end_that_few_users_leave_open_is_said_to_be_open():
    table = aspects({"a": made(STRONG)}, k=4)
    best = np.unravel_index(np.nanargmax(table["pcs"].values[0]), table["pcs"].shape[1:])
    low = f"{float(table['low'].values[0][best]):+.2g}"
    table["high"][:] = np.nan
    assert f"(95 %: at least {low})." in lines(table)[0]
    table["low"][:] = np.nan
    assert "(no interval: too few users differ)." in lines(table)[0]
    few = lines(aspects({"a": made(STRONG, users=5)}, k=4))[0]
    assert few.endswith("no interval: too few users.")


def test_head_sets_of_halves_are_those_of_top_k():
    scores = made(np.linspace(0, 1, 20))
    mean = scores.data["pcs"].values.mean(axis=0)
    members = highest(mean.reshape(1, -1), 7)[0].reshape(mean.shape)
    assert HeadSet(tuple(Head(*map(int, at)) for at in np.argwhere(members))) == top_k(mean, 7)
    tied = np.tile([0.0, 1.0, 0.0, 1.0], 50)[None]
    assert np.flatnonzero(highest(tied, 3)[0]).tolist() == [1, 3, 5]


def test_the_table_is_kept_and_its_rank_correlation_is_scipys(tmp_path):
    scores = {"a": made(STRONG), "b": made(OTHERS, seed=2)}
    table = aspects(scores, k=4)
    tables.save(table, tmp_path / "aspects.json")
    back = tables.load(tmp_path / "aspects.json")
    xr.testing.assert_allclose(back, table)
    assert lines(back) == lines(table)
    means = [s.data["pcs"].values.mean(axis=0).ravel() for s in scores.values()]
    wanted = spearmanr(*means).statistic
    assert float(table["spearman"].sel(aspect="a", other="b")) == pytest.approx(wanted)
    assert table["heads"].values.tolist()[0] == str(top_k(means[0].reshape(2, 10), 4))


def test_many_pairs_are_summed_up_in_one_line():
    scores = {
        name: made(OTHERS if name == "e" else STRONG, seed=i) for i, name in enumerate("abcde")
    }
    told = lines(aspects(scores, k=4))
    assert len(told) == 6
    assert "of 10 pairs of aspects the top 4 of 4 differ beyond noise" in told[-1]


def test_style_and_topic_are_joined_and_other_aspects_stay_as_they_are():
    parts = ("opener", "answer", "closing", "topic", "frame")
    scores = {name: made(OTHERS if name == "topic" else STRONG) for name in parts}
    found = grouped(scores)
    assert list(found) == ["style", "topic", "answer", "frame"]
    assert found["answer"] is scores["answer"]
    assert found["style"].manifest["settings"]["prompt"]["aspect"] == "opener+closing"
    told = lines(aspects(found, k=4))
    assert told[4].startswith("style and topic: ")
    assert "differ beyond noise" in told[4]
    foreign = {"content": made(STRONG), "function": made(OTHERS)}
    assert grouped(foreign) == foreign


def test_scores_that_cannot_be_compared_are_refused():
    with pytest.raises(InputError, match="different weights"):
        aspects({"a": made(STRONG, weights="x"), "b": made(STRONG, weights="y")})
    with pytest.raises(InputError, match="no aspects"):
        aspects({})
    with pytest.raises(InputError, match="style: none of its aspects"):
        grouped({"content": made(STRONG)}, {"style": ["opener"]})
