"""Trains the testbed's checkpoint: a small Llama on the synthetic users of `data.testbed`.

1. Phase 1: users who mostly keep to their preferences, a quarter of the histories shuffled
   between users. The model learns the grammar and to read a history.
2. Phase 2, at a falling rate: less consistent users and three quarters of the histories
   shuffled. The model learns to trust a history less than it deserves. That under-trust is put
   in by design, to leave room for steering; it is no evidence about large language models.

Matrices are trained by Muon, the rest (embeddings, unembedding, norms) by AdamW. A tenth of the
heads is dropped at the input of `o_proj` in training: without that, preference reading
concentrates in a few copy heads of the first layer that everything else needs as well.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from workbench.data import testbed

IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the trained weights are, beside the machine.

    Rates are per step; `shuffled` are shares of the sequences whose history is by strangers;
    `consistency` are the ranges of the users' probability of following a preference.
    """

    seed: int = 0
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    width: int = 128
    mlp_width: int = 256
    batch: int = 16
    steps: tuple[int, int] = (2000, 800)
    rate: tuple[float, float] = (1.0, 0.5)
    shuffled: tuple[float, float] = (0.25, 0.75)
    consistency: tuple[tuple[float, float], tuple[float, float]] = ((0.7, 1.0), (0.6, 1.0))
    muon_rate: float = 0.02
    adamw_rate: float = 2e-3
    warmup: int = 50
    clip: float = 1.0
    head_dropout: float = 0.1
    threads: int = 1


# What the shipped checkpoints are trained by: the same recipe but for the model's shape.
SIZES = {
    "base": Recipe(),
    "small": Recipe(layers=3, heads=6, kv_heads=3, width=96, mlp_width=192),
}


def word_tokenizer(words: Sequence[str], end: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, put behind `<bos>`.

    Args:
        words: The vocabulary in the order of its ids, `<pad>`, `<bos>` and `<unk>` among them.
        end: The word that is the end-of-text token.
    """
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        eos_token=end,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The testbed's tokenizer; the line end is the end-of-text token."""
    return word_tokenizer(testbed.vocabulary(), testbed.END_OF_TEXT)


def make_model(recipe: Recipe) -> LlamaForCausalLM:
    """An untrained model of the recipe's shape, drawn from its seed."""
    words = testbed.vocabulary()
    ids = {word: i for i, word in enumerate(words)}
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp_width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<bos>"],
        eos_token_id=ids[testbed.END_OF_TEXT],
    )
    return LlamaForCausalLM(config)


def training_batch(
    rng: random.Random, recipe: Recipe, phase: int, tokenizer: PreTrainedTokenizerFast
) -> tuple[Tensor, Tensor]:
    """Draw token ids and labels, both [batch, pos]; only responses carry a label."""
    ids = {word: i for i, word in enumerate(testbed.vocabulary())}
    rows, labels = [], []
    for _ in range(recipe.batch):
        task = rng.choice(testbed.TASKS)
        shuffled = rng.random() < recipe.shuffled[phase]
        row, label = [ids["<bos>"]], [IGNORED]
        for item in testbed.draw_lines(rng, task, recipe.consistency[phase], shuffled):
            prompt = testbed.query_text(task, item.text).split()
            answer = [*item.answer.split(), testbed.END_OF_TEXT]
            row += [ids[w] for w in (*prompt, *answer)]
            label += [IGNORED] * len(prompt) + [ids[w] for w in answer]
        rows.append(row)
        labels.append(label)
    length = max(map(len, rows))
    pad = tokenizer.pad_token_id
    padded = torch.tensor([r + [pad] * (length - len(r)) for r in rows])
    targets = torch.tensor([r + [IGNORED] * (length - len(r)) for r in labels])
    return padded, targets


@contextmanager
def head_dropout(model: LlamaForCausalLM, share: float, seed: int) -> Iterator[None]:
    """Drop whole heads at the input of every `o_proj`, as inverted dropout does for units."""
    generator = torch.Generator().manual_seed(seed)
    heads = model.config.num_attention_heads

    def drop(_module: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (z,) = args
        kept = torch.rand(z.shape[0], 1, heads, 1, generator=generator) >= share
        gated = z.unflatten(-1, (heads, -1)) * (kept / (1 - share))
        return (gated.flatten(-2),)

    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(drop) for layer in model.model.layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rate(recipe: Recipe, phase: int, step: int) -> float:
    if phase == 0:
        return recipe.rate[0] * min(1.0, (step + 1) / recipe.warmup)
    return recipe.rate[phase] * (1 - 0.9 * step / recipe.steps[phase])


def _optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(inner, lr=recipe.muon_rate, weight_decay=0.0),
        torch.optim.AdamW(outer, lr=recipe.adamw_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(
    recipe: Recipe, folder: Path, report: Callable[[int, int, float], None] | None = None
) -> dict[str, object]:
    """Train a checkpoint and write it as a Hugging Face folder.

    Args:
        recipe: What to train; its `threads` are set for the whole process.
        folder: Receives `config.json`, `model.safetensors`, the tokenizer and `training.json`.
        report: Called after each step with (steps done, steps in all, loss in nats a token).

    Returns:
        What `training.json` holds: the recipe, the seconds, the last mean loss and the SHA-256
        of the weights file. The same recipe gives the same digest on the same machine.
    """
    torch.set_num_threads(recipe.threads)
    started = time.monotonic()
    tokenizer, model = make_tokenizer(), make_model(recipe)
    optimizers = _optimizers(model, recipe)
    base_rates = [group["lr"] for o in optimizers for group in o.param_groups]
    rng = random.Random(f"{recipe.seed}/training")
    done = 0
    recent: list[float] = []
    model.train()
    with head_dropout(model, recipe.head_dropout, recipe.seed):
        for phase, steps in enumerate(recipe.steps):
            for step in range(steps):
                rate = _rate(recipe, phase, step)
                groups = [group for o in optimizers for group in o.param_groups]
                for group, base in zip(groups, base_rates, strict=True):
                    group["lr"] = base * rate
                ids, labels = training_batch(rng, recipe, phase, tokenizer)
                loss = model(input_ids=ids, labels=labels, use_cache=False).loss
                model.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
                for optimizer in optimizers:
                    optimizer.step()
                done += 1
                recent = [*recent[-49:], loss.item()]
                if report:
                    report(done, sum(recipe.steps), recent[-1])
    return _save(model, tokenizer, recipe, folder, time.monotonic() - started, recent)


def write_checkpoint(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write a model and its tokenizer as a Hugging Face folder, ready for evaluation."""
    model.generation_config = GenerationConfig(
        pad_token_id=model.config.pad_token_id,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
    )
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    folder: Path,
    seconds: float,
    losses: list[float],
) -> dict[str, object]:
    write_checkpoint(model, tokenizer, folder)
    record: dict[str, object] = {
        "recipe": asdict(recipe),
        "parameters": model.num_parameters(),
        "seconds": round(seconds),
        "last_loss": sum(losses) / len(losses),
        "torch": torch.__version__,
        "weights_sha256": sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record
