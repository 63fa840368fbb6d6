"""Texts as HTML: an example, its target coloured token by token, the next tokens, two answers.

Everything from data is escaped. A colour never stands alone: every coloured token has its number
under it. The page's own colours are taken where it has them, so that it reads on dark, too.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from plotly.colors import sample_colorscale

from workbench.data.examples import Example
from workbench.figures.labels import missing
from workbench.figures.template import DIVERGING, INK, PAPER, SEQUENTIAL

# A change smaller than this is drawn pale, however small the others are.
LEAST = 0.1
DARK = 0.62  # of the scale, from where on dark letters can't be read
MOST = 2000  # characters of a field
STYLE = """<style>
.wb-text {font: 13px/1.45 Arial, Helvetica, "Liberation Sans", "DejaVu Sans", sans-serif;
  color: var(--jp-ui-font-color1, #222222); overflow-wrap: anywhere}
.wb-text .wb-title {font-size: 16px}
.wb-text h4 {font-size: 13px; margin: 8px 0 3px}
.wb-text .wb-note {color: var(--jp-ui-font-color2, #5a5a5a)}
.wb-text ol {margin: 0; padding-left: 26px; max-height: 240px; overflow-y: auto}
.wb-text .wb-out {opacity: .62}
.wb-text li, .wb-text blockquote, .wb-text td {unicode-bidi: isolate}
.wb-text blockquote {margin: 0; padding: 2px 8px; white-space: pre-wrap;
  border-left: 3px solid var(--jp-border-color1, #bdbdbd)}
.wb-tokens {display: flex; flex-wrap: wrap; gap: 3px 1px; margin: 4px 0}
.wb-tokens > span {display: inline-flex; flex-direction: column; align-items: center}
.wb-tokens b {font-weight: normal; padding: 0 2px; border-radius: 2px; white-space: pre-wrap;
  min-width: 8px}
.wb-tokens small {font-size: 11px; color: var(--jp-ui-font-color2, #5a5a5a); padding: 0 3px}
.wb-text table {border-collapse: collapse; font-size: 13px; color: inherit}
.wb-text th, .wb-text td {padding: 2px 10px 2px 0; text-align: right;
  border-bottom: 1px solid var(--jp-border-color2, #e0e0e0)}
.wb-text th:first-child, .wb-text td:first-child {text-align: left; white-space: pre-wrap}
.wb-pair {display: flex; flex-wrap: wrap; gap: 6px 24px}
.wb-pair > div {flex: 1 1 280px; min-width: 0}
.wb-pair del {text-decoration: line-through 1.5px}
.wb-pair ins {text-decoration: underline 1.5px; font-weight: bold}
</style>"""


def example_text(example: Example, shown: Sequence[int] | None = None, cut_tokens: int = 0) -> str:
    """An example's profile, query and target.

    Args:
        example: Which.
        shown: Positions in the profile of the items that the prompt shows, the first one first;
            None for all.
        cut_tokens: How many tokens the token budget cost the prompt.

    Returns:
        HTML. Items that the prompt doesn't show stand below the others, paler.
    """
    order = range(len(example.profile)) if shown is None else shown
    rest = [i for i in range(len(example.profile)) if i not in set(order)]
    items = [f"<li>{_item(example.profile[i])}</li>" for i in order]
    items += [f'<li class="wb-out">{_item(example.profile[i])}</li>' for i in rest]
    note = f"{len(order)} of {len(example.profile)} items are in the prompt"
    note += f", {len(rest)} paler ones are not" if rest else ""
    note += f"; the token budget cut {cut_tokens:,} tokens" if cut_tokens else ""
    profile = f"<ol>{''.join(items)}</ol>" if items else "<p>no profile</p>"
    return _page(
        f"<h4>Profile of <bdi>{_escape(example.user)}</bdi> "
        f'<span class="wb-note">({note})</span></h4>'
        f"{profile}<h4>Query</h4><blockquote>{_escape(example.query)}</blockquote>"
        f"<h4>Target: what the user wrote</h4><blockquote>{_escape(example.target)}</blockquote>"
    )


def token_change(table: xr.Dataset, view: str = "ablated") -> str:
    """A target's tokens, coloured by what each one's log-probability gains or loses.

    Args:
        table: Of `workbench.token_change`.
        view: `ablated`: red where a token is likelier with the heads than without. `steered`: red
            where steering makes it likelier than the plain model.

    Returns:
        HTML with, under each token, its change in nats. The mean over the tokens that count in
        the loss stands in the first line; for `ablated` it is the PCS of the heads, removed
        together.

    Raises:
        ValueError: The view is neither.
    """
    if view not in ("ablated", "steered"):
        raise ValueError(f"view must be ablated or steered, got {view!r}")
    plain, other = table["plain"].values, table[view].values
    change = plain - other if view == "ablated" else other - plain
    # A plausibility cut takes all probability from the tokens below it.
    left, counted = np.isfinite(change), table["counted"].values
    rated = change[counted & left]
    mean = f"{rated.mean():+.4f} nats per token" if len(rated) else "no token is left"
    if counted.sum() < len(counted):
        mean += f", over the {counted.sum()} of {len(counted)} tokens that count"
    if not left.all():
        mean += f" ({(~left).sum()} of {len(left)} are ruled out by the cut and left out here)"
    end = max(float(abs(change[left]).max(initial=0.0)), LEAST)
    texts = table["text"].values.tolist()
    tokens = _coloured(texts, change.tolist(), end, DIVERGING, True, counted.tolist())
    heads, name = _escape(table.attrs["heads"]), _escape(table.attrs["example"])
    if view == "ablated":
        said = f"{name}: PCS of {heads}, removed together: {mean}. Red: likelier with them"
    else:
        said = f"{name}: {_escape(table.attrs['contrast'])}, heads {heads}: {mean}. "
        said += "Red: steering makes it likelier"
    return _page(f"<div>{said}; colours up to ±{end:.2g}.</div>{tokens}", table.attrs["heads"])


def next_tokens(table: xr.Dataset) -> str:
    """The likeliest next tokens as a table: plain, ablated, steered.

    Args:
        table: Of `workbench.next_tokens`.

    Returns:
        HTML; an arrow marks the token that the user wrote. Where it is none of the likeliest, a
        line says so.
    """
    rows = []
    for one in table["candidate"].values.tolist():
        row = table.sel(candidate=one)
        mark = " ←" if bool(row["target"]) else ""
        cells = "".join(f"<td>{float(row[name]):.4f}</td>" for name in _VIEWS)
        rows.append(f"<tr><td>{_token(str(row['text'].item()))}{mark}</td>{cells}</tr>")
    head = "".join(f"<th>{name}</th>" for name in _VIEWS)
    before = str(table.attrs["before"])
    place = f"behind “{_escape(before[-60:].strip())}”" if before.strip() else "first token"
    written = bool(table["target"].values.any())
    note = "← what the user wrote" if written else "what the user wrote is none of them"
    about = ", ".join(str(table.attrs[key]) for key in ("example", "contrast"))
    said = f"{_escape(about)}, heads {_escape(table.attrs['heads'])}"
    return _page(
        f"<div>Probability of the next token, {place}; {said}. "
        f'<span class="wb-note">{note}</span></div>'
        f"<table><thead><tr><th>token</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def side_by_side(
    words: Sequence[tuple[str, str]],
    pieces: Sequence[str] = (),
    kl: Sequence[float] = (),
    name: str = "steered",
) -> str:
    """Two answers side by side, their different words marked, and what each step cost.

    Args:
        words: In order, with the text that each is in: `same` for both, `plain` or `steered`.
        pieces: The text of each token of the steered answer.
        kl: By how many nats each of its steps was moved.
        name: What the steered answer was written by.

    Returns:
        HTML, in which words of the plain answer only are struck out, those of the steered one
        only are underlined. Under each token of the steered answer stand its nats.
    """
    left = " ".join(
        _escape(word) if of == "same" else f"<del>{_escape(word)}</del>"
        for of, word in words
        if of != "steered"
    )
    right = " ".join(
        _escape(word) if of == "same" else f"<ins>{_escape(word)}</ins>"
        for of, word in words
        if of != "plain"
    )
    spent = [0.0 if missing(value) else float(value) for value in kl]
    cost = ""
    if pieces:
        end = max(*spent, LEAST) if len(spent) > 1 else max(spent[0], LEAST)
        cost = f"<h4>KL spent at each step: {sum(spent):.3f} nats in all</h4>" + _coloured(
            pieces, spent[: len(pieces)], end, SEQUENTIAL, False
        )
    return _page(
        f"<div class='wb-pair'><div><h4>plain</h4><blockquote>{left or '(nothing)'}</blockquote>"
        f"</div><div><h4>{_escape(name)}</h4><blockquote>{right or '(nothing)'}</blockquote></div>"
        f"</div>{cost}"
    )


def title(head: str, below: str) -> str:
    """A figure's title and its lines, where it has no room for them itself; both are HTML."""
    return _page(f'<div class="wb-title">{head}</div><div class="wb-note">{below}</div>')


_VIEWS = ("plain", "ablated", "steered")


def _coloured(
    texts: Sequence[str],
    values: Sequence[float],
    end: float,
    scale: Sequence[str],
    signed: bool,
    counted: Sequence[bool] | None = None,
) -> str:
    """Tokens on the colours of their values, which run up to `end`; paler where none counts."""
    places = [min(max(value / end, -1.0), 1.0) for value in values]
    points = [(place + 1) / 2 for place in places] if signed else places
    colors = sample_colorscale(list(scale), [min(max(point, 0.0), 1.0) for point in points])
    spec = "+.2f" if signed else ".2f"
    counts = counted or [True] * len(texts)
    spans = []
    for text, value, place, color, is_in in zip(texts, values, places, colors, counts, strict=True):
        ink = PAPER if abs(place) > DARK else INK
        number = f"{value:{spec}}" if math.isfinite(value) else "cut"
        pale = "" if is_in else ' class="wb-out"'
        spans.append(
            f'<span title="{value:+.4f} nats"{pale}><b style="background:{color};color:{ink}">'
            f"{_token(text)}</b><small>{number}</small></span>"
        )
    return f'<div class="wb-tokens">{"".join(spans)}</div>'


def _token(text: str) -> str:
    """A token's text with its ends to be seen."""
    shown = text.replace("\n", "⏎")
    return _escape(shown).replace(" ", "&nbsp;") or "&nbsp;"


def _item(item: Mapping[str, str]) -> str:
    return "; ".join(f"{_escape(name)}: {_escape(value)}" for name, value in item.items())


def _escape(text: object) -> str:
    whole = str(text)
    short = whole if len(whole) <= MOST else f"{whole[:MOST]} …"
    return html.escape(short)


def _page(body: str, heads: str | None = None) -> str:
    about = "" if heads is None else f' data-heads="{html.escape(heads)}"'
    return f'{STYLE}<div class="wb-text"{about}>{body}</div>'
