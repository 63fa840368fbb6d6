"""`workbench steer`: answers, plain and steered, side by side or as they are written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from workbench.cli import options as opt
from workbench.errors import InputError

if TYPE_CHECKING:
    from workbench.data.examples import Example
    from workbench.heads import HeadSet
    from workbench.steering.contrast import Contrast, Strength

CONTRASTS = ("dps", "cad", "dola", "decore")
ENTROPY = {"entropy": False, "entropy-share": True}
_HOW = "Contrast"


def steer(
    model: opt.Model = "testbed",
    heads: Annotated[
        str, typer.Option(help="Run folder, head set file, or heads such as L3H5,L4H0.")
    ] = "",
    user: Annotated[
        str | None, typer.Option(help="Whose queries; the first user's if unset.")
    ] = None,
    contrast: Annotated[
        str,
        typer.Option(
            help="dps, cad, dola, decore, or several: dps+cad.",
            rich_help_panel=_HOW,
        ),
    ] = "dps",
    gamma: Annotated[
        str,
        typer.Option(
            help="Strength of DPS: a number; entropy, the released code's; or entropy-share, that "
            "over ln V.",
            rich_help_panel=_HOW,
        ),
    ] = "0.5",
    cap: Annotated[
        float | None, typer.Option(help="Most strength of entropy.", rich_help_panel=_HOW)
    ] = None,
    cad_gamma: Annotated[float, typer.Option(help="Strength of CAD.", rich_help_panel=_HOW)] = 0.5,
    layers: Annotated[
        str, typer.Option(help="Layers of DoLa: low, high, or 2,4.", rich_help_panel=_HOW)
    ] = "low",
    retrieval_heads: Annotated[
        Path | None, typer.Option(help="Head set file of DeCoRe.", rich_help_panel=_HOW)
    ] = None,
    plausible: Annotated[
        float | None,
        typer.Option(
            help="Least share of the best token's probability; 0, and .1 of DoLa, if unset.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Most nats a step may be moved by.", rich_help_panel=_HOW),
    ] = None,
    prefill: Annotated[
        str,
        typer.Option(
            help="masked: the heads don't read the prompt; shared: they do, at half the cost.",
            rich_help_panel=_HOW,
        ),
    ] = "masked",
    k: Annotated[
        int | None, typer.Option("-k", help="Heads to take from a run; the run's own k if unset.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many queries.")] = 3,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of probability to sample from.")] = 1.0,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print tokens as they are written.")
    ] = False,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --data: a text file of what a user wrote, items between empty lines.",
            rich_help_panel="Data",
        ),
    ] = None,
    query: Annotated[
        str | None,
        typer.Option(help="With --profile: the text to go on from.", rich_help_panel="Data"),
    ] = None,
    data: opt.Data = "testbed",
    root: opt.Root = None,
    split: opt.Split = None,
    style: opt.Style = "plain",
    items: opt.Items = 5,
    ranking: opt.Ranking = None,
    max_prompt_tokens: opt.MaxPromptTokens = 2048,
    max_new_tokens: opt.MaxNewTokens = 32,
    device: opt.Device = None,
    dtype: opt.Dtype = "auto",
    revision: opt.Revision = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    threads: opt.Threads = None,
    batch_tokens: opt.BatchTokens = 8192,
    seed: opt.Seed = 0,
    as_json: opt.Json = False,
) -> None:
    """Write answers to a user's queries, plain and steered, side by side."""
    from workbench.cli import show
    from workbench.data.sources import load_examples
    from workbench.steering.decode import generate
    from workbench.steering.loop import Sampling

    if stream and as_json:
        raise InputError("--stream prints text as it comes, and --json prints at the end; take one")
    if prefill not in ("masked", "shared"):
        raise InputError(f"prefill must be masked or shared, got {prefill!r}")
    sampling = Sampling(temperature, top_p, seed)
    if profile is not None or query is not None:
        asked = [_own(profile, query)]
    else:
        asked = _of_user(load_examples(data, split, root), user, limit)
    names = _names(contrast)
    strength = _strength(gamma, cap)
    sources = [_heads(heads, e, k) if "dps" in names else None for e in asked]
    contrasts = [
        _contrast(
            names,
            found[0] if found else None,
            strength,
            _retrieval(retrieval_heads) if "decore" in names else None,
            cad_gamma,
            _layers(layers),
            {"plausible": plausible, "max_kl": max_kl},
        )
        for found in sources
    ]
    bridge = opt.open_model(model, device, dtype, revision, trust_remote_code, threads)
    arguments: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "sampling": sampling,
        "prompt": opt.prompt(style, items, ranking, max_prompt_tokens, max_new_tokens),
    }
    title = _title(names, strength, cad_gamma, layers, prefill)
    origins = [found[1] if found else None for found in sources]
    if stream:
        _stream(bridge, asked, contrasts, origins, title, arguments, prefill)
        return
    arguments["batch_tokens"] = batch_tokens
    plain = generate(bridge, asked, None, **arguments)
    steered = generate(bridge, asked, contrasts, prefill=cast(Any, prefill), **arguments)
    rows = [
        {
            "example": example.name,
            "user": example.user,
            "query": example.query,
            "target": example.target,
            "heads": str(found[0]) if found else "",
            "heads_from": found[1] if found else "",
            "plain": a.text,
            "steered": b.text,
            "kl": sum(b.kl),
        }
        for example, found, a, b in zip(asked, sources, plain, steered, strict=True)
    ]
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "gamma": strength if isinstance(strength, float) else str(strength),
                    "contrast": title,
                    "answers": rows,
                },
                indent=1,
            )
        )
    else:
        show.answers(rows, title)


def _stream(
    model: Any,
    asked: Sequence[Example],
    contrasts: Sequence[Contrast],
    origins: Sequence[str | None],
    title: str,
    arguments: Mapping[str, Any],
    prefill: str,
) -> None:
    """Print every answer token by token, the plain one first."""
    from workbench.cli import show
    from workbench.steering.decode import stream

    for example, contrast, origin in zip(asked, contrasts, origins, strict=True):
        show.asked(example.name, example.query, example.target, origin)
        for name, one in (("plain", None), (title, contrast)):
            steps = stream(model, example, one, prefill=cast(Any, prefill), **arguments)
            show.streamed(name, steps)


def _own(profile: Path | None, query: str | None) -> Example:
    """An example of the user's own text."""
    from workbench.data.examples import Example
    from workbench.data.tasks import TEXT

    if profile is None or query is None:
        raise InputError("--profile FILE and --query TEXT go together")
    try:
        text = profile.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{profile}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{profile}: can't be read as UTF-8 text: {error}") from None
    blocks = [block.strip() for block in text.replace("\r\n", "\n").split("\n\n")]
    items = tuple({"text": block} for block in blocks if block)
    if not items:
        raise InputError(f"{profile}: holds no text; write items with an empty line between them")
    if not query.strip():
        raise InputError("--query is empty; give the text to go on from")
    return Example("1", profile.stem, TEXT, query, "", items)


def _names(contrast: str) -> list[str]:
    names = [name.strip() for name in contrast.lower().split("+")]
    unknown = [name for name in names if name not in CONTRASTS]
    if unknown or len(set(names)) != len(names):
        raise InputError(
            f"wanted one or several of {', '.join(CONTRASTS)}, joined by +, got {contrast!r}"
        )
    return names


def _strength(gamma: str, cap: float | None) -> Strength:
    from workbench.steering.contrast import Entropy

    if gamma in ENTROPY:
        return Entropy(normalised=ENTROPY[gamma], cap=cap)
    if cap is not None:
        raise InputError("--cap limits the strength of --gamma entropy; a number needs none")
    try:
        return float(gamma)
    except ValueError:
        raise InputError(f"gamma is a number, {' or '.join(ENTROPY)}, got {gamma!r}") from None


def _layers(text: str) -> str | tuple[int, ...]:
    if text in ("low", "high"):
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"layers are low, high or numbers like 2,4, got {text!r}") from None


def _retrieval(path: Path | None) -> HeadSet:
    from workbench.heads import HeadSet

    if path is None:
        raise InputError(
            "DeCoRe needs --retrieval-heads FILE; `workbench retrieval-heads MODEL --out FILE` "
            "finds them"
        )
    return HeadSet.load(path)


def _contrast(
    names: Sequence[str],
    heads: HeadSet | None,
    gamma: Strength,
    retrieval: HeadSet | None,
    cad_gamma: float,
    layers: str | tuple[int, ...],
    limits: Mapping[str, float | None],
) -> Contrast:
    """The contrast that the options name; the limits hold for all of it."""
    from workbench.steering.contrast import CAD, DPS, DeCoRe, DoLa

    given = {name: value for name, value in limits.items() if value is not None}
    made: dict[str, Contrast] = {}
    if heads is not None:
        made["dps"] = DPS(heads, gamma, **given)
    if retrieval is not None:
        made["decore"] = DeCoRe(retrieval, **given)
    if "cad" in names:
        made["cad"] = CAD(cad_gamma, **given)
    if "dola" in names:
        made["dola"] = DoLa(layers, **given)
    first, *rest = (made[name] for name in names)
    for other in rest:
        first = first + other
    return first


def _title(
    names: Sequence[str], gamma: Strength, cad_gamma: float, layers: str, prefill: str
) -> str:
    words = {
        "dps": f"DPS, γ = {gamma:g}" if isinstance(gamma, float) else f"DPS, γ = {gamma}",
        "cad": f"CAD, γ = {cad_gamma:g}",
        "dola": f"DoLa, {layers}",
        "decore": "DeCoRe",
    }
    title = " + ".join(words[name] for name in names)
    shared = prefill == "shared" and {"dps", "decore"} & set(names)
    return f"{title}, shared prefill" if shared else title


def _of_user(examples: list[Example], user: str | None, limit: int) -> list[Example]:
    user = user or examples[0].user
    found = [example for example in examples if example.user == user]
    if not found:
        raise InputError(
            f"no user {user!r} in this data; the first are "
            + ", ".join(list(dict.fromkeys(example.user for example in examples))[:5])
        )
    by_task: dict[str, list[Example]] = {}
    for example in found:
        by_task.setdefault(example.task, []).append(example)
    # One query of each task first, then the next ones.
    longest = max(map(len, by_task.values()))
    mixed = [part[i] for i in range(longest) for part in by_task.values() if i < len(part)]
    return mixed[:limit]


def _heads(source: str, example: Example, k: int | None) -> tuple[HeadSet, str]:
    """The head set for an example, and in words where it comes from."""
    from workbench.data.tasks import TEXT
    from workbench.heads import HeadSet
    from workbench.runs import read_json
    from workbench.scores import HeadScores

    if not source:
        raise InputError(
            "--heads is needed: a run folder, a head set file, or heads like L3H5,L4H0"
        )
    if not Path(source).is_dir():
        if Path(source).is_file():
            return HeadSet.load(source), source
        return HeadSet.parse(source), "the command line"
    scores = HeadScores.load(source)
    summary = Path(source) / "summary.json"
    screen = scores.manifest["settings"].get("screen")
    usual = screen["k"] if screen else 8
    k = k or (int(read_json(summary)["k"]) if summary.is_file() else usual)
    # Of heads that were screened for a task nothing is known for a single user.
    alone = not screen or screen["by"] == "user"
    if alone and example.user in scores.data["user"].values:
        origin = "this user's own answers"
        if example.name in scores.data["example"].values:
            origin += ", this one among them: no evidence of what steering gains"
        return scores.top(k, "user")[example.user], origin
    tasks = scores.top(k, "task")
    if example.task == TEXT:
        return scores.top(k, "all")["all"], f"all answers of {source}, to {', '.join(tasks)}"
    if example.task not in tasks:
        raise InputError(f"{source}: no scores for {example.task}, only {', '.join(tasks)}")
    if example.name in scores.data["example"].values:
        return tasks[example.task], "all users' answers to this task, this one among them"
    return tasks[example.task], "other users' answers to this task"
