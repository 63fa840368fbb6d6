"""What a notebook keeps of its metadata: the same after every run, and whoever wrote it.

    python docs/tidy_notebooks.py build/notebooks/*.ipynb

`make notebooks` ends with it, after the outputs of cells tagged `live` were taken out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
TAGS = "tags"


def main() -> None:
    """Tidy the notebooks that are named."""
    for name in sys.argv[1:]:
        path = Path(name)
        notebook = nbformat.read(path, as_version=4)
        tidy(notebook)
        nbformat.write(notebook, path)


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Number the cells' ids in their order; of the metadata leave the usual kernel and the tags."""
    notebook.nbformat_minor = 5  # the first with ids
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        tags = cell.metadata.get(TAGS)
        cell.metadata = nbformat.from_dict({TAGS: tags} if tags else {})


if __name__ == "__main__":
    main()
