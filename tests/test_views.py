"""Another prompt and earlier layers as second views, alone and in sums, against plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loops import bare_prompts_of, behind, check_answer, gated, prompts_of
from plain import plain_copy
from torch.nn.functional import kl_div

import workbench as wb
from workbench.heads import Head, HeadSet
from workbench.models import heads_per_layer
from workbench.steering.contrast import CAD, DPS, Ablated, DeCoRe, DoLa, Entropy, NoProfile
from workbench.steering.decode import generate
from workbench.steering.loop import end_tokens

NEW = 6
HEADS = HeadSet((Head(1, 1), Head(1, 3), Head(2, 2)))
KINDS = ("llama", "gpt2", "gpt_neox", "gemma2", "opt", "olmo2", "bloom", "granite")
NORMS = {
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm",
    "bloom": "transformer.ln_f",
}


@pytest.fixture(scope="module")
def rows():
    """Six examples with histories of 1 to 4 items, whose queries end in different words."""
    examples = [e for e in wb.load_examples("testbed", "validation", users=6) if "q1" in e.id]
    return [
        replace(e, profile=e.profile[: 1 + n % 4], query=" ".join(e.query.split()[: 4 + n]))
        for n, e in enumerate(examples[:6])
    ]


def early(twin, kind, layers, prompt, new):
    """What norm and unembedding make of the input of some blocks: [steps, layer, d_vocab]."""
    ids = torch.tensor([[*prompt, *new]])
    states = twin(ids, output_hidden_states=True, use_cache=False).hidden_states
    norm = twin.get_submodule(NORMS.get(kind, "model.norm"))
    stream = torch.stack([states[layer][0, len(prompt) - 1 :] for layer in layers], dim=1)
    logits = twin.get_output_embeddings()(norm(stream))
    if kind == "granite":
        logits = logits / twin.config.logits_scaling
    if kind == "gemma2":
        cap = twin.config.final_logit_softcapping
        logits = cap * torch.tanh(logits / cap)
    return logits


def farthest(full, layers):
    """By PyTorch's own divergence, step by step, as DoLa's equations 3 and 4 say."""
    chosen = []
    for last, candidates in zip(full.log_softmax(-1), layers.log_softmax(-1), strict=True):
        apart = []
        for one in candidates:
            middle = ((last.exp() + one.exp()) / 2).log()
            apart.append(
                sum(float(kl_div(middle, p, reduction="sum", log_target=True)) for p in (last, one))
            )
        chosen.append(apart.index(max(apart)))
    return layers[torch.arange(len(full)), chosen], chosen


def joined(twin, kind, shape, contrast, ids, new):
    """Contrasted and plain logits; `ids` are a prompt's and those of the same without profile."""
    prompt, bare = ids
    full = behind(twin, prompt, new)
    total = full.clone()
    if contrast is None:
        return full, full
    for part in getattr(contrast, "parts", (contrast,)):
        if isinstance(part, NoProfile):
            return behind(twin, bare, new), full
        if isinstance(part, Ablated):
            return gated(twin, part.heads, shape, prompt, new), full
        if isinstance(part, DoLa):
            total -= farthest(full, early(twin, kind, part.layers, prompt, new))[0]
            continue
        view = behind(twin, bare, new)
        if isinstance(part, DPS):
            view = gated(twin, part.heads, shape, prompt, new)
        gamma = part.gamma
        if isinstance(gamma, Entropy):
            entropy = torch.distributions.Categorical(logits=full).entropy()
            gamma = gamma.factor * entropy[:, None]
        total += gamma * (full - view)
    if contrast.plausible:
        probs = full.softmax(-1)
        best = probs.max(dim=-1, keepdim=True).values
        total = total.masked_fill(probs < contrast.plausible * best, -torch.inf)
    return total, full


def check(model, kind, rows, contrasts):
    """Generate in one batch, and hold every row against the plain loop."""
    twin, shape, ends = plain_copy(model), heads_per_layer(model), end_tokens(model)
    answers = generate(model, rows, contrasts, max_new_tokens=NEW)
    with torch.inference_mode():
        both = zip(prompts_of(model, rows, NEW), bare_prompts_of(model, rows, NEW), strict=True)
        for (prompt, bare), contrast, answer in zip(both, contrasts, answers, strict=True):
            logits = joined(twin, kind, shape, contrast, (prompt.ids, bare.ids), answer.tokens)
            check_answer(answer, *logits, ends)
    assert max(max(answer.kl) for answer in answers) > 1e-3, "or nothing is shown"


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_different_sums_equal_plain_loops(tiny_model, kind, rows):
    contrasts = [
        DPS(HEADS, 0.5) + CAD(0.3) + DoLa((1, 2)),
        DoLa((0, 1, 2), plausible=0.0),
        None,
        CAD(1.5),
        NoProfile(),
        DPS(HEADS, 0.5) + DeCoRe(HeadSet((Head(0, 0),)), Entropy(0.1)) + DoLa((1, 2)),
    ]
    check(tiny_model(kind), kind, rows, contrasts)


def test_each_alone_on_the_testbed_equals_plain_loops(testbed_model, rows):
    for contrast in (CAD(0.5), NoProfile(), Ablated(HEADS), DoLa((0, 2)), CAD(Entropy(0.5))):
        check(testbed_model, "llama", rows, [contrast] * len(rows))
    without = generate(testbed_model, rows, NoProfile(), max_new_tokens=NEW)
    bare = [replace(row, profile=()) for row in rows]
    plain = generate(testbed_model, bare, max_new_tokens=NEW)
    assert [a.tokens for a in without] == [a.tokens for a in plain]


@torch.inference_mode()
def test_every_row_chooses_its_own_layer(tiny_model, rows):
    model, kind = tiny_model("bloom"), "bloom"
    twin = plain_copy(model)
    chosen = set()
    for prompt in prompts_of(model, rows, NEW):
        full = behind(twin, prompt.ids, ())
        chosen.add(farthest(full, early(twin, kind, (1, 2), prompt.ids, ()))[1][0])
    assert len(chosen) > 1, "or one choice could not be told from another"
    check(model, kind, rows, [DoLa((1, 2))] * len(rows))


def test_layers_that_are_named_by_range_are_the_same_as_by_number(tiny_model, rows):
    model = tiny_model("llama")
    for name, layers in (("low", (0,)), ("high", (1,))):
        by_name = generate(model, rows, DoLa(name), max_new_tokens=NEW)
        by_number = generate(model, rows, DoLa(layers), max_new_tokens=NEW)
        assert by_name == by_number


def test_tied_embeddings_leave_the_embedding_out(tmp_path, rows, monkeypatch):
    import architectures
    from transformers import AutoModelForCausalLM, LlamaConfig

    from workbench.models import load_model

    options = architectures.GROUPED | {"tie_word_embeddings": True, "num_hidden_layers": 6}
    monkeypatch.setitem(
        architectures.ARCHITECTURES,
        "tied",
        lambda size: AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=size, **options)),
    )
    architectures.write_model("tied", tmp_path)
    model = load_model(tmp_path, device="cpu")
    low = generate(model, rows, DoLa("low"), max_new_tokens=NEW)
    assert low == generate(model, rows, DoLa((2,)), max_new_tokens=NEW)
    check(model, "llama", rows, [DoLa((2, 4))] * len(rows))


def test_a_profile_that_is_empty_makes_context_aware_decoding_plain(tiny_model, rows):
    model = tiny_model("gpt2")
    bare = [replace(row, profile=()) for row in rows[:3]]
    plain = generate(model, bare, max_new_tokens=NEW)
    found = generate(model, bare, CAD(2.0), max_new_tokens=NEW)
    assert [a.tokens for a in found] == [a.tokens for a in plain]
    assert max(kl for a in found for kl in a.kl) < 1e-6  # nats: the two rows differ by rounding
