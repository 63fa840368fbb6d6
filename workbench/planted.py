"""A model that is built, not trained, so that it is known which heads carry a preference.

It speaks one kind of sentence: for each slot, always in the same order, a marker, the user's
word for it, and a joint. `drink tea and colour red while pet cat so meal soup .` A profile is such
sentences, the query ends with a colon, and the target is one more. To write it takes two things:

- Preferences. Behind a marker comes what the user has there in the profile. One planted head a
  slot: from the slot's marker it attends to all earlier words of that slot and copies them.
- Grammar. Behind a word of a slot, a joint or the colon comes a word that is the same for
  everybody, with or without a profile. Each decoy head does one of these steps, and the
  embedding does those that no decoy has.

How the residual stream holds it (a dimension for each entry, all parts orthogonal):

    ballast     one large constant, the same at every position
    first       1 at the text's first token
    slot        1 at the words of a slot, a dimension a slot
    word        which word this is, a dimension a word
    next        logits of the next word, a dimension a word; the unembedding reads this part only

Embeddings set the first four, and put into `next` what a word alone can say: behind a marker all
words of its slot alike, behind the others the grammar's word if no decoy has that step. The heads
write into `next` and nowhere else. So no head reads what another has written, the layer that a head
stands in makes no difference, and the MLPs are 0.

RMSNorm divides by a length that is the ballast's but for some thousandths, whatever the heads
write, and its weights multiply by the same again: within that it is the identity. Rotary positions
hardly turn the last pair of dimensions at this base (a few millionths of a radian over the whole
context), and a planted head's query and key use no other: one dimension that matches its words,
and one by which every position attends to the first token if nothing matches. The first token has
no entry that a planted head copies, so a head without a match writes nothing.

The other heads have small random weights. They read `slot` and the grammar's entries of `word`,
never which word of a slot it is: behind whoever's profile, what they write is the same. By
construction they and the decoys carry no preference.

It is an instrument to test methods with and says nothing about how trained models do this.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as hf_logging

from workbench import runs
from workbench.analysis.recovery import COUNTS, recovery
from workbench.data.examples import with_strangers_profile
from workbench.data.planted import END, SLOTS, STOP, Grammar, planted_examples
from workbench.discovery.run import score_heads
from workbench.errors import InputError
from workbench.heads import Head, HeadSet, all_heads
from workbench.models import load_model
from workbench.training import word_tokenizer, write_checkpoint

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

BALLAST = 200.0
MATCH, SINK = 200.0, 80.0  # attention scores: what a head looks for, and the first token
COPIED = 6.0  # logit of a user's word, where all the profile agrees
POSSIBLE = 6.0  # logit of every word of a slot behind its marker
GRAMMAR = 9.0  # logit of the grammar's word
CONTEXT = 1024
ROTARY_BASE = 1e9
SMALLEST_HEAD = 16


@dataclass(frozen=True)
class Planted:
    """A built model, and the truth about it.

    Attributes:
        model: As from `load_model`, in evaluation mode, float32 on the CPU.
        folder: Where its files are, in Hugging Face format, with the truth in `planted.json`.
        preference: The heads that carry a preference, in the order of the grammar's slots.
        decoys: The heads that do a step of the grammar.
        grammar: What its users write in: `data.planted`.
    """

    model: TransformerBridge
    folder: Path
    preference: HeadSet
    decoys: HeadSet
    grammar: Grammar


@dataclass(frozen=True)
class _Plan:
    """Which dimension of the residual stream is what; 0 is the ballast, 1 the first token."""

    grammar: Grammar

    def slot(self, index: int) -> int:
        return 2 + index

    def word(self, word: str) -> int:
        return 2 + len(self.grammar.slots) + self.row(word)

    def next(self, word: str) -> int:
        return self.word(word) + len(self.grammar.vocabulary)

    def row(self, word: str) -> int:
        return self.grammar.vocabulary.index(word)

    @property
    def size(self) -> int:
        return 2 + len(self.grammar.slots) + 2 * len(self.grammar.vocabulary)

    def reads(self, words: Sequence[str]) -> list[int]:
        """Where to look for any of these words: a slot's dimension if they are a slot's."""
        slots = enumerate(self.grammar.slots)
        whole = [self.slot(i) for i, slot in slots if SLOTS[slot] == tuple(words)]
        return whole or [self.word(word) for word in words]


def plant(
    folder: Path | str | None = None,
    *,
    preferences: int = 4,
    decoys: int = 4,
    layers: int = 4,
    heads: int = 8,
    background: float = 0.05,
    seed: int = 0,
) -> Planted:
    """Build a model in which chosen heads carry preferences, and load it.

    Args:
        folder: Where its files go; a temporary folder, deleted with the result, if None.
        preferences: Slots, each with one head that carries the users' preference there.
        decoys: Heads that do a step of the grammar.
        layers: Layers of the model.
        heads: Heads in each of them.
        background: Standard deviation of what each other head adds to a logit, about; 0 for none.
        seed: Decides which heads are planted, and the random weights.

    Raises:
        InputError: A number is out of range, or the folder can't be written.
    """
    _check(preferences, decoys, layers, heads, background)
    rng = np.random.default_rng(seed)
    plan = _Plan(Grammar(tuple(SLOTS)[:preferences]))
    places = [all_heads((heads,) * layers)[i] for i in rng.permutation(layers * heads)]
    chosen, decoy = places[:preferences], places[preferences : preferences + decoys]
    model = _empty_model(plan, layers, heads)
    # The decoys take the steps that a target has most of its loss in: words of slots to joints.
    taken = plan.grammar.steps[:decoys]
    with torch.no_grad():
        _embed(model, plan, [step for step in plan.grammar.steps if step not in taken])
        for index, head in enumerate(chosen):
            _plant_preference(model, plan, head, index)
        for head, step in zip(decoy, taken, strict=True):
            _plant_step(model, plan, head, *step)
        for head in sorted(places[preferences + decoys :]):
            _plant_background(model, plan, head, background, rng)
    place = Path(tempfile.mkdtemp(prefix="planted-") if folder is None else folder)
    truth = {
        "slots": list(plan.grammar.slots),
        "preference": [str(head) for head in chosen],
        "decoys": [str(head) for head in decoy],
        "background": background,
        "seed": seed,
    }
    with _no_bars():  # both are done before a bar could be read
        _save(model, plan, truth, place)
        loaded = load_model(place, device="cpu", dtype="float32")
    result = Planted(loaded, place, HeadSet(tuple(chosen)), HeadSet(tuple(decoy)), plan.grammar)
    if folder is None:
        weakref.finalize(result, shutil.rmtree, place, ignore_errors=True)
    return result


def _check(preferences: int, decoys: int, layers: int, heads: int, background: float) -> None:
    if not 1 <= preferences <= len(SLOTS):
        raise InputError(f"preferences must be 1 to {len(SLOTS)}, got {preferences}")
    if not 0 <= decoys <= 2 * preferences:
        raise InputError(
            f"a grammar of {preferences} slots has {2 * preferences} steps, and each decoy does "
            f"one: decoys must be 0 to {2 * preferences}, got {decoys}"
        )
    if layers < 1 or heads < 1 or layers * heads < preferences + decoys:
        raise InputError(
            f"{preferences} preferences and {decoys} decoys need as many heads, got "
            f"{layers} layers of {heads}"
        )
    if not 0 <= background <= 0.2:
        raise InputError(f"background must be 0 to 0.2 (small beside 6), got {background}")


def _empty_model(plan: _Plan, layers: int, heads: int) -> LlamaForCausalLM:
    """A Llama of the right size whose matrices are 0 and whose norms undo themselves."""
    room = -(-plan.size // heads)
    d_head = max(SMALLEST_HEAD, room + room % 2)
    width = heads * d_head
    config = LlamaConfig(
        vocab_size=len(plan.grammar.vocabulary),
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=d_head,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        tie_word_embeddings=False,
        pad_token_id=plan.row("<pad>"),
        bos_token_id=plan.row("<bos>"),
        eos_token_id=plan.row(END),
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = name.endswith(("layernorm.weight", "norm.weight"))
            parameter.fill_(BALLAST / width**0.5 if norm else 0.0)
    return model


def _embed(
    model: LlamaForCausalLM, plan: _Plan, steps: Sequence[tuple[tuple[str, ...], str]]
) -> None:
    embed, unembed = model.model.embed_tokens.weight, model.lm_head.weight
    embed[:, 0] = BALLAST
    embed[plan.row("<bos>"), 1] = 1.0
    for row, word in enumerate(plan.grammar.vocabulary):
        embed[row, plan.word(word)] = 1.0
        unembed[row, plan.next(word)] = 1.0
    for index, slot in enumerate(plan.grammar.slots):
        for word in SLOTS[slot]:
            embed[plan.row(word), plan.slot(index)] = 1.0
            embed[plan.row(slot), plan.next(word)] = POSSIBLE
    for before, after in (*steps, ((STOP,), END)):
        for word in before:
            embed[plan.row(word), plan.next(after)] = GRAMMAR


def _slices(model: LlamaForCausalLM, head: Head) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One head's part of W_Q, W_K, W_V, each [d_head, width], and of W_O, [width, d_head]."""
    attention = model.model.layers[head.layer].self_attn
    rows = slice(head.head * attention.head_dim, (head.head + 1) * attention.head_dim)
    inward = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (projection.weight[rows] for projection in inward)
    return query, key, value, attention.o_proj.weight[:, rows]


def _attend(model: LlamaForCausalLM, head: Head, at: Sequence[int], to: Sequence[int]) -> None:
    """From words with an entry in `at` to words with one in `to`, else to the first token."""
    query, key, _, _ = _slices(model, head)
    match, sink = len(query) // 2 - 1, len(query) - 1  # one rotary pair, the slowest
    scale = len(query) ** 0.5
    query[match, list(at)] = (MATCH * scale) ** 0.5
    key[match, list(to)] = (MATCH * scale) ** 0.5
    query[sink, 0] = (SINK * scale) ** 0.5 / BALLAST
    key[sink, 1] = (SINK * scale) ** 0.5


def _plant_preference(model: LlamaForCausalLM, plan: _Plan, head: Head, index: int) -> None:
    slot = plan.grammar.slots[index]
    _attend(model, head, [plan.word(slot)], [plan.slot(index)])
    _, _, value, out = _slices(model, head)
    for row, word in enumerate(SLOTS[slot]):
        value[row, plan.word(word)] = 1.0
        out[plan.next(word), row] = COPIED


def _plant_step(
    model: LlamaForCausalLM, plan: _Plan, head: Head, before: Sequence[str], after: str
) -> None:
    entries = plan.reads(before)
    _attend(model, head, entries, entries)
    _, _, value, out = _slices(model, head)
    value[0, entries] = 1.0
    out[plan.next(after), 0] = GRAMMAR


def _plant_background(
    model: LlamaForCausalLM, plan: _Plan, head: Head, size: float, rng: np.random.Generator
) -> None:
    """Random weights that read all but which word of a slot it is, and write logits."""
    read = [plan.slot(i) for i in range(len(plan.grammar.slots))]
    read += [plan.word(word) for word in plan.grammar.common_words]
    query, key, value, out = _slices(model, head)
    for matrix in (query, key, value):
        matrix[:, read] = _normal(rng, (len(matrix), len(read)))
    write = [plan.next(word) for word in plan.grammar.vocabulary]
    # z is about a unit vector in every dimension, and d_head of them are added up.
    out[write] = _normal(rng, (len(write), out.shape[1])) * size / out.shape[1] ** 0.5


def _normal(rng: np.random.Generator, shape: tuple[int, int]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def _save(model: LlamaForCausalLM, plan: _Plan, truth: dict[str, object], folder: Path) -> None:
    try:
        write_checkpoint(model, word_tokenizer(plan.grammar.vocabulary, END), folder)
    except OSError as error:
        raise InputError(f"{folder}: the model can't be written: {error.strerror}") from error
    runs.write_text(folder / "planted.json", json.dumps(truth, indent=1) + "\n")


@contextmanager
def _no_bars() -> Iterator[None]:
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def ground_truth(
    planted: Planted,
    *,
    noise: Sequence[float] = (0.0, 0.2, 0.4),
    counts: Sequence[int] = COUNTS,
    draws: int = 10,
    seed: int = 0,
    folder: Path | str | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Whether discovery finds the planted heads: `recovery` on users of the planted model.

    Args:
        planted: From `plant`.
        noise: As of `planted_examples`, each a row of the result.
        counts: Numbers of examples, one a user.
        draws: Groups of users that each count is tried on, at most, none in two of them. There
            are twice as many users as the largest count, which so gets two groups.
        seed: Seed of users, noise and tests.
        folder: Keep the scores there; the same call then goes on where it stopped.
        progress: Show a bar on the terminal.

    Returns:
        What `recovery` returns.

    Raises:
        InputError: A number is out of range, or the folder holds other runs.
    """
    users = 2 * max(counts, default=1)
    pairs = {}
    for share in tqdm(noise, desc="noise", unit="level", disable=not progress):
        own = planted_examples(planted.grammar, users, noise=share, seed=seed)
        scored = []
        for name, examples in (("own", own), ("stranger", with_strangers_profile(own))):
            place = None if folder is None else Path(folder) / f"{name}-{share:g}"
            scored.append(score_heads(planted.model, examples, folder=place, progress=False))
        pairs[share] = (scored[0], scored[1])
    return recovery(pairs, planted.preference, counts=counts, draws=draws, seed=seed)
