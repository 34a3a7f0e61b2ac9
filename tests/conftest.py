"""Lets the tests import the scripts' rooms by their names, and gives them what several of them need."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "code"), str(ROOT / "tests")]

import apart  # noqa: E402
from apart import Outcome  # noqa: E402

# Tests run side by side, one process a core: more threads would only get in each other's way.
os.environ["OMP_NUM_THREADS"] = "1"

# A network and a run small enough to train in seconds: checkpoints of a megabyte.
MODEL, BEST = "timm:test_resnet", "timm_test_resnet_best"
TINY = (
    f"--model {MODEL} --weights none --image-size 32 --embedding-size 16 --hgnn-hidden 16 --batch-size 8 "
    "--epochs 2 --lr 1e-3 --workers 0 --gpu-id -1"
).split()


def pytest_xdist_auto_num_workers(config):
    """pyproject.toml's -n auto: no other processes for --trace, whose debugger needs this terminal (nor for --pdb)."""
    return 0 if config.option.trace else None


@pytest.fixture(scope="session")
def cub(tmp_path_factory):
    """A data root with a tiny CUB, which has grey, palette, RGBA and CMYK images and macOS's ._ files in it."""
    from trees import make_cub

    root = tmp_path_factory.mktemp("data")
    make_cub(root)
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of one epoch on eight classes of pictures, the first four of which train: (pictures, folder).

    Not to be changed: tests that do take a copy.
    """
    from trees import make_classes

    base = tmp_path_factory.mktemp("trained")
    make_classes(base / "mine")
    words = [*TINY, "--dataset", "folder", "--data-root", base / "mine", "--log-dir", base / "logs", "--epochs", 1]
    done = apart.Apart(apart.run_script, "train.py", *words, "--warm", 0).end()
    assert done.code == 0, done.err
    return base / "mine", base / "logs" / "folder" / "run_1"


@pytest.fixture(scope="session")
def held_out(cub, tmp_path_factory):
    """The folder of a finished run of one epoch with held-out classes and many flags; not to be changed either."""
    logs = tmp_path_factory.mktemp("held_out")
    words = "--batch-size 4 --epochs 1 --warm 0 --IPC 2 --val-classes 0.5 --optimizer sgd --add-gmp 0 --layer-norm 0"
    more = ["--amp", "bf16", "--channels-last", 1, "--remark", "a note"]
    done = apart.Apart(apart.run_undrawn, "train.py", *options(cub, logs, *words.split(), *more)).end()
    assert done.code == 0, done.err
    assert "val R@1" in done.out and "held out" in done.out
    return logs / "cub" / "run_1"


def options(cub, logs, *more):
    """Flags of train.py for a tiny run on it."""
    return [*TINY, "--dataset", "cub", "--data-root", cub, "--log-dir", logs, *more]


@pytest.fixture
def script():
    """Runs a script as a user would: script("train.py", "--seed", 2) -> Outcome."""

    def run(name, *arguments, cwd=ROOT, **options):
        command = [sys.executable, str(ROOT / "code" / name), *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, **options)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a script's main inside this process, which saves the seconds of importing torch: same Outcome."""
    import signal

    import flags

    def run(name, *arguments):
        main = importlib.import_module(name.removesuffix(".py")).main
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        capsys.readouterr()
        code, said = 0, ""
        try:
            flags.run_script(main)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            said = stop.code + "\n" if isinstance(stop.code, str) else ""
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capsys.readouterr()
        return Outcome(code, out, err + said)

    return run


@pytest.fixture
def undrawn(request, monkeypatch):
    """Runs of this process draw no pictures, two of a tiny run's three seconds, but in tests marked drawn."""
    if not request.node.get_closest_marker("drawn"):
        monkeypatch.setattr("run.Run.draw", lambda *_: None)


@pytest.fixture
def refused(call):
    """Checks that a script ends with one line of error that matches, no traceback, and a non-zero exit code."""

    def check(name, *arguments, match):
        outcome = call(name, *arguments)
        lines = [
            line for line in outcome.err.splitlines() if line.strip() and not line.startswith(("warning: ", "note: "))
        ]
        assert outcome.code != 0, outcome.out
        assert len(lines) == 1 and lines[0].startswith(f"{name}: error: "), outcome.err
        assert re.search(match, lines[0]), lines[0]
        return lines[0]

    return check


# Files whose tests train networks or start processes: `pytest -m "not slow"` leaves them out.
SLOW = {
    "test_distributed",
    "test_evaluate",
    "test_gpu_benchmark",
    "test_interruption",
    "test_retrieve",
    "test_run",
    "test_scripts",
    "test_wandb",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
    # Files with slow tests first (pyproject.toml keeps xdist from sorting them anew): else one core waits for the last.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
