"""Attention over an example's text, by CircuitsVis: a page that needs no network.

A module of its own, which nothing imports unless it is asked for: CircuitsVis pulls in torch.
"""

from __future__ import annotations

import html
import json
from functools import cache
from importlib.resources import files
from typing import Any

import xarray as xr

ELEMENT = "ColoredTokensMulti"


@cache
def bundle() -> str:
    """CircuitsVis's own JavaScript, to be put into a page once, inside a `script` element."""
    text = (files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    # Neither may the bundle end the element that holds it, nor ask for its source map.
    text = text.replace("</script", "<\\/script")
    return "\n".join(line for line in text.splitlines() if not line.startswith("//# source"))


def properties(table: xr.DataArray) -> dict[str, list[Any]]:
    """What CircuitsVis's element is given: tokens escaped as HTML, their values and the heads.

    Args:
        table: From `attended`: [head, position] with the coordinate `token`.
    """
    return {
        "tokens": [html.escape(token) for token in table["token"].values.tolist()],
        "values": [[round(v, 5) for v in row] for row in table.transpose().values.tolist()],
        "labels": table["head"].values.tolist(),
    }


def attention(table: xr.DataArray, name: str, alone: bool = True) -> str:
    """An example's tokens, coloured by how much a head looks at each; a button a head.

    Args:
        table: From `attended`: [head, position] with the coordinate `token`.
        name: The element's id in the page.
        alone: Bring CircuitsVis along, 1.3 MB; a page with several holds `bundle()` once instead.

    Returns:
        HTML. Text from a profile can neither end the script nor become a part of the page: the
        tokens are escaped as HTML, which CircuitsVis takes them for, and `<` in the script.

    Source:
        CircuitsVis's `colored_tokens_multi`. Its own HTML asks from Python whether there is a
        network and loads from a CDN if so, and lets markup in a token through.
    """
    data = json.dumps(properties(table)).replace("<", "\\u003c")
    call = f"CircuitsVis.render({json.dumps(name)}, CircuitsVis.{ELEMENT}, {data})"
    code = f"{bundle()}\n{call}" if alone else call
    kind = ' type="module"' if alone else ""
    return f'<div id="{name}"></div>\n<script{kind}>{code}</script>'
