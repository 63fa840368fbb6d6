"""Retrieval heads: copy scores against a head built to copy and transformers' own attention."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import typer
from architectures import ARCHITECTURES
from plain import plain_copy
from typer.testing import CliRunner

from workbench.cli import retrieval
from workbench.discovery import patterns
from workbench.discovery.copying import (
    CopyProbe,
    copied,
    copy_scores,
    random_probes,
    retrieval_heads,
    text_probes,
)
from workbench.errors import InputError
from workbench.heads import Head, HeadSet, read_head_scores
from workbench.models import heads_per_layer, load_model

WORDS, ORDINARY, PLACES = 40, 36, 64


def write_copier(folder):
    """GPT-2 of two layers by hand, without MLPs: L1H1 looks behind the last same token, as L0H0,
    which looks one position back, tells each position what stood before it. L0H1 and L1H0 are 0.

    The residual stream holds, one-hot: the position, the token, the token before.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<bos>", *(f"w{i}" for i in range(1, ORDINARY + 1)), "<0x41>", "--", "END"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<bos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="END"
    ).save_pretrained(folder)
    width = PLACES + 2 * WORDS
    size = width // 2  # of a head
    config = GPT2Config(
        vocab_size=WORDS, n_positions=PLACES, n_embd=width, n_layer=2, n_head=2, bos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    place, token, before = np.split(np.arange(width), [PLACES, PLACES + WORDS])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
        model.transformer.wpe.weight[:, place] = torch.eye(PLACES)
        model.transformer.wte.weight[:, token] = torch.eye(WORDS)
        first, second = (block.attn.c_attn.weight for block in model.transformer.h)
        first[place[1:], np.arange(PLACES - 1)] = 50  # query of L0H0: the position before
        first[place, width + np.arange(PLACES)] = 50  # its key
        first[token, 2 * width + np.arange(WORDS)] = 1  # its value
        out = model.transformer.h[0].attn.c_proj.weight
        out[np.arange(WORDS), before] = 0.1  # the norm has made a 1 about 10
        second[token, size + np.arange(WORDS)] = 50  # query of L1H1: this token
        second[before, width + size + np.arange(WORDS)] = 50  # its key: the token before
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def copier(one_thread, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copier")
    write_copier(folder)
    return load_model(folder, device="cpu")


def small_probes(seed=0, sizes=((40, 8), (33, 5), (40, 8), (40, 8))):
    """Long needles of few different tokens, on which heads that look anywhere often copy."""
    rng = np.random.default_rng(seed)
    return [
        CopyProbe(tuple(rng.integers(3, 7, length).tolist()), 2, length - steps - 4, steps)
        for length, steps in sizes
    ]


# Scores


def test_head_built_to_copy_scores_one_and_the_others_none(copier):
    probes = random_probes(copier, 12, lengths=[PLACES, 40])
    scores = copy_scores(copier, probes, progress=False)
    expected = np.zeros((12, 2, 2))
    expected[:, 1, 1] = 1
    np.testing.assert_array_equal(scores.values, expected)
    found = retrieval_heads(scores, 1)
    assert found.heads == found.above_chance == HeadSet((Head(1, 1),))
    assert found.above_threshold == 1
    assert found.note.startswith("1 of 4 heads copy more than chance (0.02")
    assert "3 of the 4 taken are not above it" in retrieval_heads(scores, 4).note


@pytest.mark.parametrize(("cue", "share"), [(None, 1.0), ("w30 w31", 3 / 4)])
def test_head_built_to_copy_copies_text_too(copier, cue, share):
    # After a question of other words nothing tells the head where the needle begins.
    needles = ["w1 w2 w3 w4", "w5 w6 w7 w8", "w9 w10 w11 w12"]
    probes = text_probes(copier, "w20 w21 w22 w23 w24", needles, cue=cue, lengths=[50])
    scores = copy_scores(copier, probes, progress=False)
    np.testing.assert_array_equal(scores.values[:, 1, 1], [share] * 3)
    texts = [copier.tokenizer.decode(probe.ids) for probe in probes]
    for text, needle in zip(texts, needles, strict=True):
        assert text.count(needle) == 2
        assert text.endswith(f"{cue} {needle}" if cue else needle)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_copy_scores_equal_a_plain_loop_over_transformers_attention(tiny_model, kind):
    model = tiny_model(kind)
    probes, shape = small_probes(), heads_per_layer(model)
    scores = copy_scores(model, probes, batch_tokens=90, progress=False)
    expected = np.full(scores.shape, np.nan)
    twin = plain_copy(model, attn_implementation="eager")
    layers = [layer for layer, heads in enumerate(shape) if heads]
    for row, probe in enumerate(probes):
        with torch.no_grad():
            patterns = twin(torch.tensor([probe.ids[:-1]]), output_attentions=True).attentions
        patterns = [pattern for pattern in patterns if pattern is not None]
        for layer, pattern in zip(layers, patterns, strict=True):
            for head in range(shape[layer]):
                hits = 0
                for target in range(len(probe.ids) - probe.steps, len(probe.ids)):
                    weights = pattern[0, head, target - 1].tolist()
                    best = weights.index(max(weights))
                    inside = probe.start <= best < probe.stop
                    hits += inside and probe.ids[best] == probe.ids[target]
                expected[row, layer, head] = hits / probe.steps
    np.testing.assert_allclose(scores.values, expected, rtol=1e-12)  # the same counts
    assert np.nanstd(expected) > 0.05  # they do differ


def test_layers_without_attention_have_no_score_and_are_never_taken(tiny_model):
    scores = copy_scores(tiny_model("lfm2"), small_probes(), progress=False)
    assert np.isnan(scores.values[:, 1]).all()
    assert not np.isnan(scores.values[:, [0, 2]]).any()
    found = retrieval_heads(scores, 8)
    assert {head.layer for head in found.heads} == {0, 2}
    assert np.isnan(found.scores["low"].values[1]).all()
    with pytest.raises(InputError, match="between 1 and 8"):
        retrieval_heads(scores, 9)


def test_a_head_copies_where_it_looks_at_the_predicted_token_in_the_needle():
    #       position  0  1  2  3  4  5  6  7  8
    probe = CopyProbe((9, 5, 6, 5, 7, 5, 6, 5, 7), start=1, stop=4, steps=3)
    tops = np.array(
        [
            [2, 3, 4],  # 6 and 5 in the needle; 7 is right, and behind it
            [2, 1, 2],  # 5 is in the needle twice; 6 is in it, and not what is predicted
            [6, 5, 0],  # the right tokens, not in the needle
        ]
    )
    expected = [[True, True, False], [True, True, False], [False, False, False]]
    np.testing.assert_array_equal(copied(tops, probe), expected)
    # Of 6, 7 and 8 visible positions 1, 2 and 0 are right.
    assert probe.chance == pytest.approx((1 / 6 + 2 / 7 + 0 / 8) / 3)


def test_chance_is_what_heads_that_look_at_random_score():
    probe = small_probes()[0]
    rng = np.random.default_rng(0)
    visible = np.arange(len(probe.ids) - probe.steps, len(probe.ids))
    shares = copied(rng.integers(0, visible, (20000, probe.steps)), probe).mean()
    # 160,000 draws: the standard error is about 0.001.
    assert shares == pytest.approx(probe.chance, abs=0.005)


@pytest.mark.parametrize("same", [False, True], ids=["anew each step", "one place all along"])
def test_heads_that_look_at_random_are_seldom_called_copying(copier, same):
    import xarray as xr

    probes = random_probes(copier, 24, lengths=[PLACES])
    rng = np.random.default_rng(1)
    steps = probes[0].steps
    visible = np.arange(PLACES - steps, PLACES)
    called = 0
    for _ in range(100):
        shape = (30, 1 if same else steps)
        tops = [rng.integers(0, visible[:1] if same else visible, shape) for _ in probes]
        shares = [
            copied(np.broadcast_to(top, (30, steps)), probe).mean(-1)
            for top, probe in zip(tops, probes, strict=True)
        ]
        scores = xr.DataArray(
            np.array(shares)[:, None],
            {
                "steps": ("probe", [steps] * 24),
                "chance": ("probe", [probe.chance for probe in probes]),
                "layer": [0],
                "head": range(30),
            },
            ("probe", "layer", "head"),
        )
        found = retrieval_heads(scores, 3)
        called += len(found.above_chance) > 0
        assert found.note.startswith("no head copies") == (not len(found.above_chance))
    # At most 5 of 100 models are to be expected, and 11 would be seen once in 100 such tests.
    assert called <= 10


def test_reading_patterns_changes_nothing_and_leaves_no_hook(copier):
    probes = random_probes(copier, 2, lengths=[40])
    tokens = torch.tensor([probes[0].ids])
    before = copier(tokens)
    hooks = [point.fwd_hooks for point in copier.hook_dict.values() if point.fwd_hooks]
    assert hooks == []
    copy_scores(copier, probes, progress=False)
    assert torch.equal(copier(tokens), before)
    assert [point.name for point in copier.hook_dict.values() if point.fwd_hooks] == []


def test_attention_of_nan_is_refused(copier):
    weight = copier.original_model.get_input_embeddings().weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(InputError, match="layer 0: attention is NaN"):
            copy_scores(copier, random_probes(copier, 2, lengths=[40]), progress=False)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_patterns_that_cant_be_read_are_refused_with_the_remedy(copier, monkeypatch):
    monkeypatch.setattr(patterns, "PATTERN", "blocks.{}.attn.hook_nothing")
    with pytest.raises(InputError, match="pattern of layer 0, 1; import a published list"):
        copy_scores(copier, random_probes(copier, 2, lengths=[40]), progress=False)


# Probes


def test_random_probes_hide_a_needle_once_at_depths_from_end_to_end(testbed_model):
    probes = random_probes(testbed_model, 9, lengths=[60, 100], needle_tokens=7, cue_tokens=3)
    for probe, length in zip(probes, [60, 100] * 5, strict=False):
        needle, text = probe.ids[probe.start : probe.stop], list(probe.ids[1:-7])
        assert len(probe.ids) == length
        assert probe.ids[0] == testbed_model.tokenizer.bos_token_id
        assert (probe.ids[-7:], probe.steps) == (needle, 4)
        assert len(set(needle)) == 7
        assert sum(token in needle for token in text) == 7
    depths = [probe.start / (len(probe.ids) - 14) for probe in probes]
    assert depths[::2] == sorted(depths[::2])
    assert depths[0] < 0.2
    assert depths[-1] > 0.8
    again = random_probes(testbed_model, 9, lengths=[60, 100], needle_tokens=7, cue_tokens=3)
    assert again == probes != random_probes(testbed_model, 9, lengths=[60, 100], seed=1)


def test_random_probes_are_of_words_not_of_marks_bytes_or_special_tokens(copier):
    drawn = {token for probe in random_probes(copier, lengths=[60]) for token in probe.ids[1:]}
    assert drawn == set(range(1, ORDINARY + 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lengths": [65]}, "at most 64 tokens"),
        ({"lengths": []}, "got 32 of"),
        ({"lengths": [21]}, "needs 1 more tokens than the 21"),
        ({"count": 0}, "wanted 1 or more probes"),
        ({"cue_tokens": 10}, "1 to 9 of the needle's 10 tokens"),
        ({"cue_tokens": 0}, "1 to 9 of the needle's 10 tokens"),
        ({"needle_tokens": 36}, "36 ordinary tokens"),
    ],
)
def test_random_probes_that_cant_be_are_refused(copier, options, words):
    with pytest.raises(InputError, match=words):
        random_probes(copier, **options)


@pytest.mark.parametrize(
    ("text", "needles"),
    [("", ["w1 w2 w3"]), ("w9", []), ("w9", ["w1 w2"]), ("w9", ["w1 w2 w3", "w1 w2 w3"])],
)
def test_text_probes_without_text_or_with_unfit_needles_are_refused(copier, text, needles):
    with pytest.raises(InputError, match="different needles of 3 or more tokens"):
        text_probes(copier, text, needles)


def test_probes_that_hold_no_needle_or_dont_fit_are_refused(copier):
    for start, stop, steps in ((0, 0, 2), (-1, 3, 2), (2, 9, 2), (2, 4, 0)):
        with pytest.raises(InputError, match="a probe of 10 tokens can't hold"):
            CopyProbe(tuple(range(10)), start, stop, steps)
    long = CopyProbe((1,) * (PLACES + 1), 2, 4, 2)
    with pytest.raises(InputError, match="has 65 tokens, and the model's context is 64"):
        copy_scores(copier, [long], progress=False)
    with pytest.raises(InputError, match="need a probe"):
        copy_scores(copier, [], progress=False)
    with pytest.raises(InputError, match="at least 2, got 1"):
        retrieval_heads(copy_scores(copier, random_probes(copier, 1), progress=False), 1)


# Published lists


@pytest.mark.parametrize("group", ["k2", "k25"])
def test_published_lists_have_the_means_that_were_published_beside_them(shared, group):
    folder = shared / "official" / "LaMP-1" / group
    (path,) = folder.glob("*_pcs.json")
    (ranked,) = folder.glob("*_ranked.json")
    scores = read_head_scores(path, (32,) * 32)
    published = json.loads(ranked.read_text())["ranked_heads"]
    assert len(published) == 1024
    for row in published:
        assert scores[row["layer"], row["head"]] == pytest.approx(row["avg_pcs"], abs=1e-12)


def test_lists_may_hold_numbers_and_leave_heads_out(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text('{"0-1": [0.25, 0.75], "2-0": 0.125}')
    nan = np.nan
    np.testing.assert_array_equal(read_head_scores(path), [[nan, 0.5], [nan, nan], [0.125, nan]])
    scores = read_head_scores(path, (3, 0, 2, 3))
    assert scores.shape == (4, 3)
    assert (scores[0, 1], scores[2, 0], int(np.isnan(scores).sum())) == (0.5, 0.125, 10)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "not a list of head scores"),
        ("{}", "not a list of head scores"),
        ('{"heads": [1]}', "entry 'heads': a head is written like L9H6"),
        ('{"0-1": []}', "entry '0-1': wanted a finite number"),
        ('{"0-0": 1, "0-1": [1, null]}', "entry '0-1': wanted a finite number"),
        ('{"0-1": [NaN]}', "entry '0-1': wanted a finite number"),
        ('{"0-1": true}', "entry '0-1': wanted a finite number"),
        ('{"0-1": 1, "0-01": 2}', "entry '0-01': L0H1 is there twice"),
        ('{"4-0": [1]}', "L4H0 is not a head of this model, which has 2 layers"),
    ],
)
def test_lists_at_fault_are_refused_by_entry(tmp_path, text, words):
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        read_head_scores(path, (2, 2))
    assert str(caught.value).startswith(str(path))


# The command


def run(*arguments):
    app = typer.Typer()
    app.command()(retrieval.retrieval_heads)
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"})


def test_command_finds_the_head_built_to_copy_and_writes_it(copier, tmp_path):
    folder, out = copier.original_model.config._name_or_path, tmp_path / "heads.json"
    done = run(folder, "-k", 1, "--probes", 8, "--length", 50, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert [row["head"] for row in result["heads"]] == result["above_chance"] == ["L1H1"]
    assert result["heads"][0]["score"] == result["heads"][0]["low"] == 1
    assert HeadSet.load(out) == HeadSet((Head(1, 1),))


def test_command_reads_text_and_needles(copier, tmp_path):
    (tmp_path / "text").write_text("w20 w21 w22 w23\n")
    (tmp_path / "needles").write_text("w1 w2 w3 w4\n\nw5 w6 w7 w8\n")
    files = ("--text", tmp_path / "text", "--needles", tmp_path / "needles", "--length", 40)
    done = run(copier.original_model.config._name_or_path, *files, "-k", 1, "--json")
    result = json.loads(done.stdout)
    assert result["source"] == "2 probes of 40 tokens"
    assert result["heads"][0]["head"] == "L1H1"


def test_command_prints_a_table_of_80_columns_that_says_where_no_head_copies(tmp_path):
    options = ("--probes", 4, "--length", 40, "-k", 12, "--out", tmp_path / "a.json")
    done = run("testbed", *options)
    assert done.exit_code == 0, done.output
    lines = done.stdout.replace(str(tmp_path), "").splitlines()
    assert max(map(len, lines)) <= 80
    assert "no head copies" in done.stdout
    assert len(HeadSet.load(tmp_path / "a.json")) == 12


def test_command_imports_a_list(copier, tmp_path):
    folder, path = copier.original_model.config._name_or_path, tmp_path / "published.json"
    path.write_text('{"0-1": [0.5, 0], "1-0": [0.5, 0.25], "0-0": 0}')
    done = run(folder, "--from", path, "-k", 2, "--json")
    result = json.loads(done.stdout)
    assert [(row["head"], row["score"]) for row in result["heads"]] == [
        ("L1H0", 0.375),
        ("L0H1", 0.25),
    ]
    assert result["note"] == "imported: scores of 3 of the model's 4 heads"
    printed = run(folder, "--from", path, "-k", 2).stdout
    assert "0.3750" in printed
    assert "interval" not in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--out", "no/such/folder/heads.json"), "there is no folder"),
        (("--text", "a.txt"), "give both --text and --needles"),
        (("--cue", "Where?"), "give both --text and --needles"),
        (("--from", "a.json", "--cue", "Where?"), "--from imports a list"),
        (("--text", "gone.txt", "--needles", "gone.txt"), "gone.txt: can't be read"),
        (("-k", "33"), "K must be between 1 and 32"),
        (("--length", "12"), "more tokens than the 12 asked for"),
        (("--from", "gone.json"), "gone.json: no such file"),
    ],
)
def test_command_refuses_what_cant_work(arguments, words):
    done = run("testbed", *arguments)
    assert isinstance(done.exception, InputError)
    assert words in str(done.exception)
