"""Lets the tests import the scripts' rooms by their names, and gives them what several of them need."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "code"), str(ROOT / "tests")]


@pytest.fixture
def script(tmp_path):
    """Runs a script as a user would: script('train.py', '--seed', 2) -> CompletedProcess with its text."""

    def run(name, *arguments, cwd=ROOT, **options):
        command = [sys.executable, str(ROOT / "code" / name), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, **options)

    return run
