"""Metrics on answers worked by hand, and against scikit-learn, rouge-score and NLTK."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import f1_score, mean_absolute_error, root_mean_squared_error

from workbench import stats
from workbench.data.examples import Example
from workbench.data.tasks import get_task
from workbench.errors import InputError
from workbench.evaluation import metrics, text
from workbench.evaluation.metrics import METRICS, get_metric, metrics_of


def example(task, target, **more):
    return Example("1", "u", task, "query", target, ({"text": "t"},), **more)


def examples(task, targets):
    return [example(task, target) for target in targets]


# Classification


@pytest.mark.parametrize(
    ("answer", "value"),
    [("western", 1.0), (" western ", 1.0), ("Western", 0.0), ("western film", 0.0), ("", 0.0)],
)
def test_accuracy_is_exact_match(answer, value):
    assert get_metric("accuracy").score(example("testbed-tag", "western"), answer) == value


def test_macro_f1_worked_by_hand():
    # [1]: 1 hit, said twice, gold twice: F1 1/2. [2]: 1 hit, said once, gold twice: 2/3.
    asked = examples("LaMP-1", ["[1]", "[1]", "[2]", "[2]"])
    found = get_metric("f1").value(asked, ["[1]", "neither", "[1]", " [2] "])
    assert found == pytest.approx((1 / 2 + 2 / 3) / 2, rel=1e-12)


@pytest.mark.parametrize("task", ["LaMP-1", "LaMP-2", "testbed-tag"])
@pytest.mark.parametrize("size", [3, 60])
def test_macro_f1_is_sklearns_over_all_labels(task, size):
    labels = get_task(task).labels
    rng = np.random.default_rng(size)
    # A few labels never asked and some never said, and answers that are no label.
    gold = rng.choice(labels[: len(labels) - len(labels) // 3], size)
    said = np.where(rng.random(size) < 0.4, gold, rng.choice([*labels[1:], "who knows", ""], size))
    expected = f1_score(gold, said, labels=labels, average="macro", zero_division=0)
    found = get_metric("f1").value(examples(task, gold.tolist()), said.tolist())
    assert found == pytest.approx(expected, rel=1e-12)


def test_an_unreadable_answer_is_a_miss_and_no_false_hit():
    asked = examples("LaMP-1", ["[1]", "[2]", "[2]"])
    unreadable = get_metric("f1").value(asked, ["both", "[2]", "[2]"])
    assert unreadable == pytest.approx(0.5)  # [1] 0, [2] 1: nothing was falsely called [2]
    assert get_metric("f1").value(asked, ["[2]", "[2]", "[2]"]) == pytest.approx(0.4)


def test_macro_f1_refuses_a_gold_output_that_is_no_label():
    with pytest.raises(InputError, match=r"LaMP-1/1: the gold output '\[3\]' is no label"):
        get_metric("f1").value(examples("LaMP-1", ["[3]"]), ["[1]"])


# Ratings


@pytest.mark.parametrize(
    ("gold", "answer", "value"),
    [("4", "4", 0.0), ("4", "2", 2.0), ("4", "3.5", 0.5), ("4", "good", 3.0), ("2", "", 3.0)],
)
def test_unreadable_rating_counts_as_the_far_end(gold, answer, value):
    assert get_metric("mae").score(example("LaMP-3", gold), answer) == value
    assert get_metric("rmse").value(examples("LaMP-3", [gold]), [answer]) == value


@pytest.mark.parametrize("answer", ["nan", "inf", "-inf", "1e200"])
def test_a_rating_that_is_no_number_counts_as_the_far_end(answer):
    assert get_metric("mae").score(example("LaMP-3", "5"), answer) == 4.0
    assert get_metric("rmse").value(examples("LaMP-3", ["5"]), [answer]) == 4.0


def test_rating_errors_are_sklearns_with_the_far_end_put_in():
    rng = np.random.default_rng(0)
    gold = rng.integers(1, 6, 80)
    said = rng.integers(1, 6, 80)
    silent = rng.random(80) < 0.2
    answers = np.where(silent, "no idea", said.astype(str)).tolist()
    taken = np.where(silent, np.where(gold > 3, 1, 5), said)
    asked = examples("LaMP-3", gold.astype(str).tolist())
    # 3 is as far from both ends, so it does not matter which is put in.
    expected = root_mean_squared_error(gold, taken)
    assert get_metric("rmse").value(asked, answers) == pytest.approx(expected, rel=1e-12)
    expected = mean_absolute_error(gold, taken)
    assert get_metric("mae").value(asked, answers) == pytest.approx(expected, rel=1e-12)


# Texts


def test_rouge_without_stemming_worked_by_hand():
    one, longest = get_metric("rouge1").score, get_metric("rougeL").score
    # 2 shared words of 4 and of 3: precision 2/3, recall 1/2, F 4/7; "cats" is not "cat".
    assert one(example("LaMP-4", "the cat sat down"), "the cats sat") == pytest.approx(4 / 7)
    # Same words, other order: the longest common subsequence is 1 word of 2.
    assert longest(example("LaMP-4", "big news"), "news big") == pytest.approx(0.5)
    assert one(example("LaMP-4", "big news"), "") == 0.0


def test_rouge_is_rouge_scores_own():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(["Run", "running", "the", "a-b", "x!"], 6)) for _ in range(20)]
    for gold, answer in itertools.pairwise(lines):
        expected = scorer.score(gold, answer)
        for kind in ("rouge1", "rougeL"):
            found = get_metric(kind).score(example("LaMP-4", gold), answer)
            assert found == expected[kind].fmeasure


@pytest.fixture
def no_corpora(monkeypatch):
    """NLTK that finds no corpus, and afterwards whatever it found before."""
    import nltk
    from nltk.corpus import wordnet

    wordnet._unload()
    monkeypatch.setattr(nltk.data, "path", [])
    get_metric.cache_clear()
    yield nltk.data.path
    wordnet._unload()
    get_metric.cache_clear()


def meteor_by_hand(matches, said, gold, chunks):
    """METEOR's formula with NLTK's constants: alpha .9, beta 3, gamma .5."""
    precision, recall = matches / said, matches / gold
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    return mean * (1 - 0.5 * (chunks / matches) ** 3)


@pytest.mark.parametrize(
    ("gold", "answer", "counts"),
    [
        # matched words, words of the answer, words of the gold text, runs of matches
        ("the cat sat", "the cat sat", (3, 3, 3, 1)),
        ("The cat sat", "the CAT sat", (3, 3, 3, 1)),
        ("the cats sat", "the cat sat down", (3, 4, 3, 1)),  # by their stem
        ("big news today", "today big news", (3, 3, 3, 2)),
        ("It rained. We left.", "We left.", (3, 3, 6, 1)),
        ("she didn't go", "she did go", (3, 3, 4, 2)),  # did, n't
    ],
)
def test_meteor_worked_by_hand_on_exact_words_and_stems(no_corpora, gold, answer, counts):
    found = get_metric("meteor").score(example("LaMP-4", gold), answer)
    assert found == pytest.approx(meteor_by_hand(*counts), rel=1e-12)


def test_meteor_is_nltks_on_plain_words(no_corpora):
    from nltk.translate.meteor_score import meteor_score

    class Nothing:
        def synsets(self, word):
            return []

    rng = np.random.default_rng(1)
    words = ["run", "running", "the", "cat", "cats", "news", "big"]
    lines = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(30)]
    for gold, answer in itertools.pairwise(lines):
        expected = meteor_score([gold.split()], answer.split(), wordnet=Nothing())
        assert get_metric("meteor").score(example("LaMP-4", gold), answer) == expected


def test_meteor_of_nothing_shared_or_nothing_said_is_zero():
    score = get_metric("meteor").score
    assert score(example("LaMP-4", "big news"), "") == 0.0
    assert score(example("LaMP-4", "big news"), "small talk") == 0.0


def test_meteor_says_when_it_has_no_synonyms(no_corpora):
    metric = get_metric("meteor")
    assert metric.label == "METEOR (exact, stem)"
    assert metric.score(example("LaMP-4", "a car"), "a auto") < 0.5


def wordnet_of_one_synset(folder):
    """A corpus in WordNet's format in which "car" and "auto" mean the same, and nothing else."""
    folder.mkdir(parents=True)
    names = ("adj", "adv", "noun", "verb")
    for name in ("cntlist.rev", "index.sense", *(f"{n}.exc" for n in names)):
        (folder / name).write_text("")
    (folder / "lexnames").write_text("00\tnoun.artifact\t1\n")
    for name in names:
        (folder / f"index.{name}").write_text("")
        (folder / f"data.{name}").write_text("  1 WordNet 3.0 Copyright\n")
    # Its place in the file is how a synset is found.
    place = (folder / "data.noun").stat().st_size
    with (folder / "data.noun").open("a") as data:
        data.write(f"{place:08d} 00 n 02 car 0 auto 0 000 | a vehicle\n")
    lines = [f"{word} n 1 0 1 0 {place:08d}\n" for word in ("auto", "car")]
    (folder / "index.noun").write_text("".join(lines))


def test_meteor_matches_synonyms_where_wordnet_is_installed(no_corpora, tmp_path):
    wordnet_of_one_synset(tmp_path / "corpora" / "wordnet")
    no_corpora.append(str(tmp_path))
    metric = get_metric("meteor")
    assert metric.label == "METEOR"
    found = metric.score(example("LaMP-4", "a red car"), "a red auto")
    assert found == pytest.approx(meteor_by_hand(3, 3, 3, 1), rel=1e-12)


def test_style_match_counts_the_users_own_slots_only():
    style = {"opener": "dear", "closer": "cheers", "order": "object-first"}
    asked = example("testbed-headline", "gold", style=style)
    score = get_metric("style").score
    assert score(asked, "dear big news , bridge : mayor starts - cheers") == 1.0
    assert score(asked, "dear big news , mayor starts bridge - cheers") == pytest.approx(2 / 3)
    assert score(asked, "cheers") == 0.0
    assert score(asked, "") == 0.0
    with pytest.raises(ValueError, match="knows no style"):
        score(example("testbed-headline", "gold"), "dear")


# Any metric


def test_metrics_come_in_the_order_of_the_papers_tables():
    assert metrics_of(example("LaMP-1", "[1]")) == ("accuracy", "f1")
    assert metrics_of(example("LaMP-3", "1")) == ("mae", "rmse")
    assert metrics_of(example("LaMP-7", "x")) == ("rouge1", "rougeL", "meteor")
    assert metrics_of(example("testbed-headline", "x")) == ("style", "rouge1", "rougeL", "meteor")


def test_the_primary_metric_of_every_task_is_a_mean_over_answers():
    from workbench.data.tasks import TASKS

    primary = {metrics_of(example(task, "x"))[0] for task in TASKS}
    assert primary <= set(METRICS)
    assert [name for name in primary if get_metric(name).pooled] == []


def test_the_value_of_a_mean_metric_is_the_mean_of_its_scores():
    asked = examples("LaMP-3", ["1", "2", "5", "4"])
    answers = ["2", "2", "none", "1"]
    metric = get_metric("mae")
    scores = [metric.score(e, a) for e, a in zip(asked, answers, strict=True)]
    assert metric.value(asked, answers) == np.mean(scores) == 2.0


@pytest.mark.parametrize("name", ["f1", "rmse"])
def test_a_pooled_metric_has_no_value_of_one_answer(name):
    with pytest.raises(ValueError, match="is no mean over answers"):
        get_metric(name).score(example("LaMP-1", "[1]"), "[1]")


def test_answers_to_several_tasks_are_not_pooled():
    # Two tasks may have equally many labels: their sums would fit and mean nothing.
    mixed = [example("LaMP-3", "1"), example("testbed-rating", "1")]
    with pytest.raises(ValueError, match="of one task, got LaMP-3, testbed-rating"):
        get_metric("mae").parts_of(mixed, ["1", "1"])
    with pytest.raises(ValueError, match="got no answer"):
        get_metric("mae").parts_of([], [])
    with pytest.raises(ValueError, match="shorter"):
        get_metric("mae").parts_of(mixed[:1], [])


def test_an_unknown_metric_is_refused():
    with pytest.raises(InputError, match="unknown metric 'bleu'; known are accuracy, f1, mae"):
        get_metric("bleu")


def test_the_interval_of_a_macro_f1_is_that_of_resampled_users():
    labels = get_task("testbed-tag").labels
    rng = np.random.default_rng(5)
    users = np.repeat(np.arange(25), 8)
    gold = rng.choice(labels[:4], len(users))
    said = np.where(rng.random(len(users)) < 0.6, gold, rng.choice(labels[:4], len(users)))
    metric = get_metric("f1")
    parts = metric.parts_of(examples("testbed-tag", gold.tolist()), said.tolist())
    found = stats.bootstrap_statistic(parts, users, metric.combine)
    by_user = [np.flatnonzero(users == user) for user in range(25)]
    values = []
    for _ in range(400):
        rows = np.concatenate([by_user[user] for user in rng.integers(0, 25, 25)])
        values.append(
            f1_score(gold[rows], said[rows], labels=labels, average="macro", zero_division=0)
        )
    low, high = np.quantile(values, [0.025, 0.975])
    # A 2.5 % quantile of 400 draws has a standard error of about .13 of their spread.
    slack = 4 * 0.15 * np.std(values)
    assert found.low == pytest.approx(low, abs=slack)
    assert found.high == pytest.approx(high, abs=slack)
    assert found.mean == pytest.approx(metrics.macro_f1(parts.sum(axis=0), np.array(200.0)))


# Qualities of texts


def test_distinct_n_worked_by_hand():
    # a b a b | B c: 6 words, 3 distinct; bigrams ab ba ab | bc, 3 of 4 distinct.
    texts = ["a b  a b", "B c"]
    assert text.distinct_n(texts, 1) == pytest.approx(3 / 6)
    assert text.distinct_n(texts, 2) == pytest.approx(3 / 4)
    assert text.distinct_n(["a b", "a b"], 2) == pytest.approx(1 / 2)  # over texts, not within


def test_no_ngrams_have_no_share():
    assert np.isnan(text.distinct_n(["one", ""], 2))
    assert np.isnan(text.distinct_n([], 1))
    assert np.isnan(text.share(np.array([0.0, 0.0]), np.array(2.0)))


def test_distinct_parts_pool_within_texts():
    parts = text.distinct_parts(["a b a b", "a b", "a", ""], 1)
    np.testing.assert_array_equal(parts, [[2, 4], [2, 2], [1, 1], [0, 0]])
    found = stats.bootstrap_statistic(parts, list("uvwx"), text.share)
    assert found.mean == pytest.approx(5 / 7)
    assert text.distinct_parts([], 1).shape == (0, 2)


def test_repetition_counts_what_stood_before():
    # Five 4-grams: abcd, bcda, cdab, dabc, and abcd again.
    assert text.repetition("a b c d a b c D") == pytest.approx(1 / 5)
    assert text.repetition("a b c d") == text.repetition("a b c") == text.repetition("") == 0.0
    assert text.repetition("no no no", n=1) == pytest.approx(2 / 3)


def test_an_ngram_of_no_words_is_refused():
    with pytest.raises(ValueError, match="1 word or more, got n = 0"):
        text.repetition("a b", n=0)
