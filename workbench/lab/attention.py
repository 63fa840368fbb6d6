"""Attention over a text as a widget: CircuitsVis, brought to the page once, drawn again at will."""

from __future__ import annotations

from functools import cache

import anywidget
import traitlets
import xarray as xr

from workbench.figures.attention import ELEMENT, bundle, properties

# CircuitsVis draws into an element that is in the page already, and once into each.
_GLUE = f"""
let drawn = 0;
function render({{ model, el }}) {{
  let gone = false;
  const draw = () => {{
    if (gone) return;
    if (!el.isConnected) {{ requestAnimationFrame(draw); return; }}
    const place = document.createElement("div");
    place.id = `wb-attention-${{++drawn}}-${{Date.now()}}`;
    el.replaceChildren(place);
    const properties = model.get("properties");
    if (properties.tokens) {{
      CircuitsVis.render(place.id, CircuitsVis.{ELEMENT}, properties);
    }}
  }};
  model.on("change:properties", draw);
  draw();
  return () => {{ gone = true; model.off("change:properties", draw); }};
}}
export default {{ render }};
"""


@cache
def _code() -> str:
    return f"{bundle()}\n{_GLUE}"


class Attention(anywidget.AnyWidget):
    """How much heads look at each token of a text; empty until it is given a table."""

    properties = traitlets.Dict().tag(sync=True)

    def __init__(self) -> None:
        super().__init__(_esm=_code())

    def show(self, table: xr.DataArray | None) -> None:
        """Draw `attended`, [head, position] with the coordinate `token`; None draws nothing."""
        self.properties = {} if table is None else properties(table)
