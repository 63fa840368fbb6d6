"""What was set and chosen in an explorer, as lines for a cell."""

from __future__ import annotations

import html

from workbench.data.examples import Example
from workbench.data.prompts import PromptSettings
from workbench.heads import HeadSet


def said(heads: HeadSet) -> str:
    """A set as `HeadSet.parse` reads it."""
    return ", ".join(map(str, heads))


def code(
    example: Example, heads: HeadSet, contrast: str, prompt: PromptSettings | None, tokens: int
) -> str:
    """The lines that make what is shown: the set, the contrast, the target and both texts.

    Args:
        example: Which.
        heads: The chosen heads.
        contrast: The code of the contrast, of `heads`.
        prompt: How prompts are built.
        tokens: Limit of new tokens.

    Returns:
        HTML; text from data is escaped.
    """
    lines = [
        f'heads = wb.HeadSet.parse("{said(heads)}")',
        f"example = next(e for e in examples if e.name == {example.name!r})",
        f"contrast = {contrast}",
        "wb.token_change(model, example, heads, contrast)",
        f"wb.write(model, example, contrast, max_new_tokens={tokens})",
    ]
    if prompt not in (None, PromptSettings()):
        lines.insert(3, f"prompt = wb.{prompt!r}")
        lines[4:] = [f"{line[:-1]}, prompt=prompt)" for line in lines[4:]]
    return f"<pre style='white-space:pre-wrap'>{html.escape(chr(10).join(lines))}</pre>"
