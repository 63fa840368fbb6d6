"""A table of a paper: the same cells as Markdown, as LaTeX, and as CSV with every digit."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import runs

NOTHING = "–"  # in place of a number that there is not
_LATEX = {
    **{mark: "\\" + mark for mark in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    "−": "$-$",
    "×": r"$\times$",
    "γ": r"$\gamma$",
    "▲": r"$\blacktriangle$",
    "▼": r"$\blacktriangledown$",
    "†": r"$\dagger$",
}
_PACKAGES = "% needs \\usepackage{booktabs} and \\usepackage{amssymb}"


@dataclass(frozen=True)
class Sheet:
    """A table, or one part of it.

    Attributes:
        name: Of the files, as `table-1`; parts of one table share it.
        title: What it shows.
        header: A name a column.
        rows: Cells as text, as many a row as the header has.
        note: What a reader has to know beside it; may be empty.
        records: The same numbers for a program, with every digit: a mapping a row of the CSV.
        words: How many columns from the left hold words; the others hold numbers.
    """

    name: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str
    records: Sequence[Mapping[str, Any]]
    words: int = 1

    def markdown(self) -> str:
        """The table for a README or a terminal, its columns aligned."""
        lines = [[_in_cell(cell) for cell in line] for line in (self.header, *self.rows)]
        widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(self.header))]
        rule = [
            "-" * width if i < self.words else "-" * (width - 1) + ":"
            for i, width in enumerate(widths)
        ]
        text = "\n".join(
            "| " + " | ".join(self._padded(line, widths)) + " |"
            for line in (lines[0], rule, *lines[1:])
        )
        return "\n\n".join(part for part in (f"**{self.title}**", text, self.note) if part)

    def _padded(self, line: Sequence[str], widths: Sequence[int]) -> list[str]:
        return [
            cell.ljust(width) if i < self.words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]

    def latex(self) -> str:
        """A `table` of LaTeX with the rules of booktabs."""
        columns = "l" * self.words + "r" * (len(self.header) - self.words)
        lines = [" & ".join(latex(cell) for cell in line) + r" \\" for line in self.rows]
        return "\n".join(
            [
                _PACKAGES,
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{latex(self.title)}}}",
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                " & ".join(latex(name) for name in self.header) + r" \\",
                r"\midrule",
                *lines,
                r"\bottomrule",
                r"\end{tabular}",
                *([rf"\par\smallskip\footnotesize {latex(self.note)}"] if self.note else []),
                r"\end{table}",
            ]
        )


def latex(text: str) -> str:
    """Text with everything escaped that LaTeX would take for a command."""
    return re.sub(r"\s+", " ", "".join(_LATEX.get(mark, mark) for mark in text))


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV; None is an empty field."""
    columns = list(dict.fromkeys(name for record in records for name in record))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dict(record) for record in records)
    return out.getvalue()


def write(sheets: Sequence[Sheet], folder: Path) -> list[Path]:
    """Write every table in the three forms; parts of one table go to the same files.

    Returns:
        The files written.

    Raises:
        InputError: They can't be written.
    """
    written = []
    for name in dict.fromkeys(sheet.name for sheet in sheets):
        parts = [sheet for sheet in sheets if sheet.name == name]
        records = [record for part in parts for record in part.records]
        texts = {
            "md": "\n\n".join(part.markdown() for part in parts) + "\n",
            "tex": "\n\n".join(part.latex() for part in parts) + "\n",
            "csv": csv_text(records),
        }
        for ending, text in texts.items():
            path = folder / f"{name}.{ending}"
            runs.write_text(path, text)
            written.append(path)
    return written


def with_interval(value: float | None, low: float | None, high: float | None) -> str:
    """A number with its interval, as tables print it; a dash where there is none."""
    if value is None:
        return NOTHING
    if low is None or high is None:
        return f"{value:.3f}"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _in_cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
