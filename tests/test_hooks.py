"""Gates at hook_z, held against the weights and against plain PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plain import output_projection, output_weights, plain_copy, zero_output_weights

from workbench.batches import Batch
from workbench.data.testbed import testbed_path
from workbench.errors import InputError
from workbench.heads import Head, HeadSet, all_heads
from workbench.hooks import head_gates, hook_name, mean_z
from workbench.models import heads_per_layer, load_model

KINDS = ("testbed", "llama", "qwen2", "mistral", "gpt2")
# Same sum in another order, float32, logits of size about 1 to 20.
ROUNDING = 2e-5


@pytest.fixture(params=KINDS)
def model(request, tiny_model, testbed_model):
    return testbed_model if request.param == "testbed" else tiny_model(request.param)


def tokens_for(model, rows=3, length=17, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, model.cfg.d_vocab, (rows, length), generator=generator)


@torch.inference_mode()
def gated_logits(model, tokens, gates, means=None):
    with head_gates(model, gates, means):
        return model(tokens, return_type="logits")


@torch.inference_mode()
def test_zero_gate_equals_zeroed_output_weights(model):
    shape, tokens = heads_per_layer(model), tokens_for(model)
    full = model(tokens, return_type="logits")
    for head in all_heads(shape):
        twin = plain_copy(model)
        zero_output_weights(twin, head, shape[head.layer])
        expected = twin(tokens).logits
        found = gated_logits(model, tokens, HeadSet((head,)).gates(shape))
        torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0)
        assert not torch.allclose(found, full, atol=ROUNDING, rtol=0), f"{head} does nothing here"


@torch.inference_mode()
def test_several_zero_gates_equal_zeroed_output_weights(model):
    shape, tokens = heads_per_layer(model), tokens_for(model)
    heads = HeadSet((Head(0, 1), Head(1, 0), Head(1, 2)))
    twin = plain_copy(model)
    for head in heads:
        zero_output_weights(twin, head, shape[head.layer])
    found = gated_logits(model, tokens, heads.gates(shape))
    torch.testing.assert_close(found, twin(tokens).logits, atol=ROUNDING, rtol=0)


@torch.inference_mode()
def test_empty_ablation_equals_full_logits_exactly(model):
    shape, tokens = heads_per_layer(model), tokens_for(model)
    full = model(tokens, return_type="logits")
    assert torch.equal(gated_logits(model, tokens, HeadSet(()).gates(shape)), full)
    # Also where hooks run, because another row is ablated.
    gates = np.stack([HeadSet(()).gates(shape)] * 2 + [HeadSet((Head(0, 0),)).gates(shape)])
    for means in (None, mean_z(model, [batch_of(tokens)])):
        found = gated_logits(model, tokens, gates, means)
        assert torch.equal(found[:2], full[:2])


def batch_of(tokens, mask=None):
    mask = torch.ones_like(tokens) if mask is None else mask
    return Batch(tokens, mask, torch.zeros_like(tokens, dtype=torch.bool))


@torch.inference_mode()
def test_gates_per_row_equal_one_row_at_a_time(model):
    shape, tokens = heads_per_layer(model), tokens_for(model)
    sets = [HeadSet((Head(0, 0),)), HeadSet(()), HeadSet((Head(0, 2), Head(1, 1)))]
    together = gated_logits(model, tokens, np.stack([s.gates(shape) for s in sets]))
    for row, heads in enumerate(sets):
        alone = gated_logits(model, tokens[row : row + 1], heads.gates(shape))
        # Another batch size, another order of summation inside the matrix products.
        torch.testing.assert_close(together[row : row + 1], alone, atol=ROUNDING, rtol=0)


@torch.inference_mode()
def test_soft_gate_scales_a_head_as_scaled_output_weights_do(model):
    shape, tokens = heads_per_layer(model), tokens_for(model)
    gates = HeadSet(()).gates(shape)
    gates[1, 1] = 0.25
    twin = plain_copy(model)
    weight = output_weights(twin, 1)
    size = weight.shape[0] // shape[1]
    weight[size : 2 * size] *= 0.25
    found = gated_logits(model, tokens, gates)
    torch.testing.assert_close(found, twin(tokens).logits, atol=ROUNDING, rtol=0)


@torch.inference_mode()
def test_mean_ablation_puts_the_mean_of_the_real_tokens_in_place(model):
    shape, tokens = heads_per_layer(model), tokens_for(model)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0  # padding must not enter the mean
    twin = plain_copy(model)
    kept = {}

    def keep(layer):
        return lambda _module, args: kept.update({layer: args[0]})

    handles = [
        output_projection(twin, layer).register_forward_pre_hook(keep(layer)) for layer in (0, 1)
    ]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    twin(tokens, attention_mask=mask, position_ids=positions)
    for handle in handles:
        handle.remove()
    means = mean_z(model, [batch_of(tokens[:1], mask[:1]), batch_of(tokens[1:], mask[1:])])
    for layer in (0, 1):
        expected = kept[layer][mask.bool()].mean(0).view(shape[layer], -1)
        torch.testing.assert_close(means[layer], expected, atol=ROUNDING, rtol=0)

    head = Head(0, 1)
    size = means[0].shape[-1]

    def replace(_module, args):
        z = args[0].clone()
        z[..., size : 2 * size] = means[0][1]
        return (z,)

    output_projection(twin, 0).register_forward_pre_hook(replace)
    found = gated_logits(model, tokens, HeadSet((head,)).gates(shape), means)
    torch.testing.assert_close(found, twin(tokens).logits, atol=ROUNDING, rtol=0)


@torch.inference_mode()
def test_heads_times_output_weights_sum_to_the_attention_output(model):
    kept = {}
    hooks = [
        (hook_name(1), lambda z, hook: kept.update(z=z)),
        ("blocks.1.attn.hook_out", lambda out, hook: kept.update(out=out)),
    ]
    with model.hooks(fwd_hooks=hooks):
        model(tokens_for(model))
    twin, heads = plain_copy(model), kept["z"].shape[2]
    projection, weight = output_projection(twin, 1), output_weights(twin, 1)
    parts = torch.einsum("bphd,hdm->bphm", kept["z"], weight.view(heads, -1, weight.shape[-1]))
    bias = 0 if projection.bias is None else projection.bias
    # Relative too: attention outputs of the testbed reach 50.
    torch.testing.assert_close(parts.sum(2) + bias, kept["out"], atol=ROUNDING, rtol=1e-5)


def hook_count(model):
    return sum(len(point.fwd_hooks) for point in model.hook_dict.values())


def test_hooks_are_gone_after_an_exception(testbed_model):
    shape, before = heads_per_layer(testbed_model), hook_count(testbed_model)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        head_gates(testbed_model, HeadSet((Head(0, 0),)).gates(shape)),
    ):
        assert hook_count(testbed_model) > before
        raise RuntimeError("on purpose")
    assert hook_count(testbed_model) == before


@torch.inference_mode()
def test_gates_leave_the_activation_itself_unchanged(testbed_model):
    shape, seen = heads_per_layer(testbed_model), []

    def keep(z, hook):
        seen.extend([z, z.clone()])

    with testbed_model.hooks(fwd_hooks=[(hook_name(0), keep)]):
        gated_logits(testbed_model, tokens_for(testbed_model), HeadSet((Head(0, 3),)).gates(shape))
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (np.ones((3, 8)), r"gates must be \[layer, head\].*got \(3, 8\)"),
        (np.full((4, 8), 1.5), "between 0"),
        (np.full((4, 8), np.nan), "between 0"),
    ],
)
def test_bad_gates_are_refused(testbed_model, gates, message):
    with pytest.raises(InputError, match=message), head_gates(testbed_model, gates):
        pass


def test_missing_model_folder_is_refused():
    with pytest.raises(InputError, match=r"/nowhere/model: no such folder"):
        load_model("/nowhere/model")


def test_folder_without_config_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load_model(tmp_path)


def test_unknown_dtype_is_refused():
    with pytest.raises(InputError, match="unknown dtype 'float8'"):
        load_model(dtype="float8")


def test_model_without_attention_heads_is_refused(tmp_path):
    from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(testbed_path()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no attention head can be hooked"):
        load_model(tmp_path)


def test_folder_with_pickled_weights_only_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="holds no safetensors"):
        load_model(tmp_path)


def test_a_tokenizer_without_a_first_token_is_left_without_one(tmp_path, tiny_model):
    # As Qwen2's: the bridge would put the end-of-text token in front of every prompt.
    import workbench as wb
    from workbench.data.prompts import build_prompts

    source = tiny_model("qwen2").original_model
    folder = source.config._name_or_path
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = None
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    (example,) = wb.load_examples("testbed", users=1)[:1]
    for style in ("plain", "chat"):
        (prompt,) = build_prompts(
            [example], model.tokenizer, 256, wb.PromptSettings(style=style, items=0)
        )
        text = model.tokenizer.decode(prompt.ids)
        assert text == (f"[{example.query}]" if style == "chat" else example.query)


def test_missing_gpu_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    with pytest.raises(InputError, match="sees no CUDA GPU"):
        load_model(device="cuda")
