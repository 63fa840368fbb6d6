"""Many answers at a time: prompts built once, batches as large as memory allows, and failures."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from plain import plain_copy
from tqdm.auto import tqdm

import workbench as wb
from workbench import runs
from workbench.data import prompts as building
from workbench.data.examples import Example
from workbench.data.prompts import PromptSettings, build_prompts
from workbench.data.tasks import TASKS, get_task
from workbench.errors import InputError
from workbench.evaluation import writing
from workbench.evaluation.methods import Candidate
from workbench.evaluation.writing import AnswerJob, Cell, Local, Piece, Writer
from workbench.heads import Head, HeadSet
from workbench.models import heads_per_layer
from workbench.steering import room
from workbench.steering.contrast import CAD, DPS, DoLa, NoProfile
from workbench.steering.decode import generate, stream
from workbench.steering.labels import decide
from workbench.steering.loop import Work
from workbench.steering.prompts import PromptCache
from workbench.steering.room import BatchTooLargeError, Room, cache_bytes

HEADS = HeadSet((Head(1, 1), Head(2, 2)))
TAG, HEADLINE = "testbed-tag", "testbed-headline"
JOB = AnswerJob(
    by_likelihood=False,
    prefill="masked",
    max_new_tokens=6,
    prompt=PromptSettings(),
    batch_tokens=None,
)


def of_task(task, count=4):
    found = [e for e in wb.load_examples("testbed", "validation", users=8) if e.task == task]
    assert len(found) >= count
    return found[:count]


@pytest.fixture(scope="module")
def headlines():
    return of_task(HEADLINE)


@pytest.fixture
def built(monkeypatch):
    """How often a prompt was built: by name, with or without a profile, and target."""
    counts = Counter()
    real = building._Builder.build

    def build(self, example, context, new_tokens):
        counts[example.name, bool(example.profile), example.target] += 1
        return real(self, example, context, new_tokens)

    monkeypatch.setattr(building._Builder, "build", build)
    return counts


def pieces(examples, contrasts):
    return [Piece(n, f"cell-{n}", examples, contrast) for n, contrast in enumerate(contrasts)]


def answered(worker, asked):
    return [table.to_pylist() for _, table in worker(asked, lambda count: None)]


# Prompts


def test_an_evaluation_builds_an_example_once_with_and_once_without_its_profile(
    testbed_model, headlines, built
):
    contrasts = [None, CAD(0.5), DPS(HEADS, 1.0) + CAD(1.0), NoProfile()]
    found = answered(Local(testbed_model, JOB), pieces(headlines, contrasts))
    assert built == {(e.name, shown, e.target): 1 for e in headlines for shown in (True, False)}
    expected = [
        [writing.written(a) for a in generate(testbed_model, headlines, one, max_new_tokens=6)]
        for one in contrasts
    ]
    assert found == expected
    assert len({str(rows) for rows in found}) == len(contrasts)


def test_labels_are_spelled_once_a_task(testbed_model, built):
    tags = of_task(TAG)
    job, contrasts = replace(JOB, by_likelihood=True), [None, DPS(HEADS, 1.0)]
    shards = [
        Piece(2 * n + m, f"cell-{n}", part, contrast)
        for n, contrast in enumerate(contrasts)
        for m, part in enumerate((tags[:2], tags[2:]))
    ]
    rows = answered(Local(testbed_model, job), shards)
    spelled = {label: built.pop((tags[0].name, True, label)) for label in get_task(TAG).labels}
    assert spelled.pop(tags[0].target) == 2  # with room for a label's tokens, and as a prompt
    assert set(spelled.values()) == {1}
    assert built == {(e.name, True, e.target): 1 for e in tags[1:]}
    for piece, found in zip(shards, rows, strict=True):
        apart = decide(testbed_model, piece.examples, piece.contrast)
        assert found == [writing.decided(one) for one in apart]


def test_a_kept_prompt_is_what_would_be_built(tiny_model, headlines):
    model = tiny_model("llama")
    cut = PromptSettings(items=2, max_tokens=150)
    cache = PromptCache(model)
    much = model.cfg.n_ctx - 150  # so that less is left for the prompt
    for settings, new in ((None, 6), (None, much), (cut, 6), (cut, 40)):
        expected = build_prompts(headlines, model.tokenizer, model.cfg.n_ctx, settings, new)
        for _ in range(2):
            assert cache.build(headlines, settings, new) == expected
    assert any(prompt.cut_tokens for prompt in expected)


def test_another_profile_under_the_same_name_is_another_prompt(testbed_model, headlines, built):
    one = headlines[0]
    other = next(e for e in of_task(HEADLINE, 8) if e.user != one.user)
    swapped = replace(one, profile=other.profile)
    cache = PromptCache(testbed_model)
    options = {"max_new_tokens": 2, "prompts": cache}
    generate(testbed_model, [one], **options)
    generate(testbed_model, [swapped], **options)
    list(stream(testbed_model, swapped, **options))
    assert built[one.name, True, one.target] == 2
    both = cache.build([one, swapped], None, 2)
    assert both[0].ids != both[1].ids
    tokenizer, context = testbed_model.tokenizer, testbed_model.cfg.n_ctx
    assert both == build_prompts([one, swapped], tokenizer, context, None, 2)


def test_prompts_of_another_model_are_refused(testbed_model, tiny_model, headlines):
    with pytest.raises(InputError, match="kept for another model"):
        generate(tiny_model("llama"), headlines, prompts=PromptCache(testbed_model))


# Batches


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "falcon", "gemma2", "lfm2"])
def test_the_cache_takes_what_the_keys_and_values_of_a_forward_pass_take(tiny_model, kind):
    model, tokens = tiny_model(kind), torch.tensor([[5, 6, 7, 8, 9]])
    cache = plain_copy(model)(tokens, use_cache=True).past_key_values
    kept = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    held = sum(t.numel() * t.element_size() for t in kept if t is not None)
    assert held == tokens.numel() * cache_bytes(model, heads_per_layer(model)) > 0


def test_batches_follow_the_memory_at_hand(tiny_model, headlines, monkeypatch):
    model = tiny_model("llama")
    answers, rows = [], []
    begin = Work.begin
    monkeypatch.setattr(Work, "begin", lambda w, at, *a: rows.append(len(at)) or begin(w, at, *a))
    work, size = Work(model, headlines, None, 3, None), Room.of(model, heads_per_layer(model))
    width = max(len(prompt.ids) for prompt in work.prompts) + 3
    two = 2.5 * (width * size.token + size.reading) / room.SHARE
    for free, expected in ((2**40, [4]), (two, [2, 2]), (1, [1, 1, 1, 1])):
        rows.clear()
        monkeypatch.setattr(room, "free_memory", lambda device, free=free: free)
        answers.append(generate(model, headlines, max_new_tokens=3))
        assert rows == expected
    tokens = [[answer.tokens for answer in found] for found in answers]
    assert tokens[0] == tokens[1] == tokens[2]


def test_a_batch_holds_no_more_than_the_bytes_it_may_take():
    # By hand: 6 rows of 10 tokens at 3 bytes, and 8 readings at 5 bytes, are 220 bytes.
    assert Room(60, memory=220, token=3, reading=5).holds(6, 10, 8)
    assert not Room(60, memory=219, token=3, reading=5).holds(6, 10, 8)
    assert not Room(59, memory=220, token=3, reading=5).holds(6, 10, 8)


def test_a_large_memory_does_not_make_batches_without_end(testbed_model, monkeypatch):
    monkeypatch.setattr(room, "free_memory", lambda device: 2**50)
    assert Room.of(testbed_model, heads_per_layer(testbed_model)).most == 16384


def test_early_layers_that_are_read_out_count(testbed_model, headlines, monkeypatch):
    shape = heads_per_layer(testbed_model)
    own = Room.of(testbed_model, shape)
    sizes = {}
    for one in (None, DoLa("low")):
        work = Work(testbed_model, headlines, one, 4, None)
        width = max(len(prompt.ids) for prompt in work.prompts) + 4
        fits = replace(own, memory=4 * (width * own.token + own.reading))  # of plain rows
        monkeypatch.setattr(Room, "of", lambda model, shape, fits=fits: fits)
        sizes[one] = [len(batch.positions) for batch in work.batches()]
    assert sizes[None] == [4]
    assert len(sizes[DoLa("low")]) > 1


MOVIES = [
    Example(f"m{n}", f"u{n}", "LaMP-2", f"description: a film {n}", "x", ()) for n in range(6)
]


@pytest.mark.parametrize(
    ("labels", "rows"),
    [
        (("a", "b", "x"), 1),  # nothing goes on
        (("a", "b", "x", "yes", "yet"), 1),  # one beginning, then one again
        (("ab", "cd", "x", "efg"), 3),
        (("abc", "abd", "ace", "x"), 2),  # one beginning, then two
    ],
)
def test_as_many_rows_are_kept_free_as_beginnings_of_labels_go_on(
    tiny_model, monkeypatch, labels, rows
):
    from workbench.steering.session import MaskedSession

    monkeypatch.setitem(TASKS, "LaMP-2", replace(get_task("LaMP-2"), labels=labels))
    model, sizes, steps = tiny_model("llama"), [], []
    begin, select = Work.begin, MaskedSession.select
    monkeypatch.setattr(Work, "begin", lambda w, at, *a: sizes.append(len(at)) or begin(w, at, *a))
    monkeypatch.setattr(
        MaskedSession, "select", lambda self, at: steps.append(len(at)) or select(self, at)
    )
    longest = max(map(len, labels))  # the tokenizer takes a byte for a token here
    widths = {len(p.ids) + longest for p in PromptCache(model).build(MOVIES, None, longest)}
    assert len(widths) == 1
    decide(model, MOVIES, batch_tokens=3 * rows * widths.pop())
    assert sizes == [3, 3]
    assert max(steps, default=3) == 3 * rows


# Memory that runs out


@pytest.fixture
def tight(monkeypatch):
    """Let batches of more than some tokens run out of memory; which were tried."""
    limit, tried = [], []
    begin = Work.begin

    def checked(work, positions, *arguments):
        session = begin(work, positions, *arguments)
        tokens = session.layout.rows * (session.width + session.room)
        tried.append(len(positions))
        if tokens > limit[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")
        return session

    monkeypatch.setattr(Work, "begin", checked)
    return limit, tried


@pytest.mark.parametrize("given", [None, 10**6, 1500])
@pytest.mark.parametrize("by_likelihood", [False, True])
def test_memory_that_runs_out_halves_the_batch_that_failed(
    testbed_model, tight, given, by_likelihood
):
    examples = of_task(TAG)
    limit, tried = tight
    limit.append(10**9)
    job = replace(JOB, batch_tokens=given, by_likelihood=by_likelihood)
    asked = pieces(examples, [None, DPS(HEADS, 1.0)])
    expected = answered(Local(testbed_model, replace(job, batch_tokens=10**6)), asked)
    work = Work(testbed_model, examples, None, 6, None)
    limit[0] = 3 * max(len(prompt.ids) + 6 for prompt in work.prompts)
    tried.clear()
    worker = Local(testbed_model, job)
    found = answered(worker, asked)
    assert tried[:3] == [4, 2, 2]  # no batch is tried twice
    assert worker.answer.batch_tokens <= limit[0]
    for one, other in zip(found, expected, strict=True):
        assert [row["text"] for row in one] == [row["text"] for row in other]


def test_an_example_that_does_not_fit_alone_is_named_with_the_remedy(
    testbed_model, headlines, tight
):
    limit, tried = tight
    limit.append(1)
    told = (
        rf"^{headlines[0].name}: out of memory with this example alone, [\d,]+ tokens in all its "
        "views: CUDA out of memory. Tried to allocate 2 GiB. Lower --max-prompt-tokens, or take a "
        "smaller --dtype"
    )
    with pytest.raises(InputError, match=told):
        generate(testbed_model, headlines[0])
    tried.clear()
    with pytest.raises(InputError, match="out of memory with this example alone"):
        answered(Local(testbed_model, JOB), pieces(headlines, [None]))
    assert tried == [4, 2, 1]


def test_several_examples_that_do_not_fit_say_how_many_tokens_they_were(
    testbed_model, headlines, tight
):
    tight[0].append(1)
    with pytest.raises(BatchTooLargeError, match=r"^CUDA out of memory") as caught:
        generate(testbed_model, headlines, max_new_tokens=5)
    work = Work(testbed_model, headlines, None, 5, None)
    assert caught.value.tokens == 4 * (max(len(prompt.ids) for prompt in work.prompts) + 5)


def test_errors_that_are_not_about_memory_pass(testbed_model, headlines, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(Work, "begin", fail)
    with pytest.raises(RuntimeError, match=r"^CUDA error: unspecified launch failure$"):
        answered(Local(testbed_model, JOB), pieces(headlines, [None]))


def test_memory_that_runs_out_before_there_is_a_batch_ends_it(
    testbed_model, headlines, monkeypatch
):
    def fail(*_, **__):
        raise MemoryError("no memory for the engine")

    monkeypatch.setattr(writing, "generate", fail)
    with pytest.raises(MemoryError, match="no memory for the engine"):
        answered(Local(testbed_model, JOB), pieces(headlines, [None]))


# Cells that fail


class Failing:
    """`generate`, with a contrast that can't be used for one example."""

    def __init__(self, name):
        self.name = name
        self.asked = []

    def __call__(self, model, examples, contrast, **options):
        self.asked.append((contrast, [e.id for e in examples]))
        if contrast is not None and any(e.name == self.name for e in examples):
            raise InputError(f"{self.name}: the logits hold NaN")
        return generate(model, examples, contrast, **options)


def test_after_a_failure_the_rest_of_its_cell_is_not_tried_and_a_resumed_run_says_why(
    testbed_model, monkeypatch, tmp_path
):
    examples = of_task(HEADLINE, 6)
    ids = [example.id for example in examples]
    contrast = DPS(HEADS, 1.0)
    cells = [
        Cell(f"answers/{HEADLINE}/dps-0", examples, Candidate("dps", contrast)),
        Cell(f"answers/{HEADLINE}/plain-0", examples, Candidate("plain", None)),
    ]
    failing = Failing(examples[2].name)
    monkeypatch.setattr(writing, "generate", failing)
    reason = {cells[0].stage: f"{examples[2].name}: the logits hold NaN"}
    plain = [(None, ids[:2]), (None, ids[2:4]), (None, ids[4:])]
    for tried in ([(contrast, ids[:2]), (contrast, ids[2:4]), *plain], [(contrast, ids[2:4])]):
        failing.asked.clear()
        with tqdm(disable=True) as bar, runs.stoppable() as stop:
            counted = []
            monkeypatch.setattr(bar, "update", counted.append)
            writer = Writer(tmp_path, 2, stop, bar)
            writer.write(Local(testbed_model, JOB), cells)
        assert failing.asked == tried
        assert writer.failed == reason
        assert sum(counted) == 12
        assert writer.texts(cells[0]) is None
        assert len(runs.shards(tmp_path, cells[0].stage)) == 1
        assert len(writer.texts(cells[1])) == 6


def test_a_run_that_is_resumed_where_nothing_fails_any_more_completes_the_cell(
    testbed_model, monkeypatch, tmp_path
):
    examples = of_task(HEADLINE, 4)
    cell = Cell(f"answers/{HEADLINE}/dps-0", examples, Candidate("dps", DPS(HEADS, 1.0)))
    for name, texts in ((examples[0].name, None), ("nobody", 4)):
        monkeypatch.setattr(writing, "generate", Failing(name))
        with tqdm(disable=True) as bar, runs.stoppable() as stop:
            writer = Writer(tmp_path, 2, stop, bar)
            writer.write(Local(testbed_model, JOB), [cell])
        found = writer.texts(cell)
        assert (None if found is None else len(found)) == texts
