"""What PCS costs, held against Transformers' own modules and PyTorch's operation counter."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from workbench.discovery import cost
from workbench.discovery.families import FAMILIES
from workbench.discovery.shapes import read_config, shape_of
from workbench.errors import InputError

P, T = 12, 3
SIZE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 80, "n_positions": 64}
# What a family needs beside SIZE; None instead of a field that it hasn't got.
TINY = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {},
    "gemma2": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 5},
    "gpt2": GPT2,
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 5,
    },
    "gpt_neox": {"num_key_value_heads": None},
    "gptj": {**GPT2, "rotary_dim": 4},
    "phi": {},
    "phi3": {"head_dim": None},
    "olmo": {"head_dim": None},
    "olmo2": {"head_dim": None},
    "granite": {"head_dim": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "falcon": {"ffn_hidden_size": 80, "intermediate_size": None, "head_dim": None},
    "cohere": {"use_qk_norm": True},
    "cohere2": {"sliding_window": 5},
    "starcoder2": {},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
}


def tiny_config(kind):
    given = {**SIZE, **TINY[kind]}
    if kind in ("gpt2", "gptj", "gpt_neo"):
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            if kind != "gpt_neo" or name != "hidden_size":
                del given[name]
        del given["num_key_value_heads"], given["head_dim"], given["intermediate_size"]
    return CONFIG_MAPPING[kind](**{k: v for k, v in given.items() if v is not None})


def falcon(**settings):
    return CONFIG_MAPPING["falcon"](
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **settings
    )


def tiny_model(kind):
    torch.manual_seed(0)
    options = {"attn_implementation": "eager"}
    if shape_of(tiny_config(kind)).blocks[0].experts:
        options["experts_implementation"] = "eager"
    return AutoModelForCausalLM.from_config(tiny_config(kind), **options).eval()


def products(run):
    """Operations of the matrix products in a call, rotary tables left out.

    Those are made once for all layers and by an outer product; no method saves or repeats them.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()

    def matrix(ops):
        return sum(n for op, n in ops.items() if "conv" not in str(op))

    rotary = sum(matrix(ops) for name, ops in counts.items() if name.endswith("rotary_emb"))
    return matrix(counts["Global"]) - rotary


def tokens():
    return torch.randint(3, 61, (1, P), generator=torch.Generator().manual_seed(1))


# Shapes


@pytest.mark.parametrize("kind", FAMILIES)
def test_parameters_of_every_known_family_are_exact(kind):
    config = CONFIG_MAPPING[kind]()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape_of(config).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", TINY)
def test_parameters_of_other_settings_are_exact(kind):
    model = tiny_model(kind)
    shape = shape_of(model.config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    weights = cost.memory(shape, "replay", P, T).weights
    assert weights == sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
    ],
)
def test_parameters_of_the_other_falcons_are_exact(settings):
    config = falcon(**settings)
    model = AutoModelForCausalLM.from_config(config)
    assert shape_of(config).parameters == sum(p.numel() for p in model.parameters())
    assert shape_of(config).parallel == settings.get("parallel_attn", True)


def llama_3_8b():
    return CONFIG_MAPPING["llama"](
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )


def test_llama_3_8b_is_what_its_model_card_says():
    shape = shape_of(llama_3_8b())
    assert shape.parameters == 8_030_261_248
    assert (shape.layers, sum(shape.heads), shape.itemsize) == (32, 1024, 2)


def test_text_part_of_a_model_with_vision_is_read():
    config = CONFIG_MAPPING["gemma3"]()
    assert shape_of(config) == shape_of(config.get_text_config())


def test_windows_are_those_of_the_layers():
    assert [b.window for b in shape_of(tiny_config("mistral")).blocks] == [5, 5, 5]
    assert [b.window for b in shape_of(tiny_config("gemma2")).blocks] == [5, None, 5]
    assert [b.window for b in shape_of(tiny_config("gpt_neo")).blocks] == [None, 5]
    assert [b.window for b in shape_of(tiny_config("qwen2")).blocks] == [None] * 3


def test_blocks_of_a_hybrid_without_attention_have_no_heads():
    assert shape_of(tiny_config("lfm2")).heads == (0, 4, 0)


def test_dtype_is_the_configs_or_the_one_asked_for():
    config = llama_3_8b()
    assert shape_of(config).dtype == "bfloat16"
    assert shape_of(config, "float32").itemsize == 4
    assert shape_of(tiny_config("llama")).dtype == "float32"
    with pytest.raises(InputError, match="unknown dtype 'int8'"):
        shape_of(config, "int8")


def test_an_unknown_family_says_what_was_assumed():
    config = CONFIG_MAPPING["seed_oss"]()
    shape = shape_of(config)
    assert "seed_oss is none of the families that were checked" in shape.assumed
    assert "taken as gated" in shape.assumed
    assert shape_of(tiny_config("llama")).assumed == ""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mamba", "names no num_attention_heads; head scores need softmax attention"),
        ("t5", "an encoder-decoder"),
        ("bloom", "names no hidden_act"),
        ("deepseek_v3", "names n_shared_experts"),
        ("granitemoehybrid", "names shared_intermediate_size"),
        ("qwen3_5_text", "layers of type linear_attention"),
    ],
)
def test_a_model_that_cant_be_counted_is_refused_by_name(kind, message):
    with pytest.raises(InputError, match=message):
        shape_of(CONFIG_MAPPING[kind]())


def test_a_hybrid_with_no_attention_at_all_is_refused():
    config = tiny_config("lfm2")
    config.layer_types = ["conv"] * 3
    with pytest.raises(InputError, match=r"no layer has softmax attention \(conv\)"):
        shape_of(config)


def test_a_config_without_a_field_is_refused_by_the_field():
    config = tiny_config("llama")
    vars(config)["intermediate_size"] = None  # past the check that the class makes
    with pytest.raises(InputError, match="names no intermediate_size"):
        shape_of(config)


# Operations


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize(("method", "keep"), [("loop", 0), ("reference", T + 1)])
def test_a_forward_pass_counts_as_pytorch_counts_it(kind, method, keep):
    model = tiny_model(kind)
    shape = shape_of(model.config)
    counted = products(torch.no_grad()(lambda: model(tokens(), logits_to_keep=keep)))
    operations = cost.operations(shape, method, P, T)
    assert operations.clean == counted
    heads = sum(shape.heads)
    assert operations.blocks + operations.attention + operations.unembedding == heads * counted


def output_projection(model, kind):
    names = {
        "llama": "model.layers.0.self_attn.o_proj",
        "gemma2": "model.layers.0.self_attn.o_proj",
        "gpt_neox": "gpt_neox.layers.0.attention.dense",
        "gpt2": "transformer.h.0.attn.c_proj",
        "lfm2": "model.layers.1.self_attn.out_proj",
    }
    return model.get_submodule(names[kind])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox", "gpt2", "lfm2"])
def test_attribution_counts_as_pytorch_counts_forward_and_backward_to_z(kind):
    model = tiny_model(kind).requires_grad_(False)

    def leaf(_module, arguments):
        return (arguments[0].detach().requires_grad_(),)

    def run():
        hook = output_projection(model, kind).register_forward_pre_hook(leaf)
        model(tokens(), logits_to_keep=T + 1).logits.sum().backward()
        hook.remove()

    shape = shape_of(model.config)
    assert cost.operations(shape, "attribution", P, T).total == products(run)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@torch.no_grad()
def test_replay_counts_as_pytorch_counts_it_composed_by_hand(kind):
    model = tiny_model(kind)
    shape = shape_of(model.config)
    d, heads, hd = shape.d_model, shape.blocks[0].heads, shape.blocks[0].head_dim
    kv = shape.blocks[0].kv_heads
    core = model.model if kind == "llama" else model.gpt_neox
    unembed = model.get_output_embeddings()
    x, few = torch.randn(1, P, d), torch.randn(1, T, d)
    rotary = core.rotary_emb(x, torch.arange(P)[None])

    def last_block():
        torch.randn(P, d) @ torch.randn(d, 2 * kv * hd)  # keys, values
        torch.randn(T, d) @ torch.randn(d, heads * hd)  # queries
        pattern = torch.randn(heads, T, hd) @ torch.randn(heads, hd, P)
        pattern @ torch.randn(heads, P, hd)
        torch.randn(T, heads * hd) @ torch.randn(heads * hd, d)
        core.layers[-1].mlp(few)

    def run():
        model(tokens(), logits_to_keep=T + 1)
        for layer in range(shape.layers):
            for _ in range(heads):
                here = few if layer == shape.layers - 1 else x
                torch.randn(here.shape[1], hd) @ torch.randn(hd, d)
                if kind == "llama":
                    core.layers[layer].mlp(here)
                for later in core.layers[layer + 1 : -1]:
                    later(x, position_embeddings=rotary, attention_mask=None)
                if layer < shape.layers - 1:
                    last_block()
                unembed(few)

    assert cost.operations(shape, "replay", P, T).total == products(run)


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gpt2"])
def test_minimum_counts_the_pairs_that_the_masks_let_through(kind):
    shape = shape_of(tiny_config(kind))
    query, key = torch.arange(P)[:, None], torch.arange(P)[None]
    whole, few = [], []
    for block in shape.blocks:
        seen = (key <= query) & (query - key < (block.window or P))
        size = 4 * block.heads * block.head_dim
        whole.append(size * int(seen.sum()))
        few.append(size * int(seen[P - 1 - T : P - 1].sum()))
    # The heads of layer l run the blocks after it, the last at the target's positions only.
    expected = sum(
        shape.heads[layer] * (sum(whole[layer + 1 : -1]) + few[-1])
        for layer in range(shape.layers - 1)
    )
    least = cost.minimum(shape, P, T)
    assert least.attention == expected
    replay = cost.operations(shape, "replay", P, T)
    assert least.blocks == replay.blocks
    assert least.unembedding == replay.unembedding
    assert least.attention < replay.attention


def test_parallel_blocks_spare_the_mlp_of_the_ablated_block():
    shape = shape_of(tiny_config("gpt_neox"))
    assert shape.parallel
    sequential = cost.operations(replace(shape, parallel=False), "replay", P, T)
    mlp = shape.blocks[0].mlp * 4 * (2 * 2 * P + 2 * T)  # 4 heads; 2 layers at P, the last at T
    assert sequential.total - cost.operations(shape, "replay", P, T).total == mlp


def test_screening_replays_its_share_and_no_more_than_all():
    shape = shape_of(llama_3_8b())
    assert cost.screened_heads(shape, 16) == 28
    assert cost.screened_heads(shape, 1024) == 1024
    all_heads = cost.operations(shape, "screened", 2048, 32, replayed=1024)
    some = cost.operations(shape, "screened", 2048, 32, replayed=64)
    assert all_heads.blocks == cost.operations(shape, "replay", 2048, 32).blocks
    assert some.blocks == all_heads.blocks / 16
    with pytest.raises(ValueError, match="1025 heads to replay"):
        cost.operations(shape, "screened", 2048, 32, replayed=1025)


def test_replay_of_llama_3_8b_agrees_with_a_count_by_hand():
    p, t = 2048, 32
    matrices = 2 * 4096 * 4096 + 2 * 4096 * 1024  # query, output, key, value
    mlp = 3 * 4096 * 14336
    block = 2 * p * (matrices + mlp) + 4 * 4096 * p * p
    share, few = 2 * 128 * 4096, 2 * t * (2 * 4096 * 4096 + mlp)
    last = few + 2 * p * 2 * 4096 * 1024 + 4 * 4096 * t * p
    logits = 2 * t * 4096 * 128256
    heads = 32 * (
        31 * (p * share + 2 * p * mlp + last + logits)
        + sum(range(31)) * block
        + (t * share + 2 * t * mlp + logits)
    )
    clean = 32 * block + 2 * (t + 1) * 4096 * 128256
    assert cost.operations(shape_of(llama_3_8b()), "replay", p, t).total == heads + clean


# Order


def test_each_method_takes_less_than_the_one_before():
    shape = shape_of(llama_3_8b())
    total = {
        method: cost.operations(shape, method, 2048, 32, replayed=40).total
        for method in cost.METHODS
    }
    assert total["loop"] > total["reference"] > total["replay"]
    assert total["replay"] > total["screened"] > total["attribution"]
    assert cost.minimum(shape, 2048, 32).total < total["replay"]
    forward = cost.operations(shape, "reference", 2048, 32).clean
    assert 1.9 * forward < total["attribution"] < 2.1 * forward


@pytest.mark.parametrize("method", cost.METHODS)
def test_more_of_anything_never_costs_less(method):
    machine = cost.Machine(rate=1e14, bandwidth=1e12, call_seconds=1e-5)

    def everything(shape, tokens=100, target=10):
        held = cost.memory(shape, method, tokens, target, batch_tokens=tokens)
        return (
            cost.operations(shape, method, tokens, target, replayed=5).total,
            cost.traffic(shape, method, tokens, target, replayed=5).bytes,
            cost.seconds(shape, method, tokens, target, machine, replayed=5),
            held.total,
        )

    config = llama_3_8b()
    before = everything(shape_of(config))
    changed = [
        everything(shape_of(config), tokens=101),
        everything(shape_of(config), target=11),
    ]
    for name, value in {"num_hidden_layers": 33, "intermediate_size": 15000}.items():
        other = llama_3_8b()
        setattr(other, name, value)
        changed.append(everything(shape_of(other)))
    for after in changed:
        assert all(b >= a for a, b in zip(before, after, strict=True))


# Traffic, time, memory


def test_rows_of_a_pass_share_weights_and_calls_but_not_element_wise_work():
    shape = shape_of(llama_3_8b())
    one = cost.traffic(shape, "reference", 512, 32)
    four = cost.traffic(shape, "reference", 512, 32, rows=4)
    assert four == cost.Traffic(one.bytes, one.weights / 4, one.calls / 4)
    assert cost.traffic(shape, "loop", 512, 32, rows=4) == cost.traffic(shape, "loop", 512, 32)
    # 1,025 passes over all weights but the embedding and the norms
    small = 128256 * 4096 + 65 * 4096
    assert one.weights == 1025 * 2 * (shape.parameters - small)


def test_eager_attention_moves_the_pattern():
    shape = shape_of(llama_3_8b())

    def growth(method):
        return (
            cost.traffic(shape, method, 4096, 32).bytes
            / cost.traffic(shape, method, 2048, 32).bytes
        )

    assert growth("reference") > 2.5  # with the square of the tokens
    assert growth("replay") < 2.01


def test_seconds_are_operations_bytes_and_calls_one_after_another():
    shape = shape_of(llama_3_8b())
    given = (shape, "reference", 1024, 32)
    work = cost.operations(*given).total
    moved = cost.traffic(*given, rows=4)
    machine = cost.Machine(rate=2e14, bandwidth=3e12, call_seconds=1e-5)
    expected = work / 2e14 + (moved.bytes + moved.weights) / 3e12 + moved.calls * 1e-5
    assert cost.seconds(*given, machine, batch_tokens=4096) == pytest.approx(expected)


def test_a_machine_that_does_nothing_is_refused():
    with pytest.raises(InputError, match="the rate must be > 0 TFLOP/s, got -1"):
        cost.Machine(rate=-1e12, bandwidth=1, call_seconds=0)
    with pytest.raises(InputError, match="bandwidth must be > 0"):
        cost.Machine(rate=1, bandwidth=float("nan"), call_seconds=0)
    with pytest.raises(InputError, match="seconds a call must be >= 0"):
        cost.Machine(rate=1, bandwidth=1, call_seconds=-1)


def test_replay_keeps_z_residual_and_attention_output_of_every_layer():
    shape = shape_of(llama_3_8b())
    held = cost.memory(shape, "replay", 2048, 32, batch_tokens=8192)
    assert held.weights == 2 * 8_030_261_248
    assert held.kept == 4 * 2048 * 32 * (4096 + 4096 + 4096) * 2
    assert cost.memory(shape, "reference", 2048, 32).kept == 0
    alone = cost.memory(shape, "replay", 2048, 32, batch_tokens=1)  # a long row still runs
    assert alone.kept == held.kept / 4


def test_logits_at_all_positions_outweigh_a_block():
    shape = shape_of(llama_3_8b())
    held = cost.memory(shape, "loop", 2048, 32)
    assert held.working == 2048 * 128256 * (2 + 4 + 4)
    assert held.total == held.weights + held.kept + held.working


@pytest.mark.parametrize(("tokens_", "target"), [(32, 32), (10, 0)])
def test_a_job_without_room_for_prompt_and_target_is_refused(tokens_, target):
    with pytest.raises(InputError, match="at least 1 and a token before it"):
        cost.operations(shape_of(llama_3_8b()), "replay", tokens_, target)


def test_a_job_beyond_the_context_is_refused():
    with pytest.raises(InputError, match="more than the model's context of 8192"):
        cost.memory(shape_of(llama_3_8b()), "replay", 8193, 32)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="unknown method 'magic'; known are loop"):
        cost.operations(shape_of(llama_3_8b()), "magic", 100, 10)


def test_counting_needs_no_torch():
    code = "import sys, workbench.discovery.cost; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_config_is_read_from_a_folder_and_its_absence_told(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path)
    assert shape_of(read_config(tmp_path)) == shape_of(tiny_config("llama"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no config\.json"):
        read_config(tmp_path / "empty")
    with pytest.raises(InputError, match="no such folder; give a local folder"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(InputError, match="its config can't be read"):
        read_config("nobody/nothing")
