"""Who may import whom: no arrow up, no circle of files, no room with more files than a reader can look over."""

import ast
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# a room may import from its own floor and from those below; `kernels` stands apart: only engines import it
FLOORS = [
    {"inputs", "divergences", "_version", "versions", "schedules", "kernels"},
    {"ops"},
    {"engines"},
    {"frontend"},
    {"loss", "low_rank_head", "closed_form", "projector", "param_groups"},
    {"training", "report", "demo", "plan"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MOST_FILES = 13  # twelve and an __init__


def modules():
    """Every module of the package by its dotted name, without `kdfast.`."""
    found = {}
    for folder, prefix in ((ROOT / "kdfast", ()), (ROOT / "kernels", ("kernels",))):
        for path in folder.rglob("*.py"):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            if len(parts) > 1 and parts[-1] == "__init__":
                parts = parts[:-1]
            found[".".join(parts)] = path
    return found


MODULES = modules()


def imports(path):
    """The package's modules that a file imports, inside functions and for types only too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] != "kdfast":
                continue
            known = (".".join(parts[1:end]) for end in range(len(parts), 1, -1))
            found.add(next((module for module in known if module in MODULES), "__init__"))
    return found


GRAPH = {module: imports(path) - {module} for module, path in MODULES.items()}


def test_no_circle_of_files():
    TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the circle


def test_no_arrow_up():
    wrong = []
    for module, others in GRAPH.items():
        room = module.split(".")[0]
        for other in others:
            target = other.split(".")[0]
            if target == "kernels" and room not in ("kernels", "engines"):
                wrong.append(f"{module} imports {other}: only engines use kernels")
            elif target != "__init__" and FLOOR[target] > FLOOR[room]:
                wrong.append(f"{module} imports {other}, from a floor above")
    assert wrong == []


def test_no_room_is_too_full():
    rooms = Counter(path.parent for path in MODULES.values())
    assert {str(room): n for room, n in rooms.items() if n > MOST_FILES} == {}
