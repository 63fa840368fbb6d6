"""What the code of a model family fixes and its configs don't say."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Family:
    """Parts that all models of a family have, or lack.

    A string names the field of the config that switches the part on.

    Attributes:
        gated: As in `Block`.
        parallel: As in `Shape`.
        norms: Norms in a block.
        norm_size: Parameters of a norm per element: 1 a weight, 2 a bias too.
        qkv_bias: Query, key and value projections have biases.
        o_bias: The output projection has a bias.
        mlp_bias: The MLP's projections have biases.
        qk_norm: Queries and keys have a norm.
        whole_qk_norm: It spans all heads, not one.
        head_bias: The unembedding has a bias.
        learned_positions: Positions have an embedding.
    """

    gated: bool = True
    parallel: bool | str = False
    norms: int = 2
    norm_size: int = 1
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool | str = False
    whole_qk_norm: bool = False
    head_bias: bool = False
    learned_positions: bool = False


_LLAMA = Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias")
_QWEN3 = Family(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True)
_OLMO2 = replace(_QWEN3, whole_qk_norm=True)
_GEMMA = Family(qkv_bias="attention_bias", o_bias="attention_bias")
_COHERE = replace(_GEMMA, parallel=True, norms=1, qk_norm="use_qk_norm", whole_qk_norm=True)
_GPT2 = Family(
    gated=False, norm_size=2, qkv_bias=True, o_bias=True, mlp_bias=True, learned_positions=True
)
_PHI = replace(_GPT2, parallel=True, norms=1, head_bias=True, learned_positions=False)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "granite": _LLAMA,
    "smollm3": _LLAMA,
    "mistral": Family(),
    "mixtral": Family(),
    "phi3": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3,
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, norms=4),
    "gemma3_text": replace(_QWEN3, norms=4),
    "gpt2": _GPT2,
    "gpt_neo": replace(_GPT2, qkv_bias=False),
    "gpt_neox": replace(
        _GPT2,
        parallel="use_parallel_residual",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        learned_positions=False,
    ),
    "gptj": replace(_PHI, qkv_bias=False, o_bias=False),
    "phi": _PHI,
    "olmo": replace(_GEMMA, norm_size=0),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "olmoe": _OLMO2,
    "falcon": Family(
        gated=False,
        parallel="parallel_attn",
        norm_size=2,
        qkv_bias="bias",
        o_bias="bias",
        mlp_bias="bias",
    ),
    "cohere": _COHERE,
    "cohere2": replace(_COHERE, qk_norm=False),
    "starcoder2": Family(
        gated=False, norm_size=2, qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias"
    ),
    "lfm2": Family(qk_norm=True),
}
# What a layer is called in `layer_types` (`attention_layers` of GPT-Neo), and which field of the
# config says how far back it sees. A chunk is taken for a window: that is the most it can see.
ATTENTION = {
    "full_attention": "",
    "global": "",
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
    "local": "window_size",
}
