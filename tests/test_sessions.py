"""Batches as they are run: rows that leave, blocks computed once, engines chosen, nothing left."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from loops import behind, check_answer, gated, prompts_of
from plain import plain_copy

import workbench as wb
from workbench.errors import InputError
from workbench.heads import Head, HeadSet, all_heads
from workbench.models import heads_per_layer
from workbench.steering.contrast import CAD, DPS, Ablated, DeCoRe, DoLa, Entropy, NoProfile
from workbench.steering.decode import generate, stream
from workbench.steering.engines import HELD, HookedSession, open_engine
from workbench.steering.layout import Layout
from workbench.steering.loop import Sampling, end_tokens
from workbench.steering.native import Native
from workbench.steering.session import MaskedSession

NEW = 8
HEADS = HeadSet((Head(1, 1), Head(2, 2)))
LOW = HeadSet((Head(0, 0),))
# Of log-probabilities: rows of one batch and a batch of one sum in another order.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def rows():
    """Ten examples with histories of 0 to 3 items."""
    examples = [e for e in wb.load_examples("testbed", "validation", users=10) if "q0" in e.id]
    return [replace(e, profile=e.profile[: n % 4]) for n, e in enumerate(examples[:10])]


@pytest.fixture
def llama(tmp_path):
    """A model of one's own, to be changed."""
    from architectures import write_model

    from workbench.models import load_model

    write_model("llama", tmp_path)
    return load_model(tmp_path, device="cpu")


def tokens(answers):
    return [answer.tokens for answer in answers]


def end_at(monkeypatch, model, answers):
    """Let tokens that were written end texts, at the second, the third and later steps."""
    picked = (1, 1), (2, 1), (3, 2), (5, 3), (7, 4), (8, 5)
    ends = [token for row, step in picked for token in answers[row].tokens[step : step + 1]]
    monkeypatch.setattr(model.original_model.generation_config, "eos_token_id", ends, raising=False)


def mixed():
    """Contrasts of ten rows, some of them two views, another prompt, or none."""
    two = DPS(HEADS, 0.5) + DeCoRe(LOW, Entropy(0.2)) + CAD(0.3)
    return [DPS(HEADS), None, CAD(1.0), two, DPS(LOW), None, Ablated(HEADS), NoProfile(), two, None]


@pytest.mark.parametrize("prefill", ["masked", "shared"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rows_that_end_at_different_steps_are_those_of_each_alone(
    tiny_model, rows, kind, prefill, monkeypatch
):
    model, contrasts = tiny_model(kind), mixed()
    first = generate(model, rows, contrasts, max_new_tokens=NEW, prefill=prefill)
    end_at(monkeypatch, model, first)
    sizes = []
    take = Layout.select
    monkeypatch.setattr(
        Layout, "select", lambda self, rows: sizes.append(len(rows)) or take(self, rows)
    )
    together = generate(model, rows, contrasts, max_new_tokens=NEW, prefill=prefill)
    assert len(set(sizes)) > 1, "rows must leave more than once"
    assert len({len(answer.tokens) for answer in together}) > 2
    for row, contrast, answer in zip(rows, contrasts, together, strict=True):
        alone = generate(model, row, contrast, max_new_tokens=NEW, prefill=prefill)
        assert (answer.tokens, answer.finished) == (alone.tokens, alone.finished)
        assert answer.logprobs == pytest.approx(alone.logprobs, abs=ROUNDING)
        assert answer.kl == pytest.approx(alone.kl, abs=ROUNDING)


def test_repeated_examples_get_the_same_text(tiny_model, rows):
    model = tiny_model("llama")
    many = [rows[2]] * 5 + [rows[1]]
    answers = generate(model, many, DPS(HEADS), max_new_tokens=4)
    assert len(set(tokens(answers[:5]))) == 1
    assert generate(model, [], DPS(HEADS)) == []


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "jamba", "gemma2"])
def test_prompts_of_a_single_token_and_a_long_one_share_a_batch(tiny_model, kind):
    model = tiny_model(kind)
    shape, twin = heads_per_layer(model), plain_copy(model)
    heads = HeadSet((max(all_heads(shape)),))
    prompts = [(5,), tuple(range(10, 50)), (7,), (9, 8)]
    layout = Layout.of([DPS(heads, 1.0)] * 4, shape)
    for count in (4, 1):
        part = layout.select(range(count))[0]
        session = open_engine(model).session(prompts[:count], part, 3)
        views = session.start()
        new = [[] for _ in range(count)]
        for _ in range(3):
            for row in range(count):
                full = behind(twin, prompts[row], new[row])[-1]
                view = gated(twin, heads, shape, prompts[row], new[row])[-1]
                for found, wanted in ((views.full[row], full), (views.gated[row], view)):
                    torch.testing.assert_close(found, wanted, atol=ROUNDING, rtol=0)
                new[row].append(int(full.argmax()))
            views = session.step(torch.tensor([ids[-1] for ids in new]))


@pytest.mark.parametrize(
    ("heads", "wide"), [(HeadSet((Head(2, 0),)), 2), (HEADS, 1), (LOW, 0), (None, 3)]
)
@pytest.mark.parametrize("prefill", ["masked", "shared"])
def test_blocks_below_the_lowest_gated_head_run_a_row_an_example(
    tiny_model, rows, heads, wide, prefill
):
    model = tiny_model("llama")
    native = open_engine(model).native
    work = []
    hooks = [
        place.block.mlp.register_forward_hook(
            lambda _, args, out, layer=layer: work.append((layer, *args[0].shape[:2]))
        )
        for layer, place in enumerate(native.places)
    ]
    contrast = DPS(heads) if heads is not None else None
    try:
        generate(model, rows, contrast, max_new_tokens=3, prefill=prefill)
    finally:
        for hook in hooks:
            hook.remove()
    steps = [(layer, n * columns) for layer, n, columns in work if n * columns <= 2 * len(rows)]
    count = len(rows)
    assert {layer for layer, n in steps if n == 2 * count} == set(range(wide, 3))
    assert {layer for layer, n in steps if n == count} == set(range(wide))
    if prefill == "masked":
        prompts = [(layer, n) for layer, n, columns in work if columns > 1]
        assert prompts == [(layer, count * (1 + (layer >= wide))) for layer in range(3)]
    elif heads is not None:
        prompts = [(layer, n) for layer, n, columns in work if columns > 2]
        assert prompts == [(layer, count) for layer in range(3)]


@pytest.mark.parametrize("prefill", ["masked", "shared"])
def test_nothing_is_deep_copied(tiny_model, rows, prefill, monkeypatch):
    model = tiny_model("llama")
    generate(model, rows, DPS(HEADS), max_new_tokens=1, prefill=prefill)  # the engine is made

    def refuse(*args):
        raise AssertionError("a copy was made")

    monkeypatch.setattr(copy, "deepcopy", refuse)
    contrasts = [DPS(HEADS) + CAD(0.1)] * len(rows)
    generate(model, rows, contrasts, max_new_tokens=NEW, prefill=prefill)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_nothing_is_left_on_the_model(tiny_model, rows, kind, monkeypatch):
    model = tiny_model(kind)
    ids = torch.tensor([list(range(3, 40))])

    def forwards():
        return model(ids, return_type="logits"), model.original_model(ids).logits

    before = forwards()
    contrasts = [DPS(HEADS) + CAD(0.5) + DoLa((1,)), None] * 5
    generate(model, rows, contrasts, max_new_tokens=3)
    native = open_engine(model).native
    for found, wanted in zip(forwards(), before, strict=True):
        assert torch.equal(found, wanted)
    calls = []

    def fail(self, chosen):
        calls.append(1)
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(MaskedSession, "step", fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            generate(model, rows, contrasts, max_new_tokens=3)
    assert calls
    assert open_engine(model).native is native
    handle = native.places[1].block.register_forward_hook(fail_hook)
    with pytest.raises(RuntimeError, match="in a block"):
        generate(model, rows, contrasts, max_new_tokens=3)
    handle.remove()
    for found, wanted in zip(forwards(), before, strict=True):
        assert torch.equal(found, wanted)
    fresh = plain_copy(model)(ids).logits
    inner = native.twin(ids).logits  # the twin runs as the plain model when no views are asked for
    torch.testing.assert_close(inner, fresh, atol=ROUNDING, rtol=0)


def fail_hook(*_):
    raise RuntimeError("in a block")


def test_two_streams_at_once_do_not_mix(tiny_model, rows):
    model = tiny_model("llama")
    contrasts = DPS(HEADS, 1.0), DPS(LOW, 1.0) + CAD(0.3)
    pair = [stream(model, rows[n], contrasts[n], max_new_tokens=NEW) for n in (0, 1)]
    woven = list(zip(*pair, strict=True))
    for n in (0, 1):
        alone = generate(model, rows[n], contrasts[n], max_new_tokens=NEW)
        assert tuple(steps[n].token for steps in woven) == alone.tokens


@torch.inference_mode()
def test_a_model_that_is_changed_is_seen_by_the_next_call(llama, rows):
    twin, shape = plain_copy(llama), heads_per_layer(llama)
    name = "layers.1.mlp.down_proj.weight"
    (path,) = [p for p, _ in llama.original_model.named_parameters() if strip(p).endswith(name)]

    def check():
        (answer,) = generate(llama, rows[3:4], DPS(HEADS, 0.7), max_new_tokens=NEW)
        prompt = prompts_of(llama, rows[3:4], NEW)[0].ids
        full = behind(twin, prompt, answer.tokens)
        view = gated(twin, HEADS, shape, prompt, answer.tokens)
        check_answer(answer, full + 0.7 * (full - view), full, end_tokens(llama))
        return answer

    first = check()
    native = open_engine(llama).native
    weight = llama.original_model.get_parameter(path)
    weight.mul_(3.0)  # in place
    twin.get_parameter(f"model.{name}").mul_(3.0)
    second = check()
    assert second.logprobs != first.logprobs
    assert open_engine(llama).native is native, "the same tensors need no new modules"
    owner, _, last = path.rpartition(".")
    module = llama.original_model.get_submodule(owner)
    setattr(module, last, torch.nn.Parameter(weight * -1.0))  # another tensor
    twin.get_parameter(f"model.{name}").mul_(-1.0)
    assert check().logprobs != second.logprobs
    assert open_engine(llama).native is not native


@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "gpt_neox", "phi3", "falcon", "granitemoehybrid"]
)
def test_modules_are_made_once_for_all_calls(tiny_model, kind):
    # The bridge keeps parameters of its own where one projection makes queries, keys and values.
    model = tiny_model(kind)
    engine = open_engine(model)
    assert open_engine(model) is engine


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "bloom"])
def test_a_part_of_a_fused_projection_that_is_changed_is_seen(tmp_path, rows, kind):
    from architectures import write_model

    from workbench.models import load_model

    write_model(kind, tmp_path)
    model = load_model(tmp_path, device="cpu")
    ids = torch.tensor([prompts_of(model, rows[3:4], NEW)[0].ids])

    def first():
        answer = generate(model, rows[3], max_new_tokens=1)
        with torch.inference_mode():  # the bridge itself is the other route
            wanted = model(ids, return_type="logits")[0, -1].log_softmax(-1)
        assert answer.logprobs[0] == pytest.approx(float(wanted[answer.tokens[0]]), abs=ROUNDING)
        return answer.logprobs

    before = first()
    parts = dict(model.original_model.named_parameters())
    (query,) = [
        t
        for name, t in parts.items()
        if ".1." in name and name.endswith("q._original_component.weight")
    ]
    with torch.no_grad():
        query.mul_(-4.0)
    assert first() != before


def strip(path):
    return path.replace("._original_component", "")


def noise(run):
    def wrong(self, now, keep, **inputs):
        return torch.randn_like(run(self, now, keep, **inputs))

    return wrong


def test_modules_that_are_wrong_are_passed_over(llama, rows, monkeypatch, capsys, tiny_model):
    contrasts = mixed()
    right = generate(tiny_model("llama"), rows, contrasts, max_new_tokens=NEW)
    end_at(monkeypatch, llama, right)
    end_at(monkeypatch, tiny_model("llama"), right)
    right = generate(tiny_model("llama"), rows, contrasts, max_new_tokens=NEW)
    assert any(answer.finished for answer in right)
    capsys.readouterr()
    monkeypatch.setattr(Native, "run", noise(Native.run))
    found = generate(llama, rows, contrasts, max_new_tokens=NEW)
    said = capsys.readouterr().err
    assert "decoding through the bridge's hooks, several times slower" in said
    assert said.count("log-probabilities are off by") == 4
    engine = open_engine(llama)
    assert engine.native is None
    assert isinstance(
        engine.session([(5, 6)], Layout.of([None], heads_per_layer(llama)), 1), HookedSession
    )
    assert tokens(found) == tokens(right)
    for one, other in zip(found, right, strict=True):
        assert one.kl == pytest.approx(other.kl, abs=ROUNDING)
    for what, options in (("DoLa", {}), ('prefill="shared"', {"prefill": "shared"})):
        contrast = DoLa((1,)) if what == "DoLa" else DPS(HEADS)
        with pytest.raises(InputError, match=f"{what} needs the model's own modules.*off by"):
            generate(llama, rows, contrast, **options)
    plain = generate(llama, rows, None, max_new_tokens=2, prefill="shared")
    assert tokens(plain) == tokens(generate(llama, rows, None, max_new_tokens=2))


def test_a_failing_layout_is_passed_over(llama, rows, monkeypatch):
    def fail(*_, **__):
        raise IndexError("")

    monkeypatch.setattr(Native, "run", fail)
    right = generate(llama, rows, CAD(0.5), max_new_tokens=2)
    assert llama.__dict__[HELD].native is None
    assert len(right) == len(rows)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_half_precision_decodes_as_its_own_uncached_model(tmp_path, rows, kind, dtype):
    from architectures import write_model
    from transformers import AutoModelForCausalLM

    from workbench.models import load_model

    write_model(kind, tmp_path)
    model = load_model(tmp_path, device="cpu", dtype=dtype)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype)).eval()
    shape = heads_per_layer(model)
    for prefill in ("masked", "shared"):
        answers = generate(model, rows[:4], DPS(HEADS, 0.5), max_new_tokens=4, prefill=prefill)
        for prompt, answer in zip(prompts_of(model, rows[:4], 4), answers, strict=True):
            full = behind(twin, prompt.ids, answer.tokens)
            wanted = full.log_softmax(-1)[range(len(answer.tokens)), answer.tokens]
            # Sums of a few hundred products of 8 bits (bfloat16) or 11, in another order.
            torch.testing.assert_close(
                torch.tensor(answer.logprobs[: len(wanted)]),
                wanted,
                atol=0.3 if dtype == "bfloat16" else 0.05,
                rtol=0,
            )
    assert open_engine(model).native is not None
    assert shape == (4, 4, 4)
    assert generate(model, rows[:2], DoLa((1,)), max_new_tokens=2)


@pytest.mark.parametrize("name", ["full", "others", "gated", "early"])
def test_nan_in_one_view_names_its_example(tiny_model, rows, name, monkeypatch):
    model = tiny_model("llama")
    contrasts = [None, DPS(HEADS), CAD(0.5) + DPS(LOW) + DPS(HEADS), DoLa((1,))]
    start = MaskedSession.start

    open_engine(model)  # which looks at views of its own

    def spoilt(self):
        views = start(self)
        if not self.layout.others:  # the part of a batch that is read by itself
            return views
        row = {"full": 2, "others": 0, "gated": 2, "early": 3}[name]
        getattr(views, name)[row, ..., 7] = torch.nan
        return views

    asked = sorted(rows[:4], key=lambda e: len(prompts_of(model, [e], 32)[0].ids))
    wrong = asked[3 if name == "early" else 2].name
    monkeypatch.setattr(MaskedSession, "start", spoilt)
    with pytest.raises(InputError, match=f"^{wrong}: the logits hold NaN"):
        generate(model, asked, contrasts)


def test_sampling_that_is_none_is_refused():
    for temperature in (float("nan"), float("inf"), -0.1):
        with pytest.raises(InputError, match="temperature must be >= 0"):
            Sampling(temperature=temperature)


def test_layers_outside_the_model_are_refused_before_any_work(testbed_model, rows, monkeypatch):
    monkeypatch.delattr(MaskedSession, "start")
    with pytest.raises(InputError, match="wanted layers between 0 and 3, got 9"):
        generate(testbed_model, rows, DoLa((1, 9)))
    with pytest.raises(InputError, match="L9H0 is not a head of this model"):
        generate(testbed_model, rows, CAD(0.1) + DPS(HeadSet((Head(9, 0),))))


@pytest.mark.parametrize("prefill", ["masked", "shared"])
def test_prompts_without_a_profile_are_read_by_themselves(testbed_model, monkeypatch, prefill):
    asked = [e for e in wb.load_examples("testbed", "validation", users=6) if "q0" in e.id]
    contrasts = [CAD(1.0), DPS(HEADS, 1.0) + CAD(0.5), None, NoProfile()] * 5
    contrasts = contrasts[: len(asked)]
    generate(testbed_model, asked[:2], contrasts[:2], max_new_tokens=1, prefill=prefill)
    read = []
    run = Native.run
    monkeypatch.setattr(
        Native,
        "run",
        lambda self, now, keep, **inputs: (
            read.append(tuple(inputs["input_ids"].shape)) or run(self, now, keep, **inputs)
        ),
    )
    answers = generate(testbed_model, asked, contrasts, max_new_tokens=NEW, prefill=prefill)
    others = sum(contrast is not None for contrast in contrasts)
    (count, long), (rows, short) = read[:2]
    assert (count, rows) == (len(asked), others)
    assert short < long / 2, "or there was nothing to spare"
    # The layer knows no pass of its own: everything in one batch, padded.
    monkeypatch.setattr("workbench.steering.session.WORTH", 2.0)
    read.clear()
    together = generate(testbed_model, asked, contrasts, max_new_tokens=NEW, prefill=prefill)
    assert read[0] == (len(asked) + others, long)
    assert tokens(answers) == tokens(together)
    for one, other in zip(answers, together, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=ROUNDING)
        assert one.kl == pytest.approx(other.kl, abs=ROUNDING)
    assert max(max(answer.kl) for answer in answers) > 0.01
