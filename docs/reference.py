"""The reference, made from the tree whenever the site is built, so that no module is forgotten.

mkdocs runs this as a hook. A page a room lists the room's modules as they lie in `workbench/`;
mkdocstrings reads their docstrings. Two more pages are the public names and the commands.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files
from pygments.formatters import HtmlFormatter
from typer.main import get_command

if TYPE_CHECKING:
    import click
    from mkdocs.config.defaults import MkDocsConfig

ROOT = Path(__file__).resolve().parent.parent
NAMES, COMMANDS, COLOURS = "reference/names.md", "reference/cli.md", "pygments.css"
# What its commands say is on the page of commands.
FACE = "cli"
# A package's front: its names are shown where they are written.
FRONT = "    options:\n      members: false"
CONTRIBUTING = "CONTRIBUTING.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages that `on_files` makes to the navigation."""
    pages = [{"Names in a notebook": NAMES}, {"Commands": COMMANDS}]
    pages += [{room: _address(room)} for room in rooms() if room != FACE]
    config.nav = [*(config.nav or []), {"Contributing": CONTRIBUTING}, {"Reference": pages}]
    config.extra_css.insert(0, COLOURS)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages themselves, and the colours of code, which Pygments has."""
    made = {
        NAMES: names_page(),
        COMMANDS: commands_page(),
        CONTRIBUTING: (ROOT / CONTRIBUTING).read_text(encoding="utf-8"),
        COLOURS: HtmlFormatter(style="default").get_style_defs(".highlight"),
    }
    made |= {_address(room): room_page(room) for room in rooms() if room != FACE}
    for address, content in made.items():
        files.append(File.generated(config, address, content=content))
    return files


def rooms() -> dict[str, list[Path]]:
    """The files of every room, the room's own front first."""
    found = {}
    for path in sorted((ROOT / "workbench").iterdir()):
        files = sorted(path.rglob("*.py")) if (path / "__init__.py").is_file() else [path]
        files = [file for file in files if file.suffix == ".py" and not _private(file)]
        if files and path.stem != "__init__":
            found[path.stem] = files
    return found


def room_page(room: str) -> str:
    """A room's public names, and every module of it."""
    here = _named(room)
    parts = [f"# {room}"]
    if here:
        parts.append(_table(here))
    for file in rooms()[room]:
        parts.append(f"::: {_dotted(file)}\n" + (FRONT if file.stem == "__init__" else ""))
    return "\n\n".join(parts) + "\n"


def names_page() -> str:
    """Every public name with its first sentence, by room."""
    parts = [
        "# Names in a notebook",
        "After `import workbench as wb`. Importing loads nothing heavy; a name loads what it "
        "needs when it is first used.",
    ]
    for room in rooms():
        here = _named(room)
        if here:
            parts += [f"## {room}", _table(here)]
    return "\n\n".join(parts) + "\n"


def public() -> dict[str, str]:
    """Where each name of `wb` and of `wb.figures` is written, read off their imports."""
    found = {}
    for front, shown in (("workbench", "wb"), ("workbench/figures", "wb.figures")):
        tree = ast.parse((ROOT / front / "__init__.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("workbench."):
                for alias in node.names:
                    found[f"{shown}.{alias.name}"] = f"{node.module}.{alias.name}"
    return dict(sorted(found.items()))


def _named(room: str) -> dict[str, str]:
    return {shown: home for shown, home in public().items() if home.split(".")[1] == room}


def commands_page() -> str:
    """Every command with its options, from the command line itself."""
    from workbench.cli.commands import app

    parts = ["# Commands", "`workbench COMMAND --help` says the same on the terminal."]
    for words, command in _commands(get_command(app), ["workbench"]):
        parts.append(f"## `{' '.join(words)}`")
        parts.append(" ".join((command.help or "").split()))
        rows = [_option(one) for one in command.params if one.name != "help"]
        parts.append(_rows(("option", "default", "what it does"), rows))
    return "\n\n".join(parts) + "\n"


def _commands(
    command: click.Command, words: list[str]
) -> Iterator[tuple[list[str], click.Command]]:
    """The command, or those of a group, each with the words that it is called by."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield words, command
    for name, one in (inner or {}).items():
        yield from _commands(one, [*words, name])


def _option(option: click.Parameter) -> tuple[str, str, str]:
    names = [*option.opts, *option.secondary_opts]
    shown = ", ".join(f"`{name}`" for name in names)
    if option.param_type_name == "argument":
        shown = f"`{option.name.upper()}`"
    default = option.default
    unset = default is None or default is False or callable(default) or default == ()
    wanted = "required" if option.required else "" if unset else f"`{default}`"
    return shown, wanted, getattr(option, "help", None) or ""


def _table(names: dict[str, str]) -> str:
    rows = [(f"[`{shown}`][{home}]", _summary(home)) for shown, home in names.items()]
    return _rows(("name", "what it is"), rows)


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _summary(home: str) -> str:
    """The first paragraph of a name's docstring; empty for what is a module."""
    module, _, name = home.rpartition(".")
    file = ROOT / Path(*module.split(".")).with_suffix(".py")
    if not file.is_file():
        return ""
    found = ""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            # The overloads before the function itself have none.
            found = (ast.get_docstring(node) or found).split("\n\n")[0]
    return found


def _address(room: str) -> str:
    return f"reference/{room}.md"


def _dotted(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _private(file: Path) -> bool:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return any(part.startswith("_") and part != "__init__" for part in parts)
