"""Users as vectors, from what their profiles say: what they are clustered and routed by.

| embedder | what it makes of a text |
|---|---|
| `Tfidf` | word weights learnt from the discovery users, reduced by truncated SVD (the default) |
| `Encoder` | the mean of an encoder's last hidden states, as the paper's all-MiniLM-L6-v2 |
| `Residual` | the mean of the model's own residual stream at a middle layer |

All scale a vector to length 1, as that encoder does: distances then compare what is said and not
how much of it. A text that an embedder knows no word of is the zero vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workbench.batches import by_length, last_logits
from workbench.data.examples import Example
from workbench.data.prompts import Prompt
from workbench.data.tasks import TEXT, get_task
from workbench.errors import InputError
from workbench.models import context_length, tensors_id

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ITEMS = 5  # of a profile, and
TOKENS = 256  # of its text: both as in section 5 of the paper
WORD = r"(?u)\b\w+\b"  # also of one letter: a rating is a word of its own
WORDS = 50_000  # most that are learnt; the more frequent ones
KINDS = ("tfidf", "residual")


def profile_texts(examples: Sequence[Example], items: int = ITEMS) -> dict[str, str]:
    """One text a user, in order of appearance: the fields of profile items, an item a line.

    The items are the first ones of the user's first example of each task. Only field values are
    taken, without the words that a prompt puts around them, which are every user's; neither
    queries nor answers are in the text.

    Args:
        examples: By the users in question.
        items: How many of a profile.

    Raises:
        InputError: A user has no profile text, so nothing to be routed by.
    """
    lines: dict[str, dict[str, list[str]]] = {}
    for example in examples:
        fields = get_task(example.task).fields
        rows = [" ".join(item[name] for name in fields) for item in example.profile[:items]]
        lines.setdefault(example.user, {}).setdefault(example.task, rows)
    texts = {
        user: "\n".join(row for rows in tasks.values() for row in rows)
        for user, tasks in lines.items()
    }
    for user, text in texts.items():
        if not text.strip():
            raise InputError(
                f"user {user} has no profile text to be clustered or routed by; leave the user's "
                "examples out"
            )
    return texts


class Embedder(ABC):
    """From texts to vectors, the same for users seen now and later."""

    kind: str

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors [text, dim], of length 1."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What a file must hold to make it again, as JSON."""

    @property
    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """And the numbers that go with it."""
        return {}


@dataclass(frozen=True, eq=False)
class Tfidf(Embedder):
    """Term frequency times inverse document frequency, reduced by truncated SVD.

    Attributes:
        vocabulary: The words, in the order of the columns.
        idf: Inverse document frequency of each.
        components: Directions of most weight, [dim, word].
    """

    vocabulary: tuple[str, ...]
    idf: NDArray[np.float32]
    components: NDArray[np.float32]
    kind = "tfidf"

    @classmethod
    def fit(cls, texts: Sequence[str], dims: int = 64, seed: int = 0) -> Tfidf:
        """Learn words and directions.

        Args:
            texts: Of users who are not those to be routed later.
            dims: Most directions; fewer where there are fewer texts or words.
            seed: Of the randomised decomposition.

        Raises:
            InputError: There are fewer than two texts, or no word in them.
        """
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        if len(texts) < 2:
            raise InputError(f"TF-IDF is learnt from two users or more, got {len(texts)}")
        vectorizer = TfidfVectorizer(token_pattern=WORD, max_features=WORDS)
        try:
            weights = vectorizer.fit_transform(texts)
        except ValueError:
            raise InputError(
                "the profiles hold no word to learn from; take another embedder"
            ) from None
        rank = max(1, min(dims, len(texts) - 1, weights.shape[1] - 1))
        svd = TruncatedSVD(rank, random_state=seed)
        with np.errstate(
            divide="ignore", invalid="ignore"
        ):  # equal texts have no variance to explain
            svd.fit(weights)
        words = tuple(map(str, vectorizer.get_feature_names_out()))
        idf, components = (a.astype(np.float32) for a in (vectorizer.idf_, svd.components_))
        return cls(words, idf, components)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See `Embedder.embed`."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(token_pattern=WORD, vocabulary=list(self.vocabulary))
        vectorizer.idf_ = self.idf
        return _unit(vectorizer.transform(texts) @ self.components.T)

    @property
    def settings(self) -> dict[str, Any]:
        """See `Embedder.settings`."""
        return {"kind": self.kind, "vocabulary": list(self.vocabulary)}

    @property
    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """See `Embedder.arrays`."""
        return {"idf": self.idf, "components": self.components}


@dataclass(frozen=True)
class Encoder(Embedder):
    """A sentence encoder by Transformers: the mean of its last hidden states over all tokens.

    Attributes:
        source: A folder, or an id on the hub that is in the local cache, such as
            `sentence-transformers/all-MiniLM-L6-v2`. Its weights must be safetensors.
        tokens: Most tokens of a text; the rest is cut off.
        batch: Texts at a time.

    Raises:
        InputError: When first used: there is no such encoder, or it can't be read.
    """

    source: str
    tokens: int = TOKENS
    batch: int = 32
    kind = "encoder"

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.source)
            model = AutoModel.from_pretrained(self.source, use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(
                f"no encoder at {self.source}: {reason}. Give the folder of one with a tokenizer "
                'and safetensors weights, or embed with "tfidf" or "residual"'
            ) from None
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        return tokenizer, model.eval()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See `Embedder.embed`."""
        tokenizer, model = self._parts
        limit = min(self.tokens, getattr(model.config, "max_position_embeddings", self.tokens))
        means = []
        for start in range(0, len(texts), self.batch):
            batch = tokenizer(
                list(texts[start : start + self.batch]),
                padding=True,
                truncation=True,
                max_length=limit,
                return_tensors="pt",
            )
            hidden = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).last_hidden_state
            means.append(_masked_mean(hidden, batch["attention_mask"]))
        return _unit(torch.cat(means).numpy())

    @property
    def settings(self) -> dict[str, Any]:
        """See `Embedder.settings`."""
        return {"kind": self.kind, "source": self.source, "tokens": self.tokens}


@dataclass(frozen=True, eq=False)
class Residual(Embedder):
    """The model's own residual stream behind one block, averaged over a text's tokens.

    The first position is left out: models gather much of their attention there, and a vector that
    is large and the same for all texts would drown the others.

    Attributes:
        model: From `load_model`.
        layer: Behind which block; None for the one in the middle.
        tokens: Most tokens of a text; the rest is cut off.
        batch_tokens: Most tokens of a batch, padding counted.

    Raises:
        InputError: The model has no such block.
    """

    model: TransformerBridge
    layer: int | None = None
    tokens: int = TOKENS
    batch_tokens: int = 8192
    kind = "residual"

    def __post_init__(self) -> None:
        blocks = self.model.cfg.n_layers
        if self.layer is None:
            object.__setattr__(self, "layer", (blocks - 1) // 2)
        elif not 0 <= self.layer < blocks:
            raise InputError(f"wanted a layer between 0 and {blocks - 1}, got {self.layer}")

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See `Embedder.embed`."""
        prompts = [self._prompt(text) for text in texts]
        means = torch.zeros(len(texts), self.model.cfg.d_model)
        seen: list[Tensor] = []

        def keep(hidden: Tensor, hook: Any) -> None:
            seen.append(hidden)

        for rows, batch in by_length(self.model, prompts, self.batch_tokens):
            mask = batch.attention_mask
            first = (mask.cumsum(dim=1) == 1) & (mask == 1)
            mask = mask.masked_fill(first & (mask.sum(dim=1, keepdim=True) > 1), 0)
            with self.model.hooks(fwd_hooks=[(f"blocks.{self.layer}.hook_out", keep)]):
                last_logits(self.model, batch, 1)  # one position's are the fewest
            means[rows] = _masked_mean(seen.pop(), mask).cpu()
        return _unit(means.numpy())

    def _prompt(self, text: str) -> Prompt:
        tokenizer = self.model.tokenizer
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id, *ids]
        if not ids:
            raise InputError(f"a profile has no tokens for this model: {text!r:.60}")
        kept = ids[: min(self.tokens, context_length(self.model))]
        return Prompt(Example("profile", "", TEXT, text, "", ()), tuple(kept), (), ())

    @property
    def settings(self) -> dict[str, Any]:
        """See `Embedder.settings`."""
        model = tensors_id(self.model)
        return {"kind": self.kind, "layer": self.layer, "tokens": self.tokens, "model": model}


def make_embedder(
    kind: str, texts: Sequence[str], model: TransformerBridge | None = None
) -> Embedder:
    """An embedder by name.

    Args:
        kind: `tfidf`, `residual`, or the folder or hub id of an encoder.
        texts: Of the users that there is something to be learnt from.
        model: Whose residual stream.

    Raises:
        InputError: `residual` without a model, or what the embedder refuses.
    """
    if kind == "tfidf":
        return Tfidf.fit(texts)
    if kind != "residual":
        return Encoder(kind)
    if model is None:
        raise InputError("the residual stream of which model? Give model=")
    return Residual(model)


def load_embedder(
    settings: Mapping[str, Any],
    arrays: Mapping[str, NDArray[np.float32]],
    model: TransformerBridge | None = None,
) -> Embedder:
    """The embedder that `settings` and `arrays` were taken from.

    Raises:
        InputError: The kind is unknown, or it is the residual stream of another model.
        KeyError: A part is missing.
    """
    kind = settings["kind"]
    if kind == "tfidf":
        return Tfidf(tuple(settings["vocabulary"]), arrays["idf"], arrays["components"])
    if kind == "encoder":
        return Encoder(settings["source"], settings["tokens"])
    if kind != "residual":
        raise InputError(f"unknown embedder {kind!r}; known are {', '.join(KINDS)} and encoder")
    if model is None or tensors_id(model) != settings["model"]:
        raise InputError("users were embedded by the residual stream of a model; give model= it")
    return Residual(model, settings["layer"], settings["tokens"])


def _masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the positions of a mask, in float32, [rows, dim]."""
    weights = mask[..., None].float()
    return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)


def _unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Rows of length 1; a row of zeros stays one."""
    values = np.asarray(rows, dtype=np.float64)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    scaled = np.divide(values, lengths, out=np.zeros_like(values), where=lengths > 0)
    return scaled.astype(np.float32)
