"""Models: from a hub id, a local folder or the built-in testbed to a `TransformerBridge`."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from hashlib import file_digest, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.data.testbed import BUILT_IN, located
from workbench.errors import InputError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

TESTBED = "testbed"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_model(
    name: str | Path = TESTBED,
    *,
    device: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> TransformerBridge:
    """Load a causal language model as a `TransformerBridge`.

    Args:
        name: `testbed`, `testbed-small`, a local folder in Hugging Face format, or a hub id.
        device: `cpu`, `cuda`, `cuda:1`; by default the GPU where there is one.
        dtype: `float32`, `bfloat16`, `float16`; `checkpoint` is the checkpoint's own, `auto`
            that on a GPU and float32 on a CPU.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Run Python code that comes with the model. Off unless asked for.

    Raises:
        InputError: The model can't be found or read, or has no attention heads that can be
            hooked.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformers.utils import logging as hf_logging

    device = choose_device(device)
    built_in = str(name) in BUILT_IN
    path = Path(located(name))
    local = path.is_dir()
    if not local and (path.is_absolute() or str(name).startswith((".", "~"))):
        raise InputError(f"{name}: no such folder")
    if local and not (path / "config.json").is_file():
        raise InputError(f"{path}: not a model folder, it holds no config.json")
    if local and not any(path.glob("*.safetensors")):
        raise InputError(
            f"{path}: holds no safetensors; convert the checkpoint with Transformers' "
            "`save_pretrained` (pickled weights are not read)"
        )
    source = str(path) if local else str(name)
    # The bridge announces its conversions on the root logger; that is no news to a user.
    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    wanted = _dtype(source, device, dtype, revision, trust_remote_code)
    bars = hf_logging.is_progress_bar_enabled()
    if built_in:
        hf_logging.disable_progress_bar()  # it is loaded before a bar could be read
    try:
        # Weights made in inference mode could never be part of a gradient.
        with torch.inference_mode(False):
            model = TransformerBridge.boot_transformers(
                source,
                device=device,
                dtype=wanted,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(
            f"{name}: the model can't be loaded: {first}. Give a local folder with config.json "
            "and safetensors, or a hub id that this machine can reach (`hf auth login` for gated "
            "models)"
        ) from error
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    heads_per_layer(model)
    model.eval()
    return model


def choose_device(name: str | None) -> str:
    """The device asked for, or the GPU where there is one.

    Raises:
        InputError: There is no such device, or torch doesn't see it.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise InputError(f"unknown device {name!r}; give cpu, cuda or cuda:1") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name}: this machine's torch sees no CUDA GPU; use cpu")
    return name


def _dtype(
    source: str, device: str, dtype: str, revision: str | None, trust_remote_code: bool
) -> torch.dtype:
    if dtype not in ("auto", "checkpoint"):
        if dtype not in DTYPES:
            known = ", ".join(("auto", "checkpoint", *DTYPES))
            raise InputError(f"unknown dtype {dtype!r}; known are {known}")
        return DTYPES[dtype]
    if device == "cpu" and dtype == "auto":
        return torch.float32
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: its config can't be read: {error}") from error
    return config.dtype or torch.float32


def heads_per_layer(model: TransformerBridge) -> tuple[int, ...]:
    """Number of query heads in every block, 0 where a block has no attention.

    Under grouped-query attention these are the query heads: z has one slice for each of them.

    Raises:
        InputError: No block has attention with a `hook_z`.
    """
    counts = [0] * model.cfg.n_layers
    for layer, block in model.blocks_with("attn"):
        if f"blocks.{layer}.attn.hook_z" in model.hook_dict:
            config = getattr(block.attn, "config", None)
            counts[layer] = int(getattr(config, "n_heads", None) or model.cfg.n_heads)
    if not any(counts):
        raise InputError(
            f"{model.cfg.model_name}: no attention head can be hooked: no block has an "
            "`attn.hook_z` in TransformerLens; head scores need softmax attention"
        )
    return tuple(counts)


def context_length(model: TransformerBridge) -> int:
    """Most tokens the model takes."""
    return int(model.cfg.n_ctx)


def pad_token(model: TransformerBridge) -> int:
    """A token id for padding; it is masked, so any valid one will do."""
    tokenizer = model.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows = model.original_model.get_input_embeddings().weight.shape[0]
    # The bridge may name a padding token that the embedding has no row for.
    return int(pad) if pad is not None and pad < rows else 0


def token_texts(model: TransformerBridge, ids: Sequence[int]) -> list[str]:
    """The text of each token as it stands behind the one before, with the space between them."""

    def text(part: Sequence[int]) -> str:
        return str(model.tokenizer.decode(list(part), clean_up_tokenization_spaces=False))

    pieces = [text(ids[:1])] if ids else []
    for i in range(1, len(ids)):
        before, both = text(ids[i - 1 : i]), text(ids[i - 1 : i + 1])
        # A character in several tokens reads otherwise without its other half.
        pieces.append(
            both.removeprefix(before) if both.startswith(before) else text(ids[i : i + 1])
        )
    return pieces


def weights_id(model: TransformerBridge) -> str:
    """What tells these weights from others: SHA-256 of the files, or the hub's commit."""
    config = model.original_model.config
    folder = Path(config._name_or_path)
    if not folder.is_dir():
        return f"commit:{getattr(config, '_commit_hash', None)}"
    digest = sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def tensors_id(model: TransformerBridge) -> str:
    """What tells the model as it is in memory from others, whatever was done since it was loaded.

    A merged adapter or an edited matrix leaves the files as they are. Bits are added up as
    integers, which gives the same on every device, beside a sample that knows their order.
    """
    inner = model.original_model
    config = inner.config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version", "_attn_implementation"):
        config.pop(name, None)
    digest = sha256(json.dumps(config, sort_keys=True, default=str).encode())
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, tensor in sorted(
        {**dict(inner.named_parameters()), **dict(inner.named_buffers())}.items()
    ):
        bits = tensor.detach().contiguous().view(-1).view(words[tensor.element_size()])
        sample = bits[:: max(1, bits.numel() // 1024) | 1].tolist()
        digest.update(f"{name} {tuple(tensor.shape)} {int(bits.sum())} {sample}".encode())
    return digest.hexdigest()


def describe(model: TransformerBridge) -> dict[str, Any]:
    """What a manifest says of a model."""
    shape = heads_per_layer(model)
    name = Path(model.cfg.model_name)
    return {
        # A folder may move; its weights are told apart by their digest.
        "model": name.resolve().name if name.is_dir() else str(name),
        "architecture": str(model.cfg.architecture),
        "weights": weights_id(model),
        "tensors": tensors_id(model),
        "heads_per_layer": list(shape),
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
    }
