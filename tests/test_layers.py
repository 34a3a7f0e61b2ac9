"""The six floors of the house: no circle, nothing imports a script, run and inference do not know each other."""

import ast
import functools
import sys
from pathlib import Path

import pytest

CODE = Path(__file__).resolve().parent.parent / "code"
SCRIPTS = {"train", "evaluate", "retrieve", "report", "prepare"}
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


@functools.cache
def floor(name, above=()):
    assert name not in above, " -> ".join([*above, name])
    return 1 + max((floor(other, (*above, name)) for other in imported(name) & ROOMS.keys()), default=0)


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_every_room_has_its_place(name):
    assert not imported(name) & SCRIPTS
    assert floor(name) <= 6
    assert name not in sys.stdlib_module_names  # `code` is one too, and pytest would break


def test_floors():
    assert {"net", "layouts"} <= ROOMS.keys() and floor("train") > floor("run") > floor("dataset") > floor(
        "refused"
    ) == 1
    assert "run" not in imported("inference") and "inference" not in imported("run")
    assert not imported("pictures") & {"dataset", "metrics", "inference"}
    assert imported("hist") == {"torch"}  # it can be copied into any project
