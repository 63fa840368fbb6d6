"""A model's shape from its Hugging Face config alone: what a cost can be counted from.

No weights are read and torch is not imported here. For the families in `FAMILIES` the number of
parameters is exact (tests hold it against Transformers' own models); for another model the shape
is read from the usual fields, and `Shape.assumed` says what the config left open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.discovery.families import ATTENTION, FAMILIES, Family
from workbench.errors import InputError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
REMEDY = "its cost can't be counted beforehand; time it with `workbench bench`"
# Fields of parts whose operations are not counted here.
UNCOUNTED = ("kv_lora_rank", "n_shared_experts", "shared_", "mamba", "ssm", "block_configs")


@dataclass(frozen=True)
class Block:
    """One block of a model, as far as its cost goes; sizes count elements.

    Attributes:
        d_model: Width of the residual stream.
        heads: Query heads; 0 where something else stands in place of attention.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        window: Most keys that a query sees; None for all before it.
        mixer: Elements of the weight matrices of what stands in place of attention.
        width: Hidden width of the MLP, or of one expert.
        gated: The MLP multiplies an activation by a second projection.
        experts: Experts stored; 0 for a plain MLP.
        active: Experts that a token goes through.
        small: Parameters in no matrix product: biases, norms, short convolutions.
    """

    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    mixer: int
    width: int
    gated: bool
    experts: int = 0
    active: int = 0
    small: int = 0

    @property
    def query(self) -> int:
        """Elements of the query projection; those of the output projection are as many."""
        return self.d_model * self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Elements of the key and value projections together."""
        return 2 * self.d_model * self.kv_heads * self.head_dim

    @property
    def one_mlp(self) -> int:
        """Elements of the matrices of the MLP, or of one expert."""
        return (3 if self.gated else 2) * self.d_model * self.width

    @property
    def mlp(self) -> int:
        """Elements of the MLP's matrices that one token meets, the router's included."""
        return (self.active or 1) * self.one_mlp + self.d_model * self.experts

    @property
    def parameters(self) -> int:
        """All parameters of the block."""
        mlp = (self.experts or 1) * self.one_mlp + self.d_model * self.experts
        return 2 * self.query + self.key_value + self.mixer + mlp + self.small


@dataclass(frozen=True)
class Shape:
    """A causal language model, as far as its cost goes.

    Attributes:
        family: The config's `model_type`.
        blocks: From the first to the last.
        d_model: Width of the residual stream.
        vocabulary: Rows of the unembedding.
        parallel: Attention and MLP read the same residual, so that ablating a head leaves the MLP
            of its own block as it is.
        norms: Norms in a block.
        outside: Parameters in no block: embeddings, unembedding, last norm.
        context: Most tokens; None where the model has no limit of its own.
        dtype: Of the weights: float32, bfloat16 or float16.
        assumed: What the config leaves open and was assumed; empty for a known family.
    """

    family: str
    blocks: tuple[Block, ...]
    d_model: int
    vocabulary: int
    parallel: bool
    norms: int
    outside: int
    context: int | None
    dtype: str
    assumed: str = ""

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def heads(self) -> tuple[int, ...]:
        """Query heads of every block, 0 where a block has no attention."""
        return tuple(block.heads for block in self.blocks)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return BYTES[self.dtype]

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        return self.outside + sum(block.parameters for block in self.blocks)


def read_config(
    name: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """A model's config and nothing else of it.

    Args:
        name: A local folder or file, or a hub id.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        InputError: There is no such folder or model, or its config can't be read.
    """
    path = Path(name)
    if not path.exists() and (path.is_absolute() or str(name).startswith((".", "~"))):
        raise InputError(f"{name}: no such folder; give a local folder, a hub id or `testbed`")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{path}: not a model folder, it holds no config.json")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            str(name), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(
            f"{name}: its config can't be read: {first} Give a local folder with config.json, or "
            "a hub id that this machine can reach (`hf auth login` for gated models)"
        ) from error


def shape_of(config: Any, dtype: str = "auto") -> Shape:
    """Read a shape from a Hugging Face config.

    Args:
        config: Of a causal language model, or of one with vision beside: then its text part.
        dtype: What the weights are loaded in; `auto` is the config's own, float32 if it names
            none, as `load_model` does on a GPU.

    Raises:
        InputError: A field is missing, no layer has softmax attention, or the model has parts
            whose cost isn't known; the message names them.
    """
    config = config.get_text_config()
    kind = str(config.model_type)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{kind}: an encoder-decoder; head scores need a causal language model")
    if getattr(config, "num_attention_heads", None) is None:
        raise InputError(
            f"{kind}: the config names no num_attention_heads; head scores need softmax attention"
        )
    family, assumed = _family(config, kind)
    d_model = _field(config, "hidden_size")
    norms = family.norms
    parallel = _is(config, family.parallel)
    if kind == "falcon" and parallel:
        new = getattr(config, "new_decoder_architecture", False)
        norms = getattr(config, "num_ln_in_parallel_attn", None) or (2 if new else 1)
    layers = _layers(config, kind)
    vocabulary = _field(config, "vocab_size")
    context = getattr(config, "max_position_embeddings", None) or getattr(
        config, "max_seq_len", None
    )
    outside = vocabulary * d_model * (1 if config.tie_word_embeddings else 2)
    outside += family.norm_size * d_model + vocabulary * family.head_bias
    if family.learned_positions:
        outside += _field(config, "max_position_embeddings") * d_model
    return Shape(
        family=kind,
        blocks=tuple(_block(config, family, i, layer, norms) for i, layer in enumerate(layers)),
        d_model=d_model,
        vocabulary=vocabulary,
        parallel=parallel,
        norms=norms,
        outside=outside,
        context=context,
        dtype=_dtype(config, dtype),
        assumed=assumed,
    )


def _field(config: Any, *names: str) -> int:
    """The first of some fields that is set."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise InputError(f"{config.model_type}: the config names no {' or '.join(names)}; {REMEDY}")


def _is(config: Any, switch: bool | str) -> bool:
    return bool(getattr(config, switch, False)) if isinstance(switch, str) else switch


def _family(config: Any, kind: str) -> tuple[Family, str]:
    """The family, and in words what was assumed for one that isn't known."""
    if kind in FAMILIES:
        return FAMILIES[kind], ""
    uncounted = [name for name in config.to_dict() if name.startswith(UNCOUNTED)]
    if uncounted:
        raise InputError(f"{kind}: the config names {uncounted[0]}; {REMEDY}")
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation is None:
        raise InputError(f"{kind}: the config names no hidden_act; {REMEDY}")
    gated = str(activation) in ("silu", "swish")
    return Family(gated=gated), (
        f"{kind} is none of the families that were checked: its MLP is taken as "
        f"{'gated' if gated else 'not gated'} (its activation is {activation}), its blocks as "
        "attention first and MLP after"
    )


def _layers(config: Any, kind: str) -> Sequence[str]:
    """What kind of layer each block has."""
    count = _field(config, "num_hidden_layers")
    layers = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if layers is None:
        sliding = getattr(config, "sliding_window", None)
        return ["sliding_attention" if sliding else "full_attention"] * count
    if not set(layers) & set(ATTENTION):
        raise InputError(
            f"{kind}: no layer has softmax attention ({', '.join(sorted(set(layers)))}), so there "
            "is no head to score"
        )
    known = {*ATTENTION, "conv"} if kind == "lfm2" else set(ATTENTION)
    if unknown := sorted(set(layers) - known):
        raise InputError(f"{kind}: layers of type {unknown[0]}; {REMEDY}")
    return list(layers)[:count]


def _block(config: Any, family: Family, index: int, layer: str, norms: int) -> Block:
    d_model = _field(config, "hidden_size")
    width, experts = _mlp(config, d_model, index)
    small = norms * family.norm_size * d_model
    if _is(config, family.mlp_bias):
        small += d_model + width * (2 if family.gated else 1)
    heads = kv_heads = mixer = 0
    head_dim = _head_dim(config, d_model)
    if layer == "conv":
        mixer = 4 * d_model * d_model  # into three streams, and out
        bias = 5 * d_model if config.conv_bias else 0
        small += _field(config, "conv_L_cache") * d_model + bias
    else:
        heads = _field(config, "num_attention_heads")
        kv_heads = _kv_heads(config, heads)
        if _is(config, family.qkv_bias):
            small += (heads + 2 * kv_heads) * head_dim
        if _is(config, family.o_bias):
            small += d_model
        if _is(config, family.qk_norm):
            small += (heads + kv_heads if family.whole_qk_norm else 2) * head_dim
    window = getattr(config, ATTENTION[layer], None) if ATTENTION.get(layer) else None
    return Block(
        d_model=d_model,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        window=window,
        mixer=mixer,
        width=width,
        gated=family.gated,
        experts=experts,
        active=_field(config, "num_experts_per_tok") if experts else 0,
        small=small,
    )


def _head_dim(config: Any, d_model: int) -> int:
    return getattr(config, "head_dim", None) or d_model // _field(config, "num_attention_heads")


def _kv_heads(config: Any, heads: int) -> int:
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        return 1 if config.multi_query else heads
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    return heads


def _mlp(config: Any, d_model: int, index: int) -> tuple[int, int]:
    """Width of a block's MLP or of one of its experts, and the number of experts."""
    if config.model_type in ("gpt2", "gptj", "gpt_neo"):
        inner = getattr(config, "n_inner", None) or getattr(config, "intermediate_size", None)
        return inner or 4 * d_model, 0
    width = _field(config, "intermediate_size", "ffn_hidden_size", "ffn_dim")
    if config.model_type == "lfm2" and config.block_auto_adjust_ff_dim:
        # As Lfm2MLP of Transformers does.
        width = int((config.block_ffn_dim_multiplier or 1) * int(2 * width / 3))
        if config.block_ffn_dim_multiplier is not None:
            step = config.block_multiple_of
            width = step * ((width + step - 1) // step)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    dense = index in (getattr(config, "mlp_only_layers", None) or ())
    dense |= (index + 1) % (getattr(config, "decoder_sparse_step", None) or 1) != 0
    if not experts or dense:
        return width, 0
    return getattr(config, "moe_intermediate_size", None) or width, int(experts)


def _dtype(config: Any, wanted: str) -> str:
    name = wanted
    if wanted == "auto":
        name = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    if name not in BYTES:
        raise InputError(f"unknown dtype {name!r}; known are auto, {', '.join(BYTES)}")
    return name
