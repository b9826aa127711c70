"""How the package is built: imports point one way, and every module is found where it is named.

Every import counts, one inside a function or under ``TYPE_CHECKING`` too: who follows it has to
read the other file.
"""

import ast
import importlib
import pkgutil
from types import ModuleType

from support import ROOT

import mlx_sparse_nn

FOLDER = ROOT / "mlx_sparse_nn"
DOORS = {"mlx_sparse_nn", "__main__"}  # may import from every room
# What the files of a room may import besides one another.
ROOMS = {
    "core": set(),
    "patterns": {"core"},
    "physics": {"core"},
    "layers": {"core", "patterns"},
    "surgery": {"core", "patterns", "layers"},
    "calibration": {"core", "patterns", "layers", "surgery"},
    "diagnostics": {"core", "patterns", "layers"},
}
# Files of core from the top down: they import what stands below them.
FLOORS = [
    ["core.construct"],
    ["core.arrays"],
    ["core.ops"],
    ["core.derivatives"],
    ["core.backends.choose"],
    ["core.backends.metal", "core.backends.cuda", "core.backends.plain"],
    ["core.layout"],
    ["core.checks"],
    ["core.index"],
    ["core.backends.build"],
]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(FOLDER.rglob("*.py"))
}


def imports(path):
    """Return the modules of the package that a file imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return found & FILES.keys()


GRAPH = {name: imports(path) for name, path in FILES.items()}
ARROWS = [
    (name.removeprefix("mlx_sparse_nn."), other.removeprefix("mlx_sparse_nn."))
    for name in GRAPH
    for other in sorted(GRAPH[name])
]


def reached(name):
    """Return the modules to which imports lead: a module itself only round a circle."""
    found, new = set(), GRAPH[name]
    while new:
        found |= new
        new = set().union(*(GRAPH[other] for other in new)) - found
    return found


def test_no_circle_of_files():
    onward = {name: reached(name) for name in GRAPH}
    circles = {
        " <-> ".join(sorted(other for other in onward[name] if name in onward[other]))
        for name in GRAPH
        if name in onward[name]
    }
    assert not circles, "\n".join(sorted(circles))


def test_rooms_import_one_way():
    wrong = []
    for name, other in ARROWS:
        room, of_other = name.split(".")[0], other.split(".")[0]
        if name not in DOORS and of_other not in {room, *ROOMS[room]}:
            wrong.append(f"{name} -> {other}")
    assert not wrong, "\n".join(wrong)


def test_core_imports_one_way():
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    both = [(a, b) for a, b in ARROWS if a in floor and b in floor]
    wrong = [f"{a} -> {b}" for a, b in both if floor[a] >= floor[b]]
    assert not wrong, "\n".join(wrong)


def test_no_module_is_hidden_by_what_bears_its_name():
    for module in pkgutil.walk_packages(mlx_sparse_nn.__path__, "mlx_sparse_nn."):
        package, _, name = module.name.rpartition(".")
        found = getattr(importlib.import_module(package), name, None)
        assert found is None or isinstance(found, ModuleType), f"{module.name} is {found}"


def test_contributing_lists_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = [path.relative_to(FOLDER) for path in FILES.values() if path.stem != "__init__"]
    missing = [str(path) for path in paths if f"`{path}`" not in text]
    assert not missing, "\n".join(missing)
