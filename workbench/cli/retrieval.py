"""`workbench retrieval-heads`: the heads that DeCoRe masks, found or imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workbench.cli import options as opt
from workbench.errors import InputError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from workbench.discovery.copying import CopyProbe

_PROBES = "Probes"


def retrieval_heads(
    model: opt.Model = "testbed",
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Import a published list of scores (JSON) instead of probing.",
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Size of the head set.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Write the head set to this JSON file.")] = None,
    probes: Annotated[
        int, typer.Option(min=2, help="How many random probes.", rich_help_panel=_PROBES)
    ] = 32,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a probe; 256 or the model's context if unset.",
            rich_help_panel=_PROBES,
        ),
    ] = None,
    needle_tokens: Annotated[
        int, typer.Option(help="Tokens in a random needle.", rich_help_panel=_PROBES)
    ] = 10,
    text: Annotated[
        Path | None,
        typer.Option(help="Probe in this text, not random tokens.", rich_help_panel=_PROBES),
    ] = None,
    needles: Annotated[
        Path | None,
        typer.Option(
            help="Sentences to hide in --text, one a line and a probe.", rich_help_panel=_PROBES
        ),
    ] = None,
    cue: Annotated[
        str | None,
        typer.Option(
            help="Question that asks for them; their own beginning if unset.",
            rich_help_panel=_PROBES,
        ),
    ] = None,
    device: opt.Device = None,
    dtype: opt.Dtype = "auto",
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    threads: opt.Threads = None,
    batch_tokens: opt.BatchTokens = 8192,
    seed: opt.Seed = 0,
    as_json: opt.Json = False,
) -> None:
    """Find the heads that copy a needle out of a text (for DeCoRe), or import a published list."""
    _check(source, out, text, needles, cue)
    bridge = opt.open_model(model, device, dtype, revision, trust_remote_code, threads)
    if source is not None:
        result = _imported(bridge, source, k)
    else:
        if text is not None and needles is not None:
            asked = _text_probes(bridge, text, needles, cue, length)
        else:
            asked = _random_probes(bridge, probes, length, needle_tokens, seed)
        result = _probed(bridge, asked, k, seed, batch_tokens, progress=not as_json)
    heads = result.pop("set")
    if out is not None:
        try:
            heads.save(out)
        except OSError as error:
            raise InputError(f"{out}: can't be written: {error.strerror}") from None
        result["written"] = str(out)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        _show(result)


def _check(
    source: Path | None, out: Path | None, text: Path | None, needles: Path | None, cue: str | None
) -> None:
    """Refuse what can't work before the model is loaded."""
    if out is not None and not out.absolute().parent.is_dir():
        raise InputError(f"{out}: there is no folder {out.absolute().parent}; make it first")
    given = {"--text": text, "--needles": needles, "--cue": cue}
    named = [name for name, value in given.items() if value is not None]
    if source is not None and named:
        raise InputError(f"{', '.join(named)}: only for probing, and --from imports a list")
    if named and (text is None or needles is None):
        raise InputError(f"{', '.join(named)}: give both --text and --needles")


def _imported(bridge: TransformerBridge, path: Path, k: int) -> dict[str, Any]:
    import numpy as np

    from workbench.heads import read_head_scores, top_k
    from workbench.models import heads_per_layer

    shape = heads_per_layer(bridge)
    scores = read_head_scores(path, shape)
    heads = top_k(scores, k)
    known = int((~np.isnan(scores)).sum())
    return {
        "source": str(path),
        "set": heads,
        "heads": [{"head": str(h), "score": float(scores[h.layer, h.head])} for h in heads],
        "ties": heads.ties,
        "note": f"imported: scores of {known} of the model's {sum(shape)} heads",
    }


def _random_probes(
    bridge: TransformerBridge, count: int, length: int | None, needle: int, seed: int
) -> list[CopyProbe]:
    from workbench.discovery.copying import random_probes

    lengths = None if length is None else [length]
    return random_probes(bridge, count, lengths=lengths, needle_tokens=needle, seed=seed)


def _text_probes(
    bridge: TransformerBridge, text: Path, needles: Path, cue: str | None, length: int | None
) -> list[CopyProbe]:
    from workbench.discovery.copying import text_probes

    lengths = None if length is None else [length]
    lines = [line.strip() for line in _read(needles).splitlines() if line.strip()]
    return text_probes(bridge, _read(text), lines, cue=cue, lengths=lengths)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: isn't UTF-8 text") from None


def _probed(
    bridge: TransformerBridge,
    probes: list[CopyProbe],
    k: int,
    seed: int,
    batch_tokens: int,
    progress: bool,
) -> dict[str, Any]:
    from workbench.discovery import copying
    from workbench.heads import check_k
    from workbench.models import heads_per_layer

    check_k(k, sum(heads_per_layer(bridge)))
    scores = copying.copy_scores(bridge, probes, batch_tokens=batch_tokens, progress=progress)
    found = copying.retrieval_heads(scores, k, seed)
    rows = []
    for head in found.heads:
        cell = found.scores.sel(layer=head.layer, head=head.head)
        rows.append(
            {
                "head": str(head),
                "score": float(cell["mean"]),
                "low": float(cell["low"]),
                "high": float(cell["high"]),
                "above_chance": head in found.above_chance,
            }
        )
    return {
        "source": f"{len(probes)} probes of {len(probes[0].ids)} tokens",
        "set": found.heads,
        "heads": rows,
        "ties": found.heads.ties,
        "chance": found.chance,
        "above_chance": [str(head) for head in found.above_chance],
        "above_threshold": found.above_threshold,
        "note": found.note,
    }


def _show(result: dict[str, Any]) -> None:
    out = Console(highlight=False)
    probed = "chance" in result
    title = f"\nCopy score, {result['source']}" if probed else f"\nScores of {result['source']}"
    table = Table(title=escape(title), title_justify="left")
    for name in ("head", "score", *(["95 % interval", "above chance"] if probed else [])):
        table.add_column(name, justify="right")
    for row in result["heads"]:
        cells = [row["head"], f"{row['score']:.4f}"]
        if probed:
            cells += [
                f"{row['low']:.4f} to {row['high']:.4f}",
                "yes" if row["above_chance"] else "",
            ]
        table.add_row(*cells)
    out.print(table)
    if result["ties"]:
        out.print(f"{result['ties']} more heads tie with the last one; lower layers go first")
    out.print(f"- {escape(result['note'])}")
    if "written" in result:
        out.print(f"Head set: {escape(result['written'])}", soft_wrap=True)
