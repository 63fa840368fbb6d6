"""The built-in corpus: its grammar, its splits, and the files that are shipped."""

import hashlib
import itertools
import json
import random
from collections import Counter
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from workbench.cli.testbed import testbed_app as app
from workbench.data import testbed
from workbench.data.lamp import load_lamp, testbed_examples
from workbench.data.prompts import PromptSettings, build_prompts
from workbench.data.sources import load_examples
from workbench.data.tasks import TASKS, TESTBED_TASKS, get_task
from workbench.errors import InputError

EVAL_SPLITS = tuple(testbed.CORPUS_USERS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    list(testbed.write_corpus(folder, seed=3))
    return folder


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.json")}


# Repeatability


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(tmp_path, corpus):
    for name, seed in (("again", 3), ("other", 4)):
        list(testbed.write_corpus(tmp_path / name, seed))
    assert files(tmp_path / "again") == files(corpus)
    assert files(tmp_path / "other").keys() == files(corpus).keys()
    assert files(tmp_path / "other") != files(corpus)


def test_the_shipped_corpus_is_the_one_of_seed_0(tmp_path):
    list(testbed.write_corpus(tmp_path, seed=0))
    shipped = files(testbed.testbed_path() / "corpus")
    assert files(tmp_path).keys() == shipped.keys()
    assert [name for name, content in files(tmp_path).items() if shipped[name] != content] == []


def test_training_lines_repeat_from_a_seed():
    def draw(seed, shuffled):
        return testbed.draw_lines(random.Random(seed), "testbed-headline", (0.7, 1.0), shuffled)

    assert draw(1, False) == draw(1, False)
    assert draw(1, False) != draw(2, False)
    assert draw(1, False) != draw(1, True)
    assert len(draw(1, False)) == testbed.HISTORY_TRAIN["testbed-headline"] + 1


# Splits


def test_users_and_their_combinations_of_traits_belong_to_one_split():
    by_split = {split: testbed.corpus_users(split) for split in EVAL_SPLITS}
    rng = random.Random(0)
    by_split["train"] = [testbed.draw_user(rng, "train", "t", (0.7, 1.0)) for _ in range(3000)]
    traits = {split: {user.traits() for user in users} for split, users in by_split.items()}
    for a, b in itertools.combinations(by_split, 2):
        assert traits[a].isdisjoint(traits[b])
        assert {u.name for u in by_split[a]}.isdisjoint(u.name for u in by_split[b])
    for split in EVAL_SPLITS:
        users = by_split[split]
        assert len(users) == testbed.CORPUS_USERS[split] == len(traits[split])


def test_another_seed_cannot_move_a_combination_to_another_split():
    traits = [
        {user.traits() for seed in range(3) for user in testbed.corpus_users(split, seed)}
        for split in EVAL_SPLITS
    ]
    for a, b in itertools.combinations(traits, 2):
        assert a.isdisjoint(b)


def test_a_trait_is_never_what_everybody_prefers():
    for user in testbed.corpus_users("test"):
        assert len(user.style) == testbed.IDIOSYNCRATIC_SLOTS
        for slot, value in user.style.items():
            assert value in testbed.STYLE_VALUES[slot][1:]


# Grammar

seeds = st.integers(0, 2**32 - 1)


@st.composite
def headlines(draw):
    """A style, and the headline that the grammar writes in it."""
    style = {slot: draw(st.sampled_from(v)) for slot, v in testbed.STYLE_VALUES.items()}
    verb = draw(st.sampled_from(list(testbed.FORMAL_VERB)))
    actor, thing = draw(st.sampled_from(testbed.ACTORS)), draw(st.sampled_from(testbed.OBJECTS))
    return style, testbed._headline(style, actor, verb, thing)


@given(headlines())
def test_reading_the_style_inverts_writing_it(drawn):
    style, headline = drawn
    assert testbed.read_style(headline) == style


@given(seeds)
def test_a_consistent_user_s_headline_shows_all_of_the_user_s_style(seed):
    rng = random.Random(seed)
    user = testbed.draw_user(rng, "test", "u", (1.0, 1.0))
    item = testbed.draw_item(rng, user, "testbed-headline")
    style = testbed.read_style(item.answer)
    assert set(style) == set(testbed.STYLE_VALUES)
    assert user.style.items() <= style.items()
    actor, thing = item.text.split()[3], item.text.split()[-1]
    assert {actor, thing} <= set(item.answer.split())


@given(st.text("ab :-,", max_size=30) | st.just(""))
def test_a_malformed_headline_has_no_style(text):
    assert testbed.read_style(text) == {}


@given(seeds, st.floats(0, 1))
def test_an_answer_is_one_of_the_task_s_labels(seed, consistency):
    rng = random.Random(seed)
    user = testbed.draw_user(rng, "discovery", "u", (consistency, consistency))
    for task in ("testbed-tag", "testbed-rating"):
        assert testbed.draw_item(rng, user, task).answer in get_task(task).labels


@given(seeds)
def test_a_consistent_user_s_taste_decides_a_query(seed):
    rng = random.Random(seed)
    user = testbed.draw_user(rng, "test", "u", (1.0, 1.0))
    item = testbed.draw_item(rng, user, "testbed-tag", query=True)
    keyword = item.text.split()[-1]
    assert user.favourite in testbed.CANDIDATES[keyword]
    assert item.answer == user.favourite
    review = testbed.draw_item(rng, user, "testbed-rating")
    base = next(b for b, words in testbed.OPINIONS.items() if review.text.split()[-1] in words)
    assert int(review.answer) == min(5, max(1, base + user.leniency))


def test_a_user_follows_a_preference_as_often_as_said():
    rng = random.Random(0)
    user = testbed.User("u", "war", 1, {"opener": "wow"}, consistency=0.8)
    shown = [testbed.draw_item(rng, user, "testbed-headline").answer for _ in range(2000)]
    share = sum(testbed.read_style(text)["opener"] == "wow" for text in shown) / 2000
    # .8, and the prior's .5 ** 6 / (2 - .5 ** 7) in the other cases; four standard errors.
    prior = 0.5**6 / (2 - 0.5**7)
    assert share == pytest.approx(0.8 + 0.2 * prior, abs=4 * 0.009)


def test_every_genre_is_as_often_the_home_as_the_second_one():
    homes, seconds = zip(*testbed.CANDIDATES.values(), strict=True)
    assert set(Counter(homes).values()) == set(Counter(seconds).values()) == {4}
    assert all(home != second for home, second in testbed.CANDIDATES.values())


# Files


def test_a_user_s_traits_stand_beside_the_questions(corpus):
    users = json.loads((corpus / "test_users.json").read_text())
    for example in testbed_examples("test", corpus):
        style = users[example.user]["style"] if example.task == "testbed-headline" else {}
        assert example.style == style


@pytest.mark.parametrize("split", EVAL_SPLITS)
@pytest.mark.parametrize("task", TESTBED_TASKS)
def test_every_row_is_read_as_lamp(corpus, task, split):
    examples = load_lamp(task, split, corpus)
    assert len(examples) == testbed.CORPUS_USERS[split] * testbed.CORPUS_QUERIES[split]
    per_user = Counter(example.user for example in examples)
    assert set(per_user.values()) == {testbed.CORPUS_QUERIES[split]}
    for example in examples:
        assert len(example.profile) == testbed.HISTORY_EVAL[task]
        before, after = testbed.query_text(task, "|").split("|")
        assert example.query.startswith(before)
        assert example.query.endswith(after)
        labels = TASKS[task].labels
        assert not labels or example.target in labels


def test_all_words_of_the_corpus_are_in_the_vocabulary(corpus):
    words = set(testbed.vocabulary())
    examples = [e for split in EVAL_SPLITS for e in testbed_examples(split, corpus)]
    for example in examples:
        items = [get_task(example.task).item.format(**item) for item in example.profile]
        unknown = set(" ".join([*items, example.query, example.target]).split()) - words
        assert unknown == set()


def test_a_word_has_one_id_and_special_tokens_come_first():
    words = testbed.vocabulary()
    assert len(words) == len(set(words))
    assert tuple(words[: len(testbed.SPECIAL_TOKENS)]) == testbed.SPECIAL_TOKENS


def test_the_shipped_tokenizer_knows_every_word_of_the_shipped_corpus():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(testbed.testbed_path())
    examples = load_examples("testbed", "discovery")
    assert {example.task for example in examples} == set(TESTBED_TASKS)
    for prompt in build_prompts(examples, tokenizer, 10_000, PromptSettings()):
        ids = prompt.ids + prompt.target_ids
        assert tokenizer.unk_token_id not in ids
        # Whole words: the target is as many tokens as it has words, one for a tag or rating.
        assert len(prompt.target_ids) == len(prompt.example.target.split())
        words = tokenizer.convert_ids_to_tokens(list(prompt.target_ids))
        assert words == prompt.example.target.split()


def test_a_split_or_task_of_the_testbed_that_is_not_there_is_refused(corpus):
    with pytest.raises(InputError, match=r"train_users\.json: no such file"):
        load_examples("testbed", "train", corpus)
    with pytest.raises(InputError, match="holds no task LaMP-4"):
        load_examples("testbed", "test", corpus, tasks=["LaMP-4"])
    kept = load_examples("testbed", "test", corpus, tasks=["testbed-tag"], users=5)
    assert {e.task for e in kept} == {"testbed-tag"}
    assert len({e.user for e in kept}) == 5


# Checkpoints


def test_the_small_checkpoint_reads_the_same_words_and_is_smaller():
    from workbench.models import heads_per_layer, load_model

    small = load_model("testbed-small", device="cpu")
    assert heads_per_layer(small) == (6, 6, 6)
    folders = [testbed.testbed_path(name) for name in ("testbed", "testbed-small")]
    first, second = ((folder / "tokenizer.json").read_bytes() for folder in folders)
    assert first == second
    assert not (folders[1] / "corpus").exists()


@pytest.mark.parametrize(("name", "size"), [("testbed", "base"), ("testbed-small", "small")])
def test_a_shipped_checkpoint_is_what_its_recipe_and_digest_say(name, size):
    from workbench.training import SIZES

    folder = testbed.testbed_path(name)
    record = json.loads((folder / "training.json").read_text())
    assert record["recipe"] == json.loads(json.dumps(asdict(SIZES[size])))
    weights = (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == record["weights_sha256"]


def test_a_user_s_own_profile_helps_the_small_checkpoint():
    from workbench.analysis.profiles import profile_value
    from workbench.models import load_model

    examples = load_examples("testbed", "test", users=40)
    table = profile_value(load_model("testbed-small", device="cpu"), examples)
    assert (table["cost_low"].sel(profile=["none", "stranger"]) > 0).all()


def test_a_built_in_checkpoint_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="built-in testbed-large is missing"):
        testbed.testbed_path("testbed-large")


def test_a_size_of_the_testbed_that_is_not_there_is_refused():
    done = CliRunner().invoke(app, ["train", "--size", "large"])
    assert isinstance(done.exception, InputError)
    assert "base or small" in str(done.exception)
