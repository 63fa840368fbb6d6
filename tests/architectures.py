"""Tiny random models of many architectures, written as Hugging Face checkpoints.

Every architecture has something that a fast way of scoring heads can get wrong: a window, soft
caps, two norms around a block, parallel blocks, multipliers, experts, biases, positions in the
scores, or blocks with no attention. Sizes are as small as leaves that something in place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CONTEXT = 256
WINDOW = 16  # shorter than the prompts of any test, so that masks differ between layers
TEXT = (
    "the mayor starts the bridge",
    "a dark tale about a cowboy",
    "the lamp is awful and the kettle is superb",
    "in miami the teacher finds the museum",
)

# Three blocks: a first, a middle and a last one.
SHARED = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.2,  # every head matters, and rounding stays far below the tolerances
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ROTARY = SHARED | {"intermediate_size": 64, "max_position_embeddings": CONTEXT}
GROUPED = ROTARY | {"num_key_value_heads": 2}
# Four heads of 16 are wider than the model: nothing may take width / heads for the size of one.
WIDE = GROUPED | {"head_dim": 16}
SLIDING = WIDE | {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
GEMMA = SLIDING | {"query_pre_attn_scalar": 8}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.5,
    "logits_scaling": 1.7,
}
LINEAR_BETWEEN = ["full_attention", "linear_attention", "full_attention"]
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}


def _build(config: str, options: dict[str, Any], vocab_size: int) -> PreTrainedModel:
    import transformers as hf

    configured = getattr(hf, config)(vocab_size=vocab_size, **options)
    return hf.AutoModelForCausalLM.from_config(configured)


def _model(config: str, *shared: dict[str, Any], **own: Any) -> Callable[[int], PreTrainedModel]:
    options: dict[str, Any] = {}
    for part in (*shared, own):
        options |= part
    return partial(_build, config, options)


ARCHITECTURES: dict[str, Callable[[int], PreTrainedModel]] = {
    "llama": _model("LlamaConfig", GROUPED),
    "mistral": _model("MistralConfig", GROUPED, sliding_window=WINDOW),
    "qwen2": _model("Qwen2Config", GROUPED),  # biases on q, k and v
    "qwen3": _model("Qwen3Config", WIDE),  # norms on q and k
    "gemma2": _model(  # two norms around each part of a block; caps that bite
        "Gemma2Config", GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=5.0
    ),
    "gemma3": _model("Gemma3TextConfig", GEMMA),  # other rotary angles in sliding layers
    "gpt2": _model("GPT2Config", SHARED, n_positions=CONTEXT),  # learned positions
    "gpt_neox": _model("GPTNeoXConfig", ROTARY, use_parallel_residual=True),
    "gpt_neox_sequential": _model("GPTNeoXConfig", ROTARY, use_parallel_residual=False),
    "phi": _model("PhiConfig", GROUPED),  # parallel with one norm, part of each head rotated
    "phi3": _model("Phi3Config", GROUPED, sliding_window=WINDOW),  # q, k and v in one projection
    "olmo2": _model("Olmo2Config", GROUPED),  # norms after attention and MLP only
    "granite": _model("GraniteConfig", GROUPED, MULTIPLIERS),
    "mixtral": _model("MixtralConfig", GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "opt": _model(  # learned positions with an offset; attention biases
        "OPTConfig",
        SHARED,
        ffn_dim=64,
        max_position_embeddings=CONTEXT,
        word_embed_proj_dim=32,
        init_std=SHARED["initializer_range"],
    ),
    "bloom": _model("BloomConfig", SHARED, seq_length=CONTEXT),  # ALiBi
    "falcon": _model("FalconConfig", ROTARY),  # parallel, one key/value head, own attention code
    "gpt_oss": _model(  # a sink in every softmax
        "GptOssConfig",
        SLIDING,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "lfm2": _model(  # a convolution in the middle block
        "Lfm2Config", GROUPED, layer_types=["full_attention", "conv", "full_attention"]
    ),
    "granitemoehybrid": _model(  # attention without positions
        "GraniteMoeHybridConfig",
        GROUPED,
        MULTIPLIERS,
        MAMBA,
        layer_types=LINEAR_BETWEEN,
        # As published. By default, None, the bridge looks for rotary angles that aren't there.
        position_embedding_type="nope",
        num_local_experts=4,
        shared_intermediate_size=64,
    ),
    "bamba": _model("BambaConfig", GROUPED, MAMBA, attn_layer_indices=[0, 2]),
    "jamba": _model(
        "JambaConfig",
        GROUPED,
        attn_layer_period=2,
        attn_layer_offset=0,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    "qwen3_next": _model(  # z is gated before W_O
        "Qwen3NextConfig",
        WIDE,
        layer_types=LINEAR_BETWEEN,
        rms_norm_eps=1e-2,  # or the norm after the delta rule makes rounding 100 times larger
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "falcon_h1": _model(  # attention and Mamba side by side in every block
        "FalconH1Config", GROUPED, MAMBA, mamba_d_ssm=64, attention_out_multiplier=0.7
    ),
}

# Attention in these too, which TransformerLens 4.3 wraps whole: no z to hook.
REFUSED: dict[str, Callable[[int], PreTrainedModel]] = {
    "nemotron_h": _model(
        "NemotronHConfig",
        GROUPED,
        layers_block_type=LINEAR_BETWEEN,
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=8,
    ),
    "recurrent_gemma": _model(
        "RecurrentGemmaConfig",
        GROUPED,
        block_types=["attention", "recurrent", "attention"],
        attention_window_size=WINDOW,
        lru_width=32,
    ),
}


# Llama-3-8B's number of heads, 32 x 32, in the size of a toy.
LARGE = _model("LlamaConfig", ROTARY, hidden_size=64, num_hidden_layers=32, num_attention_heads=32)


def write_model(name: str, folder: Path) -> None:
    """Write a random checkpoint of an architecture and its tokenizer in Hugging Face format."""
    import torch

    with torch.random.fork_rng(devices=[]):
        # Seeded by name, so that a model stays the same when the table grows.
        torch.manual_seed(crc32(name.encode()))
        tokenizer = tiny_tokenizer()
        model = (ARCHITECTURES | REFUSED | {"large": LARGE})[name](len(tokenizer))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases start at 0 and norms at 1: too special to test on
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens, trained on four sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
