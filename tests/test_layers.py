"""The floors of the house: scripts above run and inference above the rest; no import upward, no circle."""

import ast
import sys
from pathlib import Path

import pytest

CODE = Path(__file__).resolve().parent.parent / "code"
SCRIPTS = {"train", "evaluate", "retrieve", "report", "prepare"}
MIDDLE = {"run", "inference"}
ROOMS = {path.stem: path for path in CODE.glob("*.py")} | {"net": CODE / "net" / "__init__.py"}


def imported(*paths):
    """Names of the modules that files import, wherever in them."""
    found = set()
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


IMPORTS = {name: imported(path) & ROOMS.keys() for name, path in ROOMS.items()}
IMPORTS["net"] = imported(*(CODE / "net").glob("*.py")) & ROOMS.keys() - {"net"}


def floor(name):
    return 2 if name in SCRIPTS else 1 if name in MIDDLE else 0


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_nothing_imports_upward(name):
    assert {other for other in IMPORTS[name] if floor(other) > floor(name)} == set()
    assert not IMPORTS[name] & SCRIPTS


def test_there_is_no_circle():
    def below(name, above=()):
        assert name not in above, " -> ".join([*above, name])
        for other in IMPORTS[name]:
            below(other, (*above, name))

    for name in ROOMS:
        below(name)
    assert IMPORTS["train"] and IMPORTS["dataset"]  # something was read


def test_the_loss_can_be_copied_into_any_project():
    assert imported(CODE / "hist.py") == {"torch"}


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_no_room_is_called_like_a_standard_module(name):
    assert name not in sys.stdlib_module_names
