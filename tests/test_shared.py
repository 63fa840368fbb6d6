"""A shared prefill, held against two models that go on from copies of one plain cache."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES, SLIDING, write_model
from loops import bare_prompts_of, behind, check_answer, prompts_of, without
from plain import plain_copy

import workbench as wb
from workbench.errors import InputError
from workbench.heads import Head, HeadSet, all_heads
from workbench.models import heads_per_layer, load_model
from workbench.steering.contrast import CAD, DPS, Ablated, DeCoRe, Entropy
from workbench.steering.decode import generate
from workbench.steering.engines import open_engine
from workbench.steering.layout import Layout
from workbench.steering.loop import end_tokens

NEW = 6
SHARES = ("llama", "gpt2", "qwen2", "qwen3", "opt", "phi", "gpt_neox", "gpt_neox_sequential")
SHARES += ("mixtral", "olmo2", "granite", "falcon")
HEADS = HeadSet((Head(1, 1), Head(1, 3), Head(2, 2)))
LOW = HeadSet((Head(0, 0),))


@pytest.fixture(scope="module")
def rows():
    """Seven examples with histories of 0 to 3 items."""
    examples = [e for e in wb.load_examples("testbed", "validation", users=7) if "q0" in e.id]
    return [replace(e, profile=e.profile[: n % 4]) for n, e in enumerate(examples[:7])]


def contrasts(shape):
    """A contrast a row; the second shares no view with the others, the fourth has two."""
    return [
        DPS(HEADS, 0.7),
        None,
        DPS(LOW, 1.3) + CAD(0.4),
        DPS(HEADS, 0.5) + DeCoRe(LOW, Entropy(0.2)),
        Ablated(HeadSet((max(all_heads(shape)),))),
        DPS(HeadSet(tuple(all_heads(shape))), 0.3),
        CAD(1.0),
    ]


def going_on(twin, heads, shape, prompt, new):
    """Plain cache of all but the prompt's last token; from it, token by token without the heads."""
    past = twin(torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
    past, steps = deepcopy(past), []
    with without(twin, heads, shape):
        for token in (prompt[-1], *new):
            out = twin(torch.tensor([[token]]), past_key_values=past, use_cache=True)
            past = out.past_key_values
            steps.append(out.logits[0, -1])
    return torch.stack(steps)


def joined(twin, shape, contrast, prompt, bare, new):
    """The contrasted and the plain logits of every step."""
    full = behind(twin, prompt, new)
    total = full.clone()
    for part in getattr(contrast, "parts", (contrast,)) if contrast else ():
        if isinstance(part, CAD):
            view = behind(twin, bare, new)
        else:
            view = going_on(twin, part.heads, shape, prompt, new)
        if isinstance(part, Ablated):
            return view, full
        gamma = part.gamma
        if isinstance(gamma, Entropy):
            entropy = torch.distributions.Categorical(logits=full).entropy()
            gamma = gamma.factor * entropy[:, None]
        total += gamma * (full - view)
    return total, full


@torch.inference_mode()
@pytest.mark.parametrize("kind", SHARES)
def test_shared_prefill_equals_two_models_behind_one_plain_cache(
    tiny_model, rows, kind, monkeypatch
):
    model = tiny_model(kind)
    shape, twin, chosen = (
        heads_per_layer(model),
        plain_copy(model),
        contrasts(heads_per_layer(model)),
    )
    first = generate(model, rows, chosen, max_new_tokens=NEW, prefill="shared")
    ends = [token for row in (0, 4, 6) for token in first[row].tokens[1:4:2]]
    monkeypatch.setattr(model.original_model.generation_config, "eos_token_id", ends, raising=False)
    answers = generate(model, rows, chosen, max_new_tokens=NEW, prefill="shared")
    assert any(answer.finished for answer in answers)
    both = zip(prompts_of(model, rows, NEW), bare_prompts_of(model, rows, NEW), strict=True)
    for (prompt, bare), contrast, answer in zip(both, chosen, answers, strict=True):
        logits = joined(twin, shape, contrast, prompt.ids, bare.ids, answer.tokens)
        check_answer(answer, *logits, end_tokens(model))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_can_not_share_a_prefill_says_why(tiny_model, rows, kind, listing):
    model = tiny_model(kind)
    try:
        generate(model, rows, DPS(HeadSet((Head(2, 2),))), max_new_tokens=2, prefill="shared")
    except InputError as error:
        assert kind not in SHARES
        assert 'prefill="shared" can\'t be used: ' in str(error)
        assert str(error).endswith('; take "masked"')
        assert "Error: " not in str(error), "a reason, not what Python says of it"
        listing("No shared prefill", f"{kind}: {str(error)[:120]}")
    else:
        assert kind in SHARES


@torch.inference_mode()
@pytest.mark.parametrize("config", ["MistralConfig", "Gemma2Config"])
def test_a_window_longer_than_the_prompts_does_no_harm(tmp_path, rows, config, monkeypatch):
    import transformers as hf

    options = SLIDING | {"sliding_window": 200}

    def build(vocab_size):
        configured = getattr(hf, config)(vocab_size=vocab_size, **options)
        return hf.AutoModelForCausalLM.from_config(configured)

    monkeypatch.setitem(ARCHITECTURES, "windowed", build)
    write_model("windowed", tmp_path)
    model = load_model(tmp_path, device="cpu")
    twin, shape = plain_copy(model), heads_per_layer(model)
    answers = generate(model, rows, DPS(HEADS, 0.7), max_new_tokens=NEW, prefill="shared")
    for prompt, answer in zip(prompts_of(model, rows, NEW), answers, strict=True):
        logits = joined(twin, shape, DPS(HEADS, 0.7), prompt.ids, (), answer.tokens)
        check_answer(answer, *logits, end_tokens(model))


@pytest.mark.parametrize("contrast", [None, CAD(0.5), DPS(HEADS, 0.0)])
def test_without_gated_views_there_is_nothing_to_share(tiny_model, rows, contrast):
    model = tiny_model("bloom")
    shared = generate(model, rows, contrast, max_new_tokens=3, prefill="shared")
    assert shared == generate(model, rows, contrast, max_new_tokens=3)


def test_masked_and_shared_are_two_methods(testbed_model, tiny_model, rows):
    for model in (testbed_model, tiny_model("llama")):
        masked, shared = (
            generate(model, rows, DPS(HEADS, 2.0), max_new_tokens=NEW, prefill=prefill)
            for prefill in ("masked", "shared")
        )
        apart = [abs(a.kl[0] - b.kl[0]) for a, b in zip(masked, shared, strict=True)]
        assert max(apart) > 1e-3
    assert [a.tokens for a in masked] != [a.tokens for a in shared]


def test_a_prompt_is_stored_once_for_both_views(tiny_model, rows):
    model = tiny_model("llama")
    shape, sizes = heads_per_layer(model), {}
    prompts = [prompt.ids for prompt in prompts_of(model, rows, NEW)]
    layout = Layout.of([DPS(HEADS)] * len(rows), shape)
    for prefill in ("masked", "shared"):
        session = open_engine(model).session(prompts, layout, NEW, prefill)
        with torch.inference_mode():
            session.start()
        sizes[prefill] = [tuple(layer.keys.shape[::2]) for layer in session.cache.layers]
    width = max(map(len, prompts))
    # Rows and columns: below the lowest gated head (block 1) both ways hold a row an example.
    assert sizes["masked"] == [(7, width), (14, width), (14, width)]
    assert sizes["shared"] == [(7, width), (7, width + 1), (7, width + 1)]


def test_a_prompt_of_one_token_has_nothing_to_share(testbed_model):
    layout = Layout.of([DPS(HEADS)], heads_per_layer(testbed_model))
    with pytest.raises(InputError, match="a prompt is a single token"):
        open_engine(testbed_model).session([[5]], layout, NEW, "shared")


def test_an_unknown_prefill_is_refused(testbed_model, rows):
    with pytest.raises(InputError, match="prefill must be masked or shared, got 'copied'"):
        generate(testbed_model, rows, DPS(HEADS), prefill="copied")
