"""What runs the views: the checkpoint's own modules, or the bridge with its hooks.

The own modules are several times faster. Before they are used for a model, they are held against
the bridge with `head_gates` on two short prompts of different lengths; where they differ, the
next slower way is taken, and said so.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, get_args

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from workbench.batches import takes_logits_to_keep
from workbench.discovery.twin import NotReplayableError
from workbench.errors import InputError
from workbench.heads import Head, HeadSet
from workbench.hooks import head_gates
from workbench.models import heads_per_layer, pad_token
from workbench.steering.attention import ATTENTION
from workbench.steering.contrast import Ablated
from workbench.steering.layout import Layout, Views
from workbench.steering.native import Native, Prefill
from workbench.steering.session import MaskedSession, Session, SharedSession, why_not_shared

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# How far the log-probabilities of two right ways may lie apart: sums in another order, and in 16
# bits every activation rounded (on the testbed .03 nats a token in 1 of 20 for bfloat16).
ROUNDING = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.7}
# From the fastest to the slowest: attention function, and views told apart inside the model.
WAYS = ((ATTENTION, True), ("eager", True), (ATTENTION, False), ("eager", False))
HELD = "_workbench_engine"
# A layout that the modules don't have shows in many ways, and there is always a slower way.
FAILURES = (
    NotReplayableError,
    *(TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError),
)
GAP = 0.7  # most error of what gating changes, as a share of it
PROBES = (5, 9)  # tokens of the prompts that are compared


class HookedSession(Session):
    """A batch decoded by the bridge: every view a row, the heads gated by `head_gates`."""

    def __init__(
        self,
        model: TransformerBridge,
        rows: Sequence[Sequence[int]],
        layout: Layout,
        room: int,
        pad: int,
    ) -> None:
        super().__init__(torch.device(model.cfg.device), rows, layout, room, pad)
        self.model = model
        self.cache: Any = None
        self.options = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}

    def start(self) -> Views:
        """See `Session.start`."""
        return self._run(self.tokens)

    def step(self, tokens: Int[Tensor, " examples"]) -> Views:
        """See `Session.step`."""
        self.width += 1
        return self._run(self._fed(tokens))

    def _run(self, tokens: Tensor) -> Views:
        count, narrow = self.examples, self.examples + len(self.layout.others)
        rows = torch.tensor([*range(narrow), *self.layout.gated], device=self.device)
        gates = torch.cat((torch.ones(narrow, *self.layout.gates.shape[1:]), self.layout.gates))
        past = {"use_cache": True} if self.cache is None else {"past_key_values": self.cache}
        with head_gates(self.model, gates):
            logits, self.cache = self.model(
                tokens[rows],
                attention_mask=self.mask[rows, : self.width],
                return_type="logits_and_cache",
                **past,
                **self.options,
            )
        logits = logits[:, -1]
        return Views(logits[:count], logits[count:narrow], logits[narrow:])

    def select(self, examples: Sequence[int]) -> None:
        """See `Session.select`."""
        count, narrow = self.examples, self.examples + len(self.layout.others)
        self.layout, others, gated = self.layout.select(examples)
        kept = [*examples, *(count + row for row in others)]
        wide = torch.tensor([*kept, *(narrow + row for row in gated)], device=self.device)
        self.cache.reorder_cache(wide)
        self.mask = self.mask[kept]


@dataclass
class Engine:
    """A model ready to be decoded.

    Attributes:
        model: The bridge.
        native: Its own modules; None where they can't be used, for the reason in `why_not`.
        why_not: Why faster ways were passed over.
        shared: Whether a shared prefill was compared, and what came of it.
        tensors: The bridge's parameters as they were when the engine was made.
    """

    model: TransformerBridge
    native: Native | None
    why_not: tuple[str, ...] = ()
    shared: dict[str, str | None] = field(default_factory=dict)
    tensors: dict[str, tuple[Tensor, int | None]] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = self._tensors()

    def _tensors(self) -> dict[str, tuple[Tensor, int | None]]:
        """Every parameter, and how often it was changed where the modules don't hold it.

        The bridge keeps queries, keys and values of one fused projection apart, partly as copies.
        """
        native = self.native.twin if self.native is not None else self.model.original_model
        held = {id(t) for t in chain(native.parameters(), native.buffers())}
        every = self.model.original_model.named_parameters(remove_duplicate=False)
        return {
            name: (t, None if id(t) in held or t.is_inference() else t._version)
            for name, t in every
        }

    @property
    def current(self) -> bool:
        """Whether the modules are still those of the model, or would have to be made anew."""
        now = self._tensors()
        return now.keys() == self.tensors.keys() and all(
            one[0] is now[name][0] and one[1] == now[name][1] for name, one in self.tensors.items()
        )

    def session(
        self,
        rows: Sequence[Sequence[int]],
        layout: Layout,
        room: int,
        prefill: Prefill = "masked",
    ) -> Session:
        """Begin a batch.

        Args:
            rows: Token ids of the examples' prompts, and behind them those of `layout.others`.
            layout: The views.
            room: Most tokens to come.
            prefill: Whether views without heads read the prompt without them, too.

        Raises:
            InputError: The model can't do what is asked for.
        """
        if prefill not in get_args(Prefill):
            raise InputError(f"prefill must be masked or shared, got {prefill!r}")
        pad = pad_token(self.model)
        if self.native is None:
            if layout.early or (prefill == "shared" and layout.gated):
                what = "DoLa" if layout.early else 'prefill="shared"'
                raise InputError(
                    f"{what} needs the model's own modules, which can't be used here: "
                    + "; ".join(self.why_not)
                )
            return HookedSession(self.model, rows, layout, room, pad)
        if prefill == "masked" or not layout.gated:
            return MaskedSession(self.native, rows, layout, room, pad)
        longest = max(map(len, rows)) + room
        reason = why_not_shared(self.native, longest) or self._compare_shared()
        if min(map(len, rows)) < 2:
            reason = "a prompt is a single token"
        if reason is not None:
            raise InputError(f'prefill="shared" can\'t be used: {reason}; take "masked"')
        return SharedSession(self.native, rows, layout, room, pad)

    def _compare_shared(self) -> str | None:
        if "reason" not in self.shared and self.native is not None:
            try:
                self.shared["reason"] = _shared_mistake(self.model, self.native)
            except FAILURES as error:
                self.shared["reason"] = _in_words(error)
        return self.shared["reason"]


def open_engine(model: TransformerBridge) -> Engine:
    """The fastest way of decoding a model that agrees with the bridge; kept for the next call.

    A tensor that was put into the model since makes it a new one; one that was changed in place
    is seen anyway, since it is the same.
    """
    held: Engine | None = model.__dict__.get(HELD)
    if held is not None and held.current:
        return held
    why_not: list[str] = []
    engine = None
    for attention, splits in WAYS:
        name = f"{attention} attention{'' if splits else ', views apart from the input on'}"
        found = _tried(model, attention, splits)
        if isinstance(found, Native):
            engine = Engine(model, found, tuple(why_not))
            break
        why_not.append(f"{name}: {found}")
    if engine is None:
        engine = Engine(model, None, tuple(why_not))
        tqdm.write(
            "decoding through the bridge's hooks, several times slower, since "
            + "; ".join(why_not),
            file=sys.stderr,
        )
    model.__dict__[HELD] = engine  # on the model itself, so that both go together
    return engine


def _tried(model: TransformerBridge, attention: str, splits: bool) -> Native | str:
    """The modules, run in one way, if they agree with the bridge; otherwise why not."""
    try:
        native = Native(model, attention, splits)
        return _mistake(model, native) or native
    except FAILURES as error:
        return _in_words(error)


def _in_words(error: Exception) -> str:
    if isinstance(error, torch.AcceleratorError):
        raise error  # a GPU that is lost is no matter of layout
    if isinstance(error, NotReplayableError):
        return str(error).split(". ")[0]
    return f"{type(error).__name__}: {[*str(error).strip().splitlines(), ''][0]}"


@torch.inference_mode()
def _mistake(model: TransformerBridge, native: Native) -> str | None:
    """How far the modules are from the bridge with hooks, in words; None if they agree."""
    layout, rows = _probe(model)
    session = MaskedSession(native, rows, layout, 2, pad_token(model))
    found, new = _two_steps(session, len(rows))
    right: list[Tensor] = []  # both views' logits of the first step, by the bridge
    for view, gate in enumerate((None, layout.gates[0])):
        whole = [_whole(model, [*row, *new[i]], gate) for i, row in enumerate(rows)]
        for step in range(2):
            wanted = torch.stack(
                [logits[len(row) - 1 + step] for logits, row in zip(whole, rows, strict=True)]
            )
            if (mistake := _apart(found[step][view], wanted, model)) is not None:
                return mistake
            right += [wanted] if step == 0 else []
    return _gap_mistake(found[0], (right[0], right[1]))


def _gap_mistake(found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> str | None:
    """Whether gating does what it should: in 16 bits rounding could hide that it does nothing."""
    gap, wanted = (
        gated.float().log_softmax(-1) - full.float().log_softmax(-1)
        for full, gated in (found, right)
    )
    off, size = float((gap - wanted).norm()), float(wanted.norm())
    if off <= GAP * size or size == 0:
        return None
    return f"what it changes to remove heads is off by {off / size:.0%}"


@torch.inference_mode()
def _shared_mistake(model: TransformerBridge, native: Native) -> str | None:
    """The same for a shared prefill, held against the bridge going on from a plain cache."""
    layout, rows = _probe(model)
    session = SharedSession(native, rows, layout, 2, pad_token(model))
    found, new = _two_steps(session, len(rows))
    for i, row in enumerate(rows):
        tokens = torch.tensor([row], device=model.cfg.device)
        _, cache = model(tokens[:, :-1], return_type="logits_and_cache", use_cache=True)
        with head_gates(model, layout.gates[0]):
            for step, token in enumerate((row[-1], new[i][0])):
                fed = torch.tensor([[token]], device=model.cfg.device)
                logits, cache = model(fed, return_type="logits_and_cache", past_key_values=cache)
                if (m := _apart(found[step][1][i][None], logits[:, -1], model)) is not None:
                    return m
    return None


def _probe(model: TransformerBridge) -> tuple[Layout, list[list[int]]]:
    """Two prompts of ordinary tokens, and a view without half the heads of the upper blocks.

    Where some blocks have no attention, it is every block that has: what the views do to the
    others is then seen, too.
    """
    shape = heads_per_layer(model)
    with_heads = [layer for layer, heads in enumerate(shape) if heads]
    chosen = with_heads[len(with_heads) // 2 :] if all(shape) else with_heads
    # Not the same in every block, and not the first ones only.
    picked = [
        (layer, (2 * i + layer) % shape[layer])
        for layer in chosen
        for i in range(-(-shape[layer] // 2))
    ]
    heads = HeadSet(tuple(Head(*place) for place in dict.fromkeys(picked)))
    words = model.original_model.get_input_embeddings().weight.shape[0]
    rows = [[(7 * i + 11 * n) % words for i in range(1, n + 1)] for n in PROBES]
    return Layout.of([Ablated(heads)] * len(rows), shape), rows


def _two_steps(session: Session, count: int) -> tuple[list[tuple[Tensor, Tensor]], list[list[int]]]:
    """Both views' logits of two steps, and the token between them."""
    first = session.start()
    token = first.full.argmax(dim=-1)
    second = session.step(token)
    new = [[int(token[i])] for i in range(count)]
    return [(views.full, views.gated) for views in (first, second)], new


def _whole(model: TransformerBridge, tokens: list[int], gate: Tensor | None) -> Tensor:
    """The bridge's logits at every position, without a cache."""
    gates = torch.ones(len(heads_per_layer(model)), max(heads_per_layer(model)))
    with head_gates(model, gates if gate is None else gate):
        ids = torch.tensor([tokens], device=model.cfg.device)
        logits: Tensor = model(ids, return_type="logits")[0]
    return logits


def _apart(found: Tensor, wanted: Tensor, model: TransformerBridge) -> str | None:
    apart = (found.float().log_softmax(-1) - wanted.float().log_softmax(-1)).abs().max()
    allowed = ROUNDING.get(model.cfg.dtype, ROUNDING[torch.float32])
    if bool(apart <= allowed):
        return None
    return f"log-probabilities are off by {float(apart):.2g} nats"
