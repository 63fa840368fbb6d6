"""Retrieval heads: the heads that copy a needle out of a long text.

1. A probe is one row of tokens: filler, in it a needle, at the end a cue, and the needle again.
2. The row goes through the model once. A step is a position at the end of the row that predicts a
   token of the repeated needle; a head copies at a step if its highest attention weight lies on
   a position inside the first needle that holds the very token that the step predicts.
3. A head's copy score on a probe is the share of steps at which it copies.

Source:
    Wu et al. 2024, "Retrieval Head Mechanistically Explains Long-Context Factuality"
    (arXiv 2404.15574), where heads of 0.1 or more count as retrieval heads; DeCoRe (Gema et al.
    2024, arXiv 2410.18860) masks the highest. There the model writes freely, and can only copy
    what it writes right: a model that can't answer has no retrieval heads. Here the needle is
    fed, and every head gets the same steps. There text and needle are prose with a question, as
    in `text_probes`; those of `random_probes` any model can be asked to repeat.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import binom
from tqdm.auto import tqdm

from workbench import stats
from workbench.discovery.patterns import read_patterns
from workbench.errors import InputError
from workbench.heads import HeadSet, top_k
from workbench.models import context_length, heads_per_layer

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

THRESHOLD = 0.1  # of Wu et al.
LEVEL = 0.05
LENGTH = 256
# What to do about a model whose attention can't be read.
INSTEAD = "import a published list of scores instead (workbench retrieval-heads MODEL --from FILE)"


@dataclass(frozen=True)
class CopyProbe:
    """One row of tokens that asks for a needle in it.

    Attributes:
        ids: All tokens, the repeated needle at the end. The last one is predicted, never fed.
        start: Position of the needle's first token in the text.
        stop: Position behind its last token.
        steps: How many tokens at the end of the row the heads are scored on.

    Raises:
        InputError: The needle or a scored token lies outside the row, or they overlap.
    """

    ids: tuple[int, ...]
    start: int
    stop: int
    steps: int

    def __post_init__(self) -> None:
        if not (self.steps >= 1 and 0 <= self.start < self.stop <= len(self.ids) - self.steps):
            raise InputError(
                f"a probe of {len(self.ids)} tokens can't hold a needle from {self.start} to "
                f"{self.stop} before its {self.steps} scored tokens"
            )

    @property
    def chance(self) -> float:
        """Copy score to expect of a head whose top position is any visible one at random."""
        needle = self.ids[self.start : self.stop]
        first = len(self.ids) - self.steps
        # The step that predicts position p sees the p tokens before it.
        shares = [needle.count(self.ids[p]) / p for p in range(first, len(self.ids))]
        return sum(shares) / self.steps


# Probes


def random_probes(
    model: TransformerBridge,
    count: int = 32,
    *,
    lengths: Sequence[int] | None = None,
    needle_tokens: int = 10,
    cue_tokens: int = 2,
    seed: int = 0,
) -> list[CopyProbe]:
    """Needles of random tokens in random tokens, asked for by their own beginning.

    A small model may copy in prose and not here: `text_probes` then tells more.

    Args:
        model: Names the vocabulary, of which special tokens and those without a letter or digit
            are left out.
        count: How many; their depths are spread evenly from the text's beginning to its end.
        lengths: Tokens in a row, taken in turn; by default 256, or the model's context if that is
            shorter. A head that sees a window only can't reach a needle beyond it.
        needle_tokens: Tokens in a needle, all different; none of them is in the filler.
        cue_tokens: How many of them the cue repeats; the others are scored.
        seed: Of the tokens.

    Raises:
        InputError: The lengths don't fit the needle or the model, or it has too few tokens.
    """
    if not 1 <= cue_tokens < needle_tokens:
        raise InputError(
            f"the cue must have 1 to {needle_tokens - 1} of the needle's {needle_tokens} tokens, "
            f"got {cue_tokens}"
        )
    vocabulary = ordinary_tokens(model)
    if len(vocabulary) <= needle_tokens:
        raise InputError(
            f"needles of {needle_tokens} tokens need a larger vocabulary than this model's "
            f"{len(vocabulary)} ordinary tokens"
        )
    rng = np.random.default_rng(seed)
    probes = []
    for length, depth in _places(model, count, lengths):
        drawn = rng.permutation(vocabulary)
        needle, others = drawn[:needle_tokens].tolist(), drawn[needle_tokens:]
        filler = rng.choice(others, length).tolist()
        cue = needle[:cue_tokens]
        probes.append(_assemble(model, filler, needle, cue, needle[cue_tokens:], length, depth))
    return probes


def text_probes(
    model: TransformerBridge,
    text: str,
    needles: Sequence[str],
    *,
    cue: str | None = None,
    lengths: Sequence[int] | None = None,
) -> list[CopyProbe]:
    """Needles of prose in prose: the paper's kind of probe, with the answer fed.

    Args:
        model: Its tokenizer reads the texts.
        text: Filler, repeated where it is too short; a needle may fall into a sentence.
        needles: Sentences. Each makes one probe, for probes of one needle don't tell more than
            one about another needle; their depths are spread evenly.
        cue: A question. If None, the needle's first two tokens, which then aren't scored.
        lengths: As in `random_probes`.

    Raises:
        InputError: A text is empty, a needle is there twice, or the lengths don't fit the
            needles or the model.
    """
    filler = _encode(model, text)
    answers = [_encode(model, needle) for needle in needles]
    least = 3 if cue is None else 1
    if not filler or min(map(len, answers), default=0) < least or len(set(needles)) < len(needles):
        raise InputError(
            f"wanted a text and different needles of {least} or more tokens each, got "
            f"{len(filler)} tokens of text and needles of {[len(a) for a in answers]}"
        )
    probes = []
    for (length, depth), needle in zip(_places(model, len(answers), lengths), answers, strict=True):
        before = needle[:2] if cue is None else _encode(model, cue)
        answer = needle[2:] if cue is None else needle
        probes.append(_assemble(model, filler, needle, before, answer, length, depth))
    return probes


def _assemble(
    model: TransformerBridge,
    filler: list[int],
    needle: list[int],
    cue: list[int],
    answer: list[int],
    length: int,
    depth: float,
) -> CopyProbe:
    tokenizer = model.tokenizer
    # What the tokenizer was made with: TransformerLens names one where there is none (Qwen2).
    named = tokenizer.init_kwargs.get("bos_token")
    first = [] if named is None else [tokenizer.bos_token_id]
    room = length - len(first) - len(needle) - len(cue) - len(answer)
    if room < 1:
        raise InputError(f"a probe needs {1 - room} more tokens than the {length} asked for")
    text = (filler * (room // len(filler) + 1))[:room]
    place = round(depth * room)
    start = len(first) + place
    ids = (*first, *text[:place], *needle, *text[place:], *cue, *answer)
    return CopyProbe(ids, start, start + len(needle), len(answer))


def _places(
    model: TransformerBridge, count: int, lengths: Sequence[int] | None
) -> list[tuple[int, float]]:
    """Length and depth, a fraction of the filler, of every probe."""
    context = context_length(model)
    lengths = [min(LENGTH, context)] if lengths is None else lengths
    if count < 1 or not lengths or max(lengths) > context:
        raise InputError(
            f"wanted 1 or more probes of at most {context} tokens (the model's context), got "
            f"{count} of {list(lengths)}"
        )
    n, each = len(lengths), -(-count // len(lengths))
    return [(lengths[i % n], (i // n + 0.5) / each) for i in range(count)]


def ordinary_tokens(model: TransformerBridge) -> list[int]:
    """Ids of a model's tokens that hold a letter or digit and are neither special nor a byte."""
    tokenizer = model.tokenizer
    rows = min(len(tokenizer), model.original_model.get_input_embeddings().weight.shape[0])
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = [i for i in range(rows) if i not in special]
    names, texts = tokenizer.convert_ids_to_tokens(ids), tokenizer.batch_decode([[i] for i in ids])
    return [
        i
        for i, name, text in zip(ids, names, texts, strict=True)
        # <0x41> is a byte that stands in where the vocabulary has no token.
        if any(map(str.isalnum, text)) and not re.fullmatch("<.*>", name or "<>")
    ]


def _encode(model: TransformerBridge, text: str) -> list[int]:
    return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])


# Scores


def copied(top: NDArray[np.integer[Any]], probe: CopyProbe) -> NDArray[np.bool_]:
    """Whether a head copies.

    Args:
        top: Position of a head's highest attention weight at each step, [..., step].
        probe: What was fed.

    Returns:
        True where that position is inside the needle and holds the token the step predicts.
    """
    ids = np.asarray(probe.ids)
    inside = (top >= probe.start) & (top < probe.stop)
    return inside & (ids[top] == ids[-probe.steps :])


def copy_scores(
    model: TransformerBridge,
    probes: Sequence[CopyProbe] | None = None,
    *,
    batch_tokens: int = 8192,
    progress: bool = True,
) -> xr.DataArray:
    """How much of the needle each head copies, probe by probe.

    Attention patterns are read, nothing is changed. Of each layer only the top position of the
    scored rows is kept; the model itself holds one layer's pattern, [batch, head, pos, pos].

    Args:
        model: The model.
        probes: What to ask; 32 of `random_probes` by default.
        batch_tokens: Most tokens in a forward pass; a single longer probe still makes a batch.
        progress: Show a bar.

    Returns:
        Copy scores [probe, layer, head], fractions; NaN where there is no such head. Coordinates
        of each probe: `length` (tokens), `steps`, and `chance`, the score to expect of a head
        that looks at random.

    Raises:
        InputError: There is no probe, a layer's pattern can't be read, a probe is longer than
            the model's context, or the weights are NaN.
    """
    probes = random_probes(model) if probes is None else probes
    shape = heads_per_layer(model)
    if not probes:
        raise InputError("copy scores need a probe, got none")
    longest, context = max(len(probe.ids) for probe in probes), context_length(model)
    if longest > context:
        raise InputError(f"a probe has {longest} tokens, and the model's context is {context}")
    scores = np.full((len(probes), len(shape), max(shape)), np.nan)
    groups: dict[tuple[int, int], list[int]] = {}
    for i, probe in enumerate(probes):
        groups.setdefault((len(probe.ids), probe.steps), []).append(i)
    with tqdm(total=len(probes), desc="copying", unit="probe", disable=not progress) as bar:
        for (length, steps), members in groups.items():
            size = max(1, batch_tokens // length)
            for rows in (members[i : i + size] for i in range(0, len(members), size)):
                ids = [probes[i].ids for i in rows]
                tops = read_patterns(model, ids, steps, lambda p: p.argmax(dim=-1), INSTEAD)
                for layer, top in tops.items():
                    for row, place in zip(rows, top, strict=True):
                        scores[row, layer, : shape[layer]] = copied(place, probes[row]).mean(-1)
                bar.update(len(rows))
    coordinates = {
        "layer": range(len(shape)),
        "head": range(max(shape)),
        "length": ("probe", [len(probe.ids) for probe in probes]),
        "steps": ("probe", [probe.steps for probe in probes]),
        "chance": ("probe", [probe.chance for probe in probes]),
    }
    return xr.DataArray(scores, coordinates, ("probe", "layer", "head"), name="copy_score")


# Heads


@dataclass(frozen=True)
class RetrievalHeads:
    """The heads that copy most, and whether they copy at all.

    Attributes:
        heads: The K highest, with the tie rule of `top_k`.
        scores: `mean`, `low` and `high` [layer, head]: mean over probes and its 95 % interval.
        above_chance: Heads that copy on more probes than one that looks at random would, highest
            first. The test is one of all heads together: of models with no head that copies, at
            most one in twenty has any here.
        chance: Score of a head that looks at random.
    """

    heads: HeadSet
    scores: xr.Dataset
    above_chance: HeadSet
    chance: float

    @property
    def above_threshold(self) -> int:
        """Heads with a mean of at least 0.1, which Wu et al. call retrieval heads."""
        return int((self.scores["mean"] >= THRESHOLD).sum())

    @property
    def note(self) -> str:
        """What the scores allow to say, in a sentence or two."""
        of = f"{int(self.scores['mean'].notnull().sum())} heads"
        if not len(self.above_chance):
            return (
                f"no head copies: none of {of} is above chance ({self.chance:.4f}), and nothing "
                "tells this set from random heads"
            )
        said = (
            f"{len(self.above_chance)} of {of} copy more than chance ({self.chance:.4f}), and "
            f"{self.above_threshold} score {THRESHOLD:g} or more"
        )
        missed = sum(head not in self.above_chance for head in self.heads)
        return said + (f"; {missed} of the {len(self.heads)} taken are not above it" * bool(missed))


def retrieval_heads(scores: xr.DataArray, k: int, seed: int = 0) -> RetrievalHeads:
    """The K heads with the highest mean copy score.

    Args:
        scores: From `copy_scores`.
        k: How many.
        seed: Of the resampling.

    Raises:
        InputError: There is a single probe, or K is below 1 or above the number of heads.
    """
    count = scores.sizes["probe"]
    if count < 2:
        raise InputError("a head's interval is over probes and needs at least 2, got 1")
    present = ~np.isnan(scores.values[0])
    numbers = np.full((3, *present.shape), np.nan)
    values = scores.values[:, present]
    numbers[:, present] = stats.bootstrap_mean(values, np.arange(count), seed=seed)
    above = np.full(present.shape, np.nan)
    above[present] = np.where(_chance_p(scores, present) < LEVEL, numbers[0, present], np.nan)
    found = int((~np.isnan(above)).sum())
    named = zip(("mean", "low", "high"), numbers, strict=True)
    coordinates = {"layer": scores["layer"], "head": scores["head"]}
    return RetrievalHeads(
        heads=top_k(numbers[0], k),
        scores=xr.Dataset({n: (("layer", "head"), part) for n, part in named}, coordinates),
        above_chance=top_k(above, found) if found else HeadSet(()),
        chance=float(scores["chance"].mean()),
    )


def _chance_p(scores: xr.DataArray, present: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The p of each head that is present, adjusted for all of them, that it looks at random.

    Such a head copies something on a probe with at most the sum of its steps' chances, however
    its steps hang together. Probes with different sums are counted as if all had their mean,
    which makes many hits more likely, never less (Hoeffding 1956).
    """
    hits = (scores.values[:, present] > 0).sum(axis=0)
    any_step = float((scores["steps"] * scores["chance"]).mean())
    return stats.holm(binom.sf(hits - 1, scores.sizes["probe"], min(1.0, any_step)))
