"""The six floors of the house: no circle, nothing imports a script, run and inference do not know each other."""

import ast
import graphlib
import sys
from pathlib import Path

CODE = Path(__file__).resolve().parent.parent / "code"
SCRIPTS = {"train", "evaluate", "retrieve", "report", "prepare", "reproduce"}
# A package is one room here: its parts may import each other.
ROOMS = {path.stem: [path] for path in CODE.glob("*.py")}
ROOMS |= {path.parent.name: sorted(path.parent.glob("*.py")) for path in CODE.glob("*/__init__.py")}


def imported(name):
    """Names of the modules that a room imports, wherever in it, without itself."""
    found = set()
    for node in (node for path in ROOMS[name] for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found - {name}


def test_every_room_has_its_place():
    below = {name: imported(name) & ROOMS.keys() for name in ROOMS}
    floor = {}
    for name in graphlib.TopologicalSorter(below).static_order():  # names the circle if there is one
        floor[name] = 1 + max((floor[other] for other in below[name]), default=0)
    assert {"net", "layouts"} <= ROOMS.keys() and floor["train"] > floor["run"] > floor["refused"] == 1
    assert max(floor.values()) <= 6
    assert not [name for name in ROOMS if below[name] & SCRIPTS]
    assert not ROOMS.keys() & sys.stdlib_module_names  # `code` is one too, and pytest would break
    assert "run" not in below["inference"] and "inference" not in below["run"]
    assert not below["pictures"] & {"dataset", "metrics", "inference"}
    assert imported("hist") == {"torch"}  # it can be copied into any project
