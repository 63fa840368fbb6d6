"""The reference score of every architecture, held against the checkpoint without any bridge."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, CONTEXT, MULTIPLIERS, REFUSED, WINDOW, write_model
from plain import plain_copy, plain_nll, zero_output_weights

import workbench as wb
from workbench.batches import collate
from workbench.data.prompts import Prompt
from workbench.discovery.ablation import score_batch
from workbench.errors import InputError
from workbench.heads import all_heads
from workbench.models import context_length, heads_per_layer, load_model, pad_token

# Sums in another order (padding, eager attention or torch's own) in float32, losses of size 5.
ROUNDING = 1e-5
HYBRID = ("lfm2", "granitemoehybrid", "bamba", "jamba", "qwen3_next")  # by the middle block
WINDOWED = ("mistral", "phi3", "gemma2", "gemma3", "gpt_oss")
FULL = ["full_attention"] * 3
ONE_THETA = {
    kind: {"rope_type": "default", "rope_theta": 1e4}
    for kind in ("sliding_attention", "full_attention")
}
# What makes an architecture special, and a value that takes it away or is off by one.
SPECIALS = (
    *((name, "sliding_window", WINDOW + 1) for name in WINDOWED),
    *((name, "layer_types", FULL) for name in ("gemma2", "gemma3", "gpt_oss")),
    ("gemma2", "attn_logit_softcapping", None),
    ("gemma2", "final_logit_softcapping", None),
    ("gemma3", "rope_parameters", ONE_THETA),
    ("gpt_neox", "use_parallel_residual", False),
    ("mixtral", "num_experts_per_tok", 1),
    *((name, option, 1.0) for name in ("granite", "granitemoehybrid") for option in MULTIPLIERS),
    ("granitemoehybrid", "position_embedding_type", "rope"),
    ("falcon_h1", "attention_out_multiplier", 1.0),
)


@pytest.fixture(scope="module")
def prompts():
    """Three prompts of random tokens, of different lengths, all longer than the window."""
    (example,) = wb.load_examples("testbed", users=1)[:1]
    generator = torch.Generator().manual_seed(0)
    result = []
    for length, target in ((20, 5), (31, 3), (37, 1)):
        ids = torch.randint(3, 300, (length + target,), generator=generator).tolist()
        result.append(Prompt(example, tuple(ids[:length]), tuple(ids[length:]), shown=()))
    assert min(len(prompt.ids) for prompt in result) > WINDOW
    return result


def plain_losses(twin, prompts):
    return torch.tensor([plain_nll(twin, prompt) for prompt in prompts])


@torch.inference_mode()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_equal_zeroed_output_weights_one_prompt_at_a_time(tiny_model, name, prompts):
    model = tiny_model(name)
    shape = heads_per_layer(model)
    pcs, nll = score_batch(model, collate(prompts, pad_token(model), "cpu"))
    full = plain_losses(plain_copy(model), prompts)
    torch.testing.assert_close(nll, full, atol=ROUNDING, rtol=0)
    for head in all_heads(shape):
        twin = plain_copy(model)
        zero_output_weights(twin, head, shape[head.layer])
        found, expected = pcs[:, head.layer, head.head], plain_losses(twin, prompts) - full
        torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0)
        assert found.abs().max() > 100 * ROUNDING, f"{head} does next to nothing here"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shape_is_known(tiny_model, name):
    model = tiny_model(name)
    assert heads_per_layer(model) == ((4, 0, 4) if name in HYBRID else (4, 4, 4))
    assert context_length(model) == CONTEXT


@torch.inference_mode()
@pytest.mark.parametrize(("name", "option", "value"), SPECIALS)
def test_what_makes_an_architecture_special_changes_its_losses(
    tiny_model, name, option, value, prompts
):
    # Otherwise the tests on these models could not see it done wrong.
    model = tiny_model(name)
    assert getattr(model.original_model.config, option) != value
    here, without = plain_copy(model), plain_copy(model, **{option: value})
    change = (plain_losses(here, prompts) - plain_losses(without, prompts)).abs().min()
    assert change > 100 * ROUNDING


@pytest.mark.parametrize("name", REFUSED)
def test_attention_that_cannot_be_hooked_is_refused(tmp_path, name):
    write_model(name, tmp_path)
    with pytest.raises(InputError, match="no attention head can be hooked"):
        load_model(tmp_path)
