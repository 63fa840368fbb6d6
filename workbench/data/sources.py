"""Where examples come from: `testbed`, `lamp` or `lamp:TASK` of a folder, `longlamp:TASK`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from workbench.data.examples import Example
from workbench.data.lamp import load_lamp, sample_users, testbed_examples
from workbench.data.longlamp import load_longlamp
from workbench.data.tasks import LAMP_TASKS
from workbench.data.testbed import testbed_path
from workbench.errors import InputError


def load_examples(
    source: str = "testbed",
    split: str | None = None,
    root: Path | str | None = None,
    *,
    users: int | None = None,
    tasks: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Example]:
    """Load examples by the name of their source.

    Args:
        source: `testbed`, `lamp:LaMP-4` or `longlamp:abstract_generation_user`, and the like;
            `lamp` for several LaMP tasks of one root together.
        split: `discovery` (the default), `validation` or `test` of the testbed; `dev` by default
            of LaMP, `val` of LongLaMP.
        root: Folder of the LaMP files; a local copy of LongLaMP, by default the hub's; for the
            testbed a corpus made by `workbench testbed data`, the built-in one by default.
        users: Take this many users of all tasks together, drawn from `seed`; all by default.
        tasks: Keep these tasks of the testbed, all three by default; load these of `lamp`, by
            default all that the root has a folder of.
        seed: Seed of the draw of users.

    Raises:
        InputError: The source, the split or a task is unknown, or a file is at fault.
    """
    if source == "testbed":
        corpus = Path(root) if root is not None else testbed_path() / "corpus"
        examples = testbed_examples(split or "discovery", corpus)
    elif source == "lamp" or source.startswith("lamp:"):
        if root is None:
            raise InputError(f"{source} needs a root: the folder that holds the LaMP task folders")
        named = [source.removeprefix("lamp:")] if ":" in source else _lamp_tasks(tasks, Path(root))
        examples = [e for task in named for e in load_lamp(task, split or "dev", root)]
    elif source.startswith("longlamp:"):
        examples = load_longlamp(source.removeprefix("longlamp:"), split or "val", root)
    else:
        raise InputError(
            f"unknown data {source!r}; give testbed, lamp:TASK, say lamp:LaMP-4, lamp for several "
            "tasks of a folder, or longlamp:TASK, say longlamp:product_review_user"
        )
    if tasks is not None:
        unknown = sorted(set(tasks) - {example.task for example in examples})
        if unknown:
            raise InputError(f"{source} holds no task {', '.join(unknown)}")
        examples = [example for example in examples if example.task in tasks]
    return sample_users(examples, users, seed)


def _lamp_tasks(tasks: Sequence[str] | None, root: Path) -> list[str]:
    """The LaMP tasks asked for, each once; all that have a folder if none is named."""
    if tasks is None:
        found = [
            t for t in LAMP_TASKS if (root / t).is_dir() or (root / t.replace("-", "_")).is_dir()
        ]
        if not found:
            raise InputError(f"{root}: holds no LaMP task folder, such as LaMP-4 or LaMP_4")
        return found
    unknown = [task for task in tasks if task not in LAMP_TASKS]
    if unknown or not tasks:
        raise InputError(
            f"lamp holds no task {', '.join(unknown) or 'without a name'}; known are "
            f"{', '.join(LAMP_TASKS)}"
        )
    return list(dict.fromkeys(tasks))
