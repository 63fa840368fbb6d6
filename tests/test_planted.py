"""The planted model: what its heads do by their weights, and whether discovery finds them."""

import gc
import itertools
import json

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from workbench import tables
from workbench.analysis import recovery as analysis
from workbench.analysis.recovery import recovery
from workbench.batches import by_length
from workbench.cli.testbed import testbed_app
from workbench.data import planted as corpus
from workbench.data.examples import with_strangers_profile, without_profile
from workbench.data.planted import SLOTS, Grammar, planted_examples
from workbench.data.prompts import build_prompts
from workbench.discovery.run import score_heads
from workbench.errors import InputError
from workbench.heads import HeadSet, all_heads
from workbench.hooks import hook_name
from workbench.planted import ground_truth, plant
from workbench.scores import HeadScores
from workbench.steering.decode import generate

SHAPE = (8, 8, 8, 8)


@pytest.fixture(scope="module")
def planted(one_thread, tmp_path_factory):
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def examples(planted):
    return planted_examples(planted.grammar, 24, seed=5)


@pytest.fixture(scope="module")
def scored(planted):
    """128 users, behind their own and behind a stranger's profile."""
    own = planted_examples(planted.grammar, 128)
    return tuple(
        score_heads(planted.model, part, progress=False)
        for part in (own, with_strangers_profile(own))
    )


def word_losses(model, tokenizer, examples):
    """Loss of every target word, [example, word], by Transformers alone and one text at a time."""
    found = []
    for example in examples:
        text = " ".join([*(item["text"] for item in example.profile), example.query])
        ids = tokenizer(text + " " + example.target, return_tensors="pt")["input_ids"]
        count = len(example.target.split())
        with torch.no_grad():
            log_probs = model(ids).logits[0, -count - 1 : -1].log_softmax(-1)
        found.append(-log_probs[torch.arange(count), ids[0, -count:]].numpy())
    return np.stack(found)


def without_output(planted, heads):
    """The model on disk, with these heads' rows of W_O zeroed."""
    model = AutoModelForCausalLM.from_pretrained(planted.folder)
    width = model.config.head_dim
    for head in heads:
        out = model.model.layers[head.layer].self_attn.o_proj.weight.data
        out[:, head.head * width : (head.head + 1) * width] = 0
    return model


# What the heads do, by the weights


@pytest.fixture(scope="module")
def losses(planted, examples):
    tokenizer = AutoTokenizer.from_pretrained(planted.folder)

    def measure(heads=(), part=examples):
        return word_losses(without_output(planted, heads), tokenizer, part)

    return measure


def is_preference(examples):
    """Which target words are the user's: every third, from the second on."""
    return np.arange(len(examples[0].target.split())) % 3 == 1


def test_the_whole_model_knows_every_word_of_the_target(losses, examples):
    own = losses()
    assert own.max() < 0.05
    # With no profile a user's word is one of six, and nothing else gets harder.
    none = losses(part=without_profile(examples))
    mine = is_preference(examples)
    assert none[:, mine].mean() == pytest.approx(np.log(6), abs=0.1)
    assert none[:, ~mine].max() < 0.05


def test_zeroing_the_planted_heads_output_weights_destroys_the_preference_and_nothing_else(
    losses, planted, examples
):
    before, after = losses(), losses(planted.preference)
    mine = is_preference(examples)
    # A sixth of the probability each, but for the other heads' noise in the logits.
    assert after[:, mine].mean() == pytest.approx(np.log(6), abs=0.1)
    # The norm's part in the others: a thousandth of a logit of 9.
    assert np.abs(after - before)[:, ~mine].max() < 0.01


def test_each_planted_head_carries_its_own_slot_and_no_other(losses, planted, examples):
    before = losses()
    for slot, head in enumerate(planted.preference):
        rise = (losses([head]) - before).mean(axis=0)
        assert rise[1 + 3 * slot] > 1.5
        assert np.delete(rise, 1 + 3 * slot).max() < 0.01


def test_zeroing_a_decoy_destroys_one_step_of_the_grammar_with_or_without_a_profile(
    losses, planted, examples
):
    for part in (examples, without_profile(examples), with_strangers_profile(examples)):
        before = losses(part=part)
        for step, head in enumerate(planted.decoys):
            rise = (losses([head], part) - before).mean(axis=0)
            assert rise[2 + 3 * step] > 3
            assert np.delete(rise, 2 + 3 * step).max() < 0.01


def test_the_other_heads_matter_little_and_do_something(losses, planted, examples):
    taken = {*planted.preference, *planted.decoys}
    rest = [head for head in all_heads(SHAPE) if head not in taken]
    # Behind a stranger's profile the loss is not flat at 0, so that their noise is seen.
    strangers = with_strangers_profile(examples)
    change = np.abs(losses(rest, strangers) - losses((), strangers))
    # 24 heads that add .05 to a logit each, on both words that a loss compares: about .35.
    assert 0.05 < change.max() < 2


def head_outputs(planted, part):
    """z at the target's words, [layer, example, word, head, d_head]."""
    prompts = build_prompts(part, planted.model.tokenizer, 1024)
    ((rows, batch),) = by_length(planted.model, prompts, 10**6)
    assert rows == list(range(len(part)))
    kept = {}
    hooks = [
        (hook_name(layer), lambda z, hook, layer=layer: kept.update({layer: z}))
        for layer in range(4)
    ]
    with torch.inference_mode(), planted.model.hooks(fwd_hooks=hooks):
        planted.model(batch.tokens, attention_mask=batch.attention_mask)
    return torch.stack([kept[layer] for layer in range(4)])[:, :, -12:]


def test_only_the_planted_heads_output_depends_on_whose_profile_it_is(planted, examples):
    own, other = (
        head_outputs(planted, part) for part in (examples, with_strangers_profile(examples))
    )
    moved = (own - other).abs().amax(dim=(1, 2, 4))
    for head in all_heads(SHAPE):
        if head in planted.preference:
            assert moved[head.layer, head.head] > 0.5
        else:
            # What is left is the norm's: 200 in the ballast against what heads wrote, below 10.
            assert moved[head.layer, head.head] < 0.01


def test_a_planted_head_writes_at_its_own_words_and_nothing_elsewhere(planted, examples):
    size = head_outputs(planted, examples).abs().amax(dim=(1, 4))
    for heads, first in ((planted.preference, 0), (planted.decoys, 1)):
        for slot, head in enumerate(heads):
            written = size[head.layer, :, head.head]
            place = first + 3 * slot
            assert written[place] == pytest.approx(1, abs=0.01)
            # The first token, which takes all attention there, has nothing to copy.
            assert np.delete(written.numpy(), place).max() < 1e-6


def test_the_model_writes_the_user_s_note_and_stops(planted, examples):
    answers = generate(planted.model, examples[:4], max_new_tokens=20)
    assert [answer.text for answer in answers] == [example.target for example in examples[:4]]


# How it is built


def test_the_same_seed_builds_the_same_bytes_and_another_other_heads(planted, tmp_path):
    again, other = plant(tmp_path / "a"), plant(tmp_path / "b", seed=1)
    for name in ("model.safetensors", "tokenizer.json", "planted.json", "config.json"):
        assert (again.folder / name).read_bytes() == (planted.folder / name).read_bytes()
    assert other.preference != planted.preference


def test_the_truth_stands_beside_the_weights(planted):
    truth = json.loads((planted.folder / "planted.json").read_text())
    assert truth["preference"] == list(map(str, planted.preference))
    assert truth["decoys"] == list(map(str, planted.decoys))
    assert truth["slots"] == list(planted.grammar.slots)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"preferences": 1, "decoys": 0, "layers": 1, "heads": 1}, (1,)),
        ({"preferences": 8, "decoys": 16, "layers": 3, "heads": 8}, (8, 8, 8)),
    ],
)
def test_a_model_of_another_size_knows_its_users_too(one_thread, tmp_path, options, shape):
    built = plant(tmp_path, **options)
    made = planted_examples(built.grammar, 6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    own, strangers = (
        word_losses(without_output(built, ()), tokenizer, part)
        for part in (made, with_strangers_profile(made))
    )
    assert built.model.cfg.n_layers == len(shape)
    assert own.max() < 0.1
    assert strangers.max() > 1
    assert len(built.preference) == options["preferences"]
    assert len(built.decoys) == options["decoys"]
    assert not set(built.preference) & set(built.decoys)


def test_a_folder_that_nobody_named_goes_with_the_model(one_thread):
    built = plant(preferences=1, decoys=0, layers=1, heads=2)
    folder = built.folder
    assert (folder / "model.safetensors").is_file()
    del built
    gc.collect()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preferences": 0}, "preferences must be 1 to 8"),
        ({"preferences": 9}, "preferences must be 1 to 8"),
        ({"preferences": 2, "decoys": 5}, "decoys must be 0 to 4"),
        ({"layers": 1, "heads": 7}, "need as many heads"),
        ({"background": -0.1}, "background must be 0 to 0.2"),
    ],
)
def test_a_model_that_can_not_be_built_is_refused(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        plant(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


# Its users


def test_every_word_is_one_token(planted, examples):
    for prompt in build_prompts(examples, planted.model.tokenizer, 1024):
        words = planted.model.tokenizer.convert_ids_to_tokens(list(prompt.ids + prompt.target_ids))
        shown = [item["text"] for item in prompt.example.profile]
        text = " ".join([*shown, prompt.example.query, prompt.example.target])
        assert words == ["<bos>", *text.split()]


def test_no_word_has_two_meanings():
    everything = Grammar(tuple(SLOTS)).vocabulary
    assert len(everything) == len(set(everything))


def test_noise_is_the_share_of_foreign_items_and_of_slots_that_stray():
    grammar = Grammar(tuple(SLOTS)[:4])
    made = planted_examples(grammar, 1500, noise=0.3)
    own = [grammar.sentence(e.style) for e in made]
    foreign = [item["text"] != s for e, s in zip(made, own, strict=True) for item in e.profile]
    # A foreign item is the own sentence by chance once in 6 ** 4; four standard errors.
    assert np.mean(foreign) == pytest.approx(0.3, abs=4 * (0.21 / len(foreign)) ** 0.5)
    strays = [w not in e.style.values() for e in made for w in e.target.split()[1::3]]
    # Drawn from all six, a word is the user's again once in six.
    assert np.mean(strays) == pytest.approx(0.25, abs=4 * (0.19 / len(strays)) ** 0.5)


def test_a_user_without_noise_shows_the_same_words_everywhere():
    grammar = Grammar(tuple(SLOTS)[:2])
    made = planted_examples(grammar, 3, 2)
    assert [e.user for e in made] == [f"planted-000{i}" for i in (0, 0, 1, 1, 2, 2)]
    assert len({e.name for e in made}) == 6
    for example in made:
        assert {item["text"] for item in example.profile} == {example.target}
    assert len(made[0].profile) == corpus.PROFILE
    assert planted_examples(grammar, 3, 2) == made != planted_examples(grammar, 3, 2, seed=1)


@pytest.mark.parametrize("wrong", [{"users": 0}, {"users": 1, "examples": 0}])
def test_users_that_can_not_be_are_refused(wrong):
    with pytest.raises(InputError, match="1 or more users and examples"):
        planted_examples(Grammar(("drink",)), **wrong)
    with pytest.raises(InputError, match=r"noise 1\.5"):
        planted_examples(Grammar(("drink",)), 1, noise=1.5)


# Whether discovery finds the heads


def test_the_specific_heads_are_exactly_the_planted_ones_at_64_examples(scored, planted):
    row = recovery({0.0: scored}, planted.preference, counts=[64]).squeeze()
    assert row["draws"].item() == 2
    specific = row.sel({"method": "specific"})
    assert specific["precision"].item() == specific["recall"].item() == 1.0
    assert specific["exact"].item() == 1.0


def test_plain_pcs_takes_the_decoys_for_preference_heads(scored, planted):
    assert scored[0].top(4, "all")["all"] == planted.decoys
    row = recovery({0.0: scored}, planted.preference, counts=[64]).sel({"method": "pcs"})
    assert row["precision"].item() == row["recall"].item() == 0.0


def test_without_decoys_plain_pcs_finds_the_planted_heads(one_thread):
    built = plant(preferences=2, decoys=0, layers=2, heads=4)
    own = planted_examples(built.grammar, 8)
    scores = score_heads(built.model, own, progress=False)
    assert scores.top(2, "all")["all"] == built.preference


def test_ground_truth_scores_each_level_of_noise_and_goes_on_from_its_folder(one_thread, tmp_path):
    built = plant(tmp_path / "model", preferences=2, decoys=1, layers=2, heads=4)
    options = {"noise": (0.0, 0.5), "counts": (8,), "folder": tmp_path / "runs", "progress": False}
    table = ground_truth(built, **options)
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "own-0",
        "own-0.5",
        "stranger-0",
        "stranger-0.5",
    ]
    written = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")}
    xr.testing.assert_identical(ground_truth(built, **options), table)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")} == written
    loaded = HeadScores.load(tmp_path / "runs" / "own-0")
    assert loaded.data.sizes["example"] == 16


# Precision and recall on numbers made by hand


def make_scores(pcs, weights="w", users=None, noise=None):
    """Scores [example, layer, head], one example a user unless said otherwise."""
    pcs = np.asarray(pcs, dtype=np.float32)
    names = [f"e{i}" for i in range(len(pcs))]
    data = xr.Dataset(
        {"pcs": (("example", "layer", "head"), pcs), "nll": ("example", np.ones(len(pcs)))},
        coords={
            "example": names,
            "user": ("example", names if users is None else users),
            "task": ("example", ["t"] * len(pcs)),
        },
    )
    return HeadScores(data, {"settings": {"weights": weights}, "noise": noise or {}})


@pytest.fixture
def by_hand():
    """Of six heads L0H0 and L0H1 are specific, L0H2 has the highest PCS of all."""
    rng = np.random.default_rng(0)
    other = rng.normal(0, 0.1, (40, 1, 6))
    own = other + rng.normal(0, 0.01, other.shape)
    own[..., :2] += 1
    own[..., 2], other[..., 2] = own[..., 2] + 5, other[..., 2] + 5
    return make_scores(own), make_scores(other)


def test_precision_and_recall_are_those_counted_by_hand(by_hand):
    planted = HeadSet.parse("L0H0, L0H1, L0H3")
    table = recovery({0.0: by_hand}, planted, counts=[20])
    pcs, specific = (table.sel({"method": m}).squeeze() for m in ("pcs", "specific"))
    # Top 3 by PCS: L0H2, L0H0, L0H1; two of them are planted, of three.
    assert pcs["precision"].item() == pcs["recall"].item() == pytest.approx(2 / 3)
    assert specific["precision"].item() == 1.0
    assert specific["recall"].item() == pytest.approx(2 / 3)
    assert specific["found"].item() == 2
    assert (table["exact"] == 0).all()
    assert table["draws"].item() == 2
    # Both draws are the same: they say nothing about the spread, and 0 of 2 is up to 84 %.
    assert np.isnan(specific["recall_low"].item())
    assert specific["exact_high"].item() == pytest.approx(1 - 0.025 ** (1 / 2))


def test_nothing_found_has_no_precision_and_a_recall_of_0(by_hand):
    same = (by_hand[0], by_hand[0])
    row = recovery({0.1: same}, HeadSet.parse("L0H0"), counts=[40]).sel({"method": "specific"})
    assert np.isnan(row["precision"].item())
    assert row["recall"].item() == row["found"].item() == 0


def test_a_difference_below_the_noise_floor_is_no_finding(by_hand):
    own, other = (make_scores(s.data["pcs"].values, noise={"p95": 10.0}) for s in by_hand)
    row = recovery({0.0: (own, other)}, HeadSet.parse("L0H0"), counts=[40])
    assert row.sel({"method": "specific"})["found"].item() == 0


def test_a_head_that_a_stranger_s_profile_makes_more_of_is_not_specific(by_hand):
    row = recovery({0.0: by_hand[::-1]}, HeadSet.parse("L0H0"), counts=[40])
    assert row.sel({"method": "specific"})["found"].item() == 0


def test_draws_share_no_example_and_keep_users_together():
    users = ["a", "b", "a", "b", "c", "c"]
    scores = make_scores(np.zeros((6, 1, 1)), users=users)
    drawn = [rows.tolist() for rows in analysis._draws(scores, 2, most=5)]
    assert drawn == [[0, 2], [1, 3], [4, 5]]
    assert len(list(analysis._draws(scores, 2, most=2))) == 2


def test_draws_that_differ_have_an_interval_by_resampling_them():
    # Four draws of which three find the head: every resampled mean is a multiple of 1/4.
    found = [HeadSet.parse("L0H0")] * 3 + [HeadSet(())]
    row = analysis._summary(found, HeadSet.parse("L0H0"), 0.95, 0)
    assert (row["recall"], row["precision"], row["exact"]) == (0.75, 1.0, 0.75)
    assert row["recall_low"] == 0.25
    assert row["recall_high"] == 1.0


def test_the_table_keeps_its_numbers_on_disk(by_hand, tmp_path):
    table = recovery({0.0: by_hand, 0.2: by_hand}, HeadSet.parse("L0H0"), counts=[8, 20])
    tables.save(table, tmp_path / "t.json")
    xr.testing.assert_allclose(tables.load(tmp_path / "t.json"), table)
    assert tables.load(tmp_path / "t.json").attrs == table.attrs


def test_the_findings_say_from_how_many_examples_on_and_in_how_many_draws(by_hand):
    table = recovery({0.0: by_hand}, HeadSet.parse("L0H0, L0H1"), counts=[3, 20])
    first, pcs, specific = analysis.lines(table)
    assert first == "Planted are 2 heads: L0H0, L0H1."
    assert "not exactly the planted ones in every draw; at 20 examples precision 0.50" in pcs
    assert "recall 0.50 over 2 draws" in pcs
    assert "exactly the planted ones from 20 examples on, in all of 2 draws" in specific
    assert "0.16 to 1.00" in specific


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"counts": [41]}, "40 examples are scored, and 41 are asked for"),
        ({"counts": []}, "needs scores"),
        ({"draws": 0}, "needs scores"),
        ({"planted": HeadSet(())}, "0 heads"),
        ({"planted": HeadSet.parse("L3H0")}, "is not a head of this model"),
    ],
)
def test_a_recovery_that_can_not_be_measured_is_refused(by_hand, change, words):
    options = {"planted": HeadSet.parse("L0H0"), "counts": [8], **change}
    with pytest.raises(InputError, match=words):
        recovery({0.0: by_hand}, **options)


def test_two_sides_of_other_models_or_examples_are_refused(by_hand):
    pcs = by_hand[0].data["pcs"].values
    for other in (make_scores(pcs, weights="v"), make_scores(pcs[:30])):
        with pytest.raises(InputError, match="other examples or another model"):
            recovery({0.2: (by_hand[0], other)}, HeadSet.parse("L0H0"), counts=[8])


def test_screened_scores_are_refused(by_hand):
    settings = {"weights": "w", "screen": {"k": 1, "by": "task"}}
    scores = HeadScores(by_hand[0].data, {"settings": settings})
    with pytest.raises(InputError, match="needs exact scores of all heads"):
        recovery({0.0: (scores, scores)}, HeadSet.parse("L0H0"), counts=[8])


# The command

SMALL = ("planted", "--noise", "0", "--counts", "8,48")


def command(*arguments):
    environment = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(testbed_app, list(map(str, arguments)), env=environment)


def test_the_command_builds_the_model_and_prints_what_is_found_in_80_columns(one_thread, tmp_path):
    done = command(*SMALL, "--out", tmp_path)
    assert done.exit_code == 0, done.output + repr(done.exception)
    printed = done.stdout.replace(str(tmp_path), "OUT").splitlines()
    assert max(map(len, printed)) <= 80
    text = " ".join(" ".join(printed).split())
    assert "exactly the planted ones from 48 examples on, in all of 2 draws" in text
    assert "The decoys are L1H2" in text
    for name in ("model/planted.json", "recovery.json", "figures/recovery.html"):
        assert (tmp_path / name).is_file()
    again = command(*SMALL, "--out", tmp_path, "--json")
    found = json.loads(again.stdout)
    assert found["planted"] == "L0H2, L1H3, L3H1, L2H5"
    rows = [row for row in found["rows"] if row["method"] == "specific" and row["count"] == 48]
    assert [row["exact"] for row in rows] == [1.0]


def test_numbers_that_are_none_are_refused(tmp_path):
    for wrong in (("--noise", "some"), ("--counts", "8,many")):
        done = command("planted", *wrong, "--out", tmp_path)
        assert isinstance(done.exception, InputError)
        assert "wanted numbers like" in str(done.exception)


def test_a_user_shares_no_word_with_the_one_before():
    made = planted_examples(Grammar(tuple(SLOTS)[:3]), 200)
    for before, after in itertools.pairwise(made):
        assert all(before.style[slot] != after.style[slot] for slot in before.style)
