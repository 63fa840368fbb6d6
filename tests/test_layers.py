"""The house keeps its shape: who may import whom, and what an import may cost."""

import ast
import graphlib
import json
import subprocess
import sys

import pytest

# From the ground up; a module imports from rows above its own in this list, or from its own.
ROOMS = (
    *("errors", "runs", "heads", "stats", "scores", "tables", "data", "models", "batches", "hooks"),
    *("discovery", "steering", "evaluation", "analysis", "figures"),
    *("training", "planted", "report", "probe", "bench", "readme", "lab", "cli"),
)
# Rooms that see less than what lies above them.
ONLY = {
    "training": {"errors", "runs", "data"},
    "figures": {"errors", "runs", "heads", "stats", "scores", "data", "tables"},
    "report": {"errors", "runs", "tables", "figures"},
}


def modules(root):
    for path in sorted((root / "workbench").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported(tree, known, typing):
    """The workbench's modules that a file imports anywhere; for types only if `typing`."""
    found, nodes = set(), [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not typing:
            nodes.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"  # a module of a package, or a name in one
                found.add(name if name in known else node.module)
        nodes.extend(ast.iter_child_nodes(node))
    return {name for name in found if name and name.split(".")[0] == "workbench"}


@pytest.fixture(scope="module")
def imports(root):
    """What every module imports, the package's own front (lazy names) left out."""
    files = dict(modules(root))
    found = {}
    for typing in (False, True):
        found[typing] = {
            name: imported(ast.parse(path.read_text(encoding="utf-8")), files, typing)
            for name, path in files.items()
            if name != "workbench"
        }
    return found


def room(name):
    """The room of a module; `workbench` itself, the front with its lazy names, is in none."""
    return name.split(".")[1] if "." in name else "the front"


def row(name):
    """How high a module stands; the front stands above all rooms."""
    return ROOMS.index(room(name)) if room(name) in ROOMS else len(ROOMS)


def test_every_module_has_a_room(imports):
    unplaced = sorted({room(name) for name in imports[True]} - set(ROOMS))
    assert unplaced == [], "say in ROOMS which rows lie above these"


def test_a_room_imports_from_rows_above_its_own_only(imports):
    wrong = [
        f"{name} imports {other}"
        for name, others in imports[False].items()
        for other in sorted(others)
        if row(other) > row(name)
    ]
    assert wrong == []


def test_a_face_may_be_named_below_for_its_type_only(imports):
    # Under TYPE_CHECKING the report names the probe that it prints; nothing else looks down.
    down = {
        (name, other)
        for name, others in imports[True].items()
        for other in others
        if row(other) > row(name)
    }
    assert {(room(name), room(other)) for name, other in down} <= {("report", "probe")}


@pytest.mark.parametrize("name", ONLY)
def test_a_room_that_sees_little_imports_little(imports, name):
    seen = {
        room(other)
        for module, others in imports[False].items()
        if room(module) == name
        for other in others
    }
    assert seen - {name} <= ONLY[name]


def test_figures_compute_nothing(root):
    for path in sorted((root / "workbench" / "figures").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            packages = {name.split(".")[0] for name in names}
            assert not packages & {"torch", "transformers", "transformer_lens", "scipy"}, path


def test_no_two_modules_import_each_other(imports):
    list(graphlib.TopologicalSorter(imports[False]).static_order())  # raises CycleError


def test_there_is_no_room_for_odds_and_ends(imports):
    assert [name for name in imports[True] if name.split(".")[-1] in ("utils", "helpers")] == []


def test_files_are_short_enough_to_read(root):
    long = {
        name: lines
        for name, path in modules(root)
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 420
    }
    assert long == {}, "about 400 lines a file"


# Cost. Each runs in a fresh interpreter: this one has long imported everything.

HEAVY = ("numpy", "pandas", "xarray", "pyarrow", "torch", "transformers", "datasets", "plotly")


def loaded_after(*names):
    """The heavy packages that are loaded after each import in turn."""
    code = (
        "import importlib, json, sys\n"
        f"after = {{}}\nfor name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"    after[name] = [p for p in {HEAVY!r} if p in sys.modules]\n"
        "print(json.dumps(after))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_the_workbench_loads_nothing_heavy():
    assert loaded_after("workbench") == {"workbench": []}


def test_results_and_figures_open_without_torch():
    names = [f"workbench.{room}" for room in ("heads", "stats", "scores", "figures")]
    with_torch = [name for name, heavy in loaded_after(*names).items() if "torch" in heavy]
    assert with_torch == []


def test_every_public_name_is_there():
    import workbench

    assert [name for name in workbench.__all__ if not hasattr(workbench, name)] == []
    assert set(workbench._HOMES) <= set(workbench.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = workbench.nonsense
