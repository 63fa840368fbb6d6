"""Running a model from any block on, in the middle of which something was changed.

The model's own forward pass is used, with its blocks under control: those below the first one
wanted hand on what they get, the first one takes a given residual stream and a given attention
output, and the rest run as they are. Masks, rotary embeddings, experts, norms around attention
and all else that an architecture has are thereby its own.

Rows are padded on the right. Under causal attention nothing real can see what stands behind it,
so no padding mask is needed and the attention kernel's own causal path is taken. Attention goes
through a function that Transformers lets users register; there keys and values of a common
beginning are put in front, and the last block is told which positions are wanted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from workbench.discovery.twin import NotReplayableError, Place, ReadOut, build_twin, places
from workbench.hooks import gate_z

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ATTENTION = "workbench_rerun"
# A block's arguments that speak of positions; masks are made anew for the positions wanted.
POSITIONAL = ("position_embeddings", "position_ids")
MASKS = ("attention_mask", "causal_mask")


@dataclass
class Past:
    """Keys and values of tokens that stand before a batch's own.

    Attributes:
        length: How many tokens.
        keys: Keys and values by block, each [slots, head, pos, d_head].
        slots: Which slot belongs to each row of the batch.
    """

    length: int = 0
    keys: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    slots: Int[Tensor, " rows"] | None = None

    def before(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A batch's keys and values with the past in front of them."""
        if layer not in self.keys:
            return key, value
        k, v = (old[self.slots] for old in self.keys[layer])
        return torch.cat((k, key), dim=2), torch.cat((v, value), dim=2)


@dataclass
class Trace:
    """What an undisturbed pass keeps, by block.

    Attributes:
        resid: Residual stream that enters the block, [rows, pos, d_model].
        z: Input of the attention's output projection, [rows, pos, head * d_head].
        attn_out: What the attention module returns, [rows, pos, d_model].

    The last block's are kept at the wanted positions only, where it runs there only.
    """

    resid: dict[int, Tensor] = field(default_factory=dict)
    z: dict[int, Tensor] = field(default_factory=dict)
    attn_out: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Rerun:
    """One pass through the model, or through a part of it.

    Attributes:
        tokens: Token ids. The residual stream doesn't depend on them when `hidden` is given.
        keep: Columns wanted behind the last block; None when only keys and values are.
        first: The first block that runs.
        hidden: What enters it, [rows, pos, d_model]; None for what the model makes of the tokens.
        attn_out: What its attention returns, instead of running.
        past: What stands before the tokens.
        gates: What z is multiplied by, a layer's [rows, head], and what takes its place
            where it is below 1, [head, d_head] or None for zero.
        trace: Where to write what `Trace` says.
        store: Where to write keys and values.
    """

    tokens: Int[Tensor, "rows pos"]
    keep: Int[Tensor, "rows kept"] | None
    first: int = 0
    hidden: Float[Tensor, "rows pos d_model"] | None = None
    attn_out: Float[Tensor, "rows pos d_model"] | None = None
    past: Past = field(default_factory=Past)
    gates: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    trace: Trace | None = None
    store: Past | None = None


class _FinishedError(Exception):
    """Carries the result out of the model's forward pass, past what isn't wanted of it."""

    def __init__(self, hidden: Tensor | None) -> None:
        super().__init__("finished")
        self.hidden = hidden


class _KeysKnownError(Exception):
    """The last block's keys and values are there; nothing else of it is wanted here."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__("keys known")
        self.pair = key, value


class PartialModel:
    """A model that can be run from any block on.

    Args:
        model: From `load_model`. Its tensors are used, not copied.
        attention: The attention function that the model runs with.
        reduced: Run the last block, its keys and values apart, at wanted positions only. Needs
            the attention function of this module.

    Raises:
        NotReplayableError: The model isn't laid out as this needs it.
    """

    def __init__(
        self, model: TransformerBridge, attention: str = ATTENTION, reduced: bool = True
    ) -> None:
        self.twin = build_twin(model, attention)
        self.places: list[Place] = places(model, self.twin)
        self.last = len(self.places) - 1
        self.reduced = reduced and self.places[self.last].attention is not None
        self._natives: list[Callable[..., Any]] = [place.block.forward for place in self.places]
        self._signature = inspect.signature(self._natives[self.last])
        self._now: Rerun | None = None
        self.logits = ReadOut(self.twin)
        self._only_keys = False
        self._last_keys: tuple[Tensor, Tensor] | None = None
        self._tails: dict[tuple[str, int], int] = {}
        self._layers: dict[nn.Module, int] = {}
        for layer, place in enumerate(self.places):
            self._take_over(layer, place)

    @property
    def can_share(self) -> bool:
        """Whether tokens can be run behind a past: all that passes between them is attention."""
        takes = "position_ids" in inspect.signature(self.twin.forward).parameters
        return self.reduced and takes and all(place.attention is not None for place in self.places)

    def run(self, now: Rerun) -> Float[Tensor, "rows kept d_model"]:
        """What leaves the last block at the wanted positions."""
        hidden = self._forward(now)
        if hidden is None:
            raise ValueError("`keep` says which positions are wanted, and it is None")
        return hidden

    def keys(self, now: Rerun) -> None:
        """Fill `now.store` with keys and values; nothing more is computed than they need."""
        self._forward(now)

    def _forward(self, now: Rerun) -> Tensor | None:
        options = {}
        if now.past.length:
            start = now.past.length
            columns = torch.arange(start, start + now.tokens.shape[1], device=now.tokens.device)
            options["position_ids"] = columns[None]
        self._now = now
        try:
            self.twin(input_ids=now.tokens, use_cache=False, **options)
        except _FinishedError as finished:
            return finished.hidden
        finally:
            self._now = self._last_keys = None
        raise NotReplayableError("its blocks aren't run by its own forward pass")

    def _take_over(self, layer: int, place: Place) -> None:
        _replace_forward(place.block, self._block_forward(layer))
        if place.attention is None or place.output is None:
            return
        self._layers[place.attention] = layer
        place.attention.__dict__["workbench_rerun"] = self
        native = place.attention.forward
        _replace_forward(place.attention, self._attention_forward(layer, native))
        place.output.register_forward_pre_hook(self._at_z(layer))
        if layer == self.last and type(place.query) is nn.Linear:
            _replace_forward(place.query, self._query_forward(place.query))

    def _block_forward(self, layer: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            now = self._now
            if now is None:
                hidden = self.logits.hidden if layer == self.last else _hidden(args, kwargs)
                return self._like("block", layer, hidden)
            if layer < now.first:
                return self._like("block", layer, _hidden(args, kwargs))
            if layer == now.first and now.hidden is not None:
                args, kwargs = _with_hidden(args, kwargs, now.hidden)
            if now.trace is not None:
                now.trace.resid[layer] = _hidden(args, kwargs)
            if layer == self.last:
                raise _FinishedError(self._last_block(now, args, kwargs))
            return self._run_block(layer, args, kwargs)

        return forward

    def _run_block(self, layer: int, args: Any, kwargs: Any) -> Any:
        out = self._natives[layer](*args, **kwargs)
        self._tails["block", layer] = len(out) if isinstance(out, tuple) else 0
        return out

    def _last_block(self, now: Rerun, args: Any, kwargs: Any) -> Tensor | None:
        if not self.reduced:
            out = _first(self._run_block(self.last, args, kwargs))
            return None if now.keep is None else _at(out, now.keep)
        if now.attn_out is not None and now.first == self.last:
            # Everything given is at the wanted positions already, and no attention is run.
            return _first(self._run_block(self.last, args, kwargs))
        self._only_keys = True
        try:
            self._run_block(self.last, args, kwargs)
        except _KeysKnownError as known:
            self._last_keys = known.pair
        else:
            raise NotReplayableError("the last block's attention goes a way of its own")
        finally:
            self._only_keys = False
        if now.keep is None:
            return None
        given = self._at_kept(now.keep, args, kwargs)
        if now.trace is not None:
            now.trace.resid[self.last] = given["hidden_states"]
        return _first(self._run_block(self.last, (), given))

    def _at_kept(self, keep: Tensor, args: Any, kwargs: Any) -> dict[str, Any]:
        """The last block's arguments at the wanted positions."""
        given: dict[str, Any] = {}
        for name, value in self._signature.bind(*args, **kwargs).arguments.items():
            if self._signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                given.update(value)
            else:
                given[name] = value
        for name, value in given.items():
            if name in MASKS:
                given[name] = None
            elif name in POSITIONAL and isinstance(value, tuple):
                given[name] = tuple(_at(part, keep) for part in value)
            elif name in ("hidden_states", *POSITIONAL) and value is not None:
                given[name] = _at(value, keep)
            elif isinstance(value, Tensor) and value.ndim > 1:
                raise NotReplayableError(f"the last block takes a {name}")
        return given

    def _attention_forward(self, layer: int, native: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            now = self._now
            if now is not None and layer == now.first and now.attn_out is not None:
                return self._like("attention", layer, now.attn_out)
            out = native(*args, **kwargs)
            self._tails["attention", layer] = len(out) if isinstance(out, tuple) else 0
            if now is not None and now.trace is not None:
                now.trace.attn_out[layer] = _first(out)
            return out

        return forward

    def _query_forward(self, query: nn.Linear) -> Callable[[Tensor], Tensor]:
        native = query.forward

        def forward(hidden: Tensor) -> Tensor:
            if self._only_keys:  # no query is wanted; its shape is
                return hidden.new_zeros(()).expand(*hidden.shape[:-1], query.out_features)
            return native(hidden)

        return forward

    def _at_z(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            now = self._now
            if now is None:
                return None
            if now.trace is not None:
                now.trace.z[layer] = args[0]
            if layer not in now.gates:
                return None
            gate, mean = now.gates[layer]
            z = args[0].unflatten(-1, (gate.shape[1], -1))
            scale = gate.to(z)[:, None, :, None]
            z = gate_z(z, scale, None if mean is None else (1 - scale) * mean.to(z))
            return (z.flatten(-2), *args[1:])

        return hook

    def _like(self, kind: str, layer: int, hidden: Tensor | None) -> Any:
        """A result in the form that the module gives it in: bare, or the first of a tuple."""
        length = self._tails[kind, layer]
        return (hidden, *(None,) * (length - 1)) if length else hidden

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """What `AttentionInterface` asks for, behind the past and at the wanted positions."""
        now, layer = self._now, self._layers[module]
        if now is None:
            raise NotReplayableError("attention is run outside its block")
        length = query.shape[2]
        if self._last_keys is not None and now.keep is not None and layer == self.last:
            key, value = self._last_keys
            mask = _causal(now.keep + now.past.length, key.shape[2], options)
        else:
            if now.store is not None:
                now.store.keys[layer] = key, value
            key, value = now.past.before(layer, key, value)
            if self._only_keys and layer == self.last:
                raise _KeysKnownError(key, value)
            if now.past.length:
                columns = torch.arange(length, device=key.device)[None] + now.past.length
                mask = _causal(columns, key.shape[2], options)
        if options.get("softcap") is not None or options.get("s_aux") is not None:
            return written_out(query, key, value, mask, options)
        out, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
        return out, None


def _causal(
    positions: Int[Tensor, "rows queries"], keys: int, options: dict[str, Any]
) -> Bool[Tensor, "rows 1 queries keys"]:
    """Which keys a query sees: those up to its own place, in its window if it has one."""
    key = torch.arange(keys, device=positions.device)
    query = positions[:, None, :, None]
    seen = key <= query
    window = options.get("sliding_window")
    return seen if window is None else seen & (key > query - window)


def written_out(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, None]:
    """Attention with capped scores or with sinks, for which torch has no fast kernel."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scaling, cap, sinks = (options.get(name) for name in ("scaling", "softcap", "s_aux"))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if cap is not None:
        scores = (scores / cap).tanh() * cap
    if mask is None:
        positions = torch.arange(query.shape[2], device=query.device)[None]
        mask = _causal(positions, key.shape[2], {})
    lowest = torch.finfo(scores.dtype).min  # a row that sees nothing stays finite
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:  # a further column that takes its share and gives nothing
        column = sinks.reshape(1, -1, 1, 1).expand(len(scores), -1, scores.shape[2], 1)
        scores = torch.cat((scores, column.to(scores)), dim=-1)
    pattern = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (pattern[..., : key.shape[2]] @ value).transpose(1, 2).contiguous(), None


def _attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    partial: PartialModel = module.__dict__["workbench_rerun"]
    return partial.attend(module, *args, **kwargs)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """In this one module, which belongs to the twin; its class is left alone."""
    module.__dict__["forward"] = forward


def _hidden(args: Any, kwargs: Any) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _with_hidden(args: Any, kwargs: Any, hidden: Tensor) -> tuple[Any, Any]:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _first(out: Any) -> Tensor:
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first


def _at(values: Tensor, keep: Int[Tensor, "rows kept"]) -> Tensor:
    """Columns of [rows or 1, pos, ...] for each row."""
    rows = torch.arange(len(keep), device=keep.device)[:, None]
    return values.expand(len(keep), *values.shape[1:])[rows, keep]
