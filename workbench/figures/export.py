"""Figures to files: HTML that opens offline, PNG and SVG where there is a browser, CSV."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

if TYPE_CHECKING:
    import pandas as pd

IMAGES = ("png", "svg")


@dataclass(frozen=True)
class Saved:
    """What was written.

    Attributes:
        paths: The files: those of each figure, then the tables.
        note: Why pictures are missing, for the user to read; empty where none is.
    """

    paths: tuple[Path, ...]
    note: str = ""


def save(
    figures: Mapping[str, go.Figure],
    folder: Path | str,
    tables: Mapping[str, pd.DataFrame] | None = None,
) -> Saved:
    """Write figures, and the tables behind them, into a folder.

    Every figure becomes `NAME.html`, which needs `plotly.min.js` beside it and no network, and
    `NAME.png` (twice the size) and `NAME.svg` if a Chrome or Chromium is found (`BROWSER_PATH`
    names one elsewhere). One browser draws them all: starting it takes longer than drawing.
    Pictures of an earlier call are replaced or deleted, so that none contradicts its HTML.

    Args:
        figures: Figures by file name, without ending.
        folder: Made if it isn't there.
        tables: Tables by file name, written as `NAME.csv`.

    Raises:
        ValueError: A name isn't a plain file name.
    """
    folder = Path(folder)
    tables = tables or {}
    for name in (*figures, *tables):
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise ValueError(f"a figure is named by letters, digits, - and _, got {name!r}")
    folder.mkdir(parents=True, exist_ok=True)
    # Written each time: a page must not meet the plotly.js of another version.
    (folder / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    for name, figure in figures.items():
        # A fixed id, so that the same figure gives the same bytes.
        page = figure.to_html(include_plotlyjs="directory", div_id=name)
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    note = draw(figures, folder) if figures else ""
    drawn = [folder / f"{name}.{kind}" for name in figures for kind in ("html", *IMAGES)]
    written = [path for path in drawn if path.exists()]
    return Saved((*written, *(folder / f"{name}.csv" for name in tables)), note)


def draw(
    figures: Mapping[str, go.Figure],
    folder: Path,
    kinds: Sequence[str] = IMAGES,
    scale: float = 2,
) -> str:
    """Draw figures in one browser, for all of them the same.

    Args:
        figures: Figures by file name, without ending.
        folder: Where the pictures go; those of an earlier call are replaced or deleted.
        kinds: `png`, `svg`, `pdf`.
        scale: Pixels of a PNG for each of the figure's.

    Returns:
        Why pictures are missing, for the user to read; empty where none is.
    """
    # Imported here, as drawing on the screen needs none of it.
    import kaleido
    from kaleido.errors import BrowserClosedError, BrowserFailedError, ChromeNotFoundError

    pictures: list[dict[str, Any]] = [
        {
            "fig": _with_ids(figure),
            "path": folder / f"{name}.{kind}",
            "opts": {"format": kind, "scale": scale if kind == "png" else 1},
        }
        for name, figure in figures.items()
        for kind in kinds
    ]
    for picture in pictures:
        picture["path"].unlink(missing_ok=True)
    try:
        # `plotly.io.write_images` would swallow these errors, and fetch MathJax from a CDN.
        errors = kaleido.write_fig_from_object_sync(pictures, kopts={"mathjax": False})
    except ChromeNotFoundError:
        return (
            "No PNG and SVG: no Chrome or Chromium was found. Install one (on Debian: apt install "
            "chromium) or set BROWSER_PATH, and write the figures again."
        )
    except (BrowserClosedError, BrowserFailedError, OSError) as error:
        reason = " ".join(map(str, error.args))
        return f"No PNG and SVG: the browser did not start ({reason})"
    for name in figures:
        _fix_ids(folder / f"{name}.svg", name)
    if errors:
        return f"{len(errors)} of {len(pictures)} pictures could not be drawn: {errors[0]!r}"
    return ""


def _with_ids(figure: go.Figure) -> dict[str, Any]:
    """The figure with numbered traces; their ids, random otherwise, are written into the SVG."""
    value = figure.to_dict()
    for number, trace in enumerate(value["data"]):
        trace["uid"] = f"{number}"
    return value


def _fix_ids(path: Path, name: str) -> None:
    """Replace the random id of a whole SVG, so that the same figure gives the same bytes."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    if found := re.search(r'id="topdefs-(\w+)"', text):
        fixed = f"{zlib.crc32(name.encode()):08x}"
        text = re.sub(rf"(?<=[a-z-]){found[1]}", fixed, text)
        path.write_text(text, encoding="utf-8")
