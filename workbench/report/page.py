"""The page of a finished probe: one file, no network, nothing computed."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader

from workbench import runs, tables
from workbench.report.pictures import PICTURES, figure_tables, probe_figures

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from workbench.probe import Probe

REPORT = "report.html"
FIRST_ROWS = 25
SECTIONS = {
    "profile": "Does the profile help?",
    "heads": "Which heads carry it?",
    "controls": "Preference or damage?",
    "stability": "How sure?",
    "aspects": "Style, topic, position",
    "users": "Do users share them?",
    "steering": "Does steering help?",
    "texts": "Texts and attention",
    "origin": "Where it comes from",
}


def write_report(result: Probe, folder: Path) -> Path:
    """Write `report.html`: one file that opens without a network.

    All text from the data is escaped by the template engine; figures carry their data as JSON,
    tables are links that hold their own CSV.
    """
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("workbench", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _cell
    attention, circuitsvis = _attention(result)
    page = environment.get_template("report.html.j2").render(
        summary=result.summary,
        samples=result.samples,
        settings=result.scores.manifest["settings"],
        versions=result.scores.manifest["versions"],
        plotly=get_plotlyjs(),
        circuitsvis=circuitsvis,
        attention=attention,
        sections=_sections(result),
    )
    path = folder / REPORT
    runs.write_text(path, page)
    return path


def _sections(result: Probe) -> list[dict[str, Any]]:
    """What stands in each section: lines, figures, tables."""
    places = {picture.name: picture.section for picture in PICTURES}
    drawn, behind = probe_figures(result), figure_tables(result)
    steps = {
        "-".join(filter(None, (name, part))): (result.summary["steps"][name], frame)
        for name, table in result.tables.items()
        if name not in {picture.table for picture in PICTURES}
        for part, frame in tables.frames(table).items()
    }
    found = []
    for key, title in SECTIONS.items():
        names = [name for name in drawn if places.get(name, "heads") == key]
        mine = {
            name: frame
            for name, frame in behind.items()
            if any(name == own or name.startswith(f"{own}-") for own in names)
        }
        mine |= {name: frame for name, (section, frame) in steps.items() if section == key}
        mine |= _others(result).get(key, {})
        found.append(
            {
                "key": key,
                "title": title,
                "lines": result.summary["findings"].get(key, []),
                "figures": {name: _figure(name, drawn[name]) for name in names},
                "tables": [_table(name, frame) for name, frame in mine.items()],
            }
        )
    return found


def _figure(name: str, figure: go.Figure) -> dict[str, Any]:
    html = figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"drawn-{name}")
    return {"html": html, "width": figure.layout.width}


def _others(result: Probe) -> dict[str, dict[str, pd.DataFrame]]:
    """What the page shows and no step made, by section."""
    import pandas as pd

    cut = pd.DataFrame(result.summary["truncation"]).T.rename_axis("examples").reset_index()
    settings = {**result.scores.manifest["settings"], **result.summary["settings"]}
    rows = [(name, str(value)) for name, value in settings.items()]
    return {
        "texts": {"texts": pd.DataFrame(list(result.samples))},
        "origin": {
            "truncation": cut,
            "settings": pd.DataFrame(rows, columns=["setting", "value"]),
        },
    }


def _table(name: str, frame: pd.DataFrame) -> dict[str, Any]:
    data = base64.b64encode(frame.to_csv(index=False).encode()).decode()
    return {
        "name": name,
        "rows": len(frame),
        "columns": list(map(str, frame.columns)),
        "first": frame.head(FIRST_ROWS).to_numpy(dtype=object).tolist(),
        "data": f"data:text/csv;charset=utf-8;base64,{data}",
    }


def _cell(value: object) -> str:
    """A number as short as it can be read; anything else as it is."""
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _attention(result: Probe) -> tuple[list[dict[str, Any]], str]:
    """The attention pages and the JavaScript that they share; nothing where there are none."""
    if not result.attention:
        return [], ""
    # CircuitsVis pulls in torch.
    from workbench.figures.attention import attention, bundle

    pages = [
        {"example": table.attrs["example"], "page": attention(table, f"attention-{i}", alone=False)}
        for i, table in enumerate(result.attention)
    ]
    return pages, bundle()
