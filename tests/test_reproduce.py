"""reproduce.py with stand-ins for train.py: what it starts, resumes and skips, and what it says."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys

import apart
import flags
import pytest
import report
import reproduce
from conftest import TINY

STAND_IN = """
import json, os, pathlib, re, signal, sys, time
words = sys.argv[1:]
value = lambda flag: words[words.index(flag) + 1]
here = pathlib.Path(__file__).parent
new = "--resume" not in words
there = [value("--log-dir"), "cub", "run_" + value("--run-num")] if new else [value("--resume")]
folder = pathlib.Path(*there)
seed, without = int(folder.name[4:]), "without" in str(folder)
begun = time.time()
print("training seed", seed)
if seed == 4:  # takes until it is stopped
    signal.signal(signal.SIGTERM, lambda *_: (print("SIGTERM: stopped. Kept:"), sys.exit(143)))
    time.sleep(60)
origin = json.loads((here / "args.json").read_text())
origin["flags"] |= {"seed": seed, "ls": 0.0 if without else 1.0, "image_size": 224}
origin["made_by"]["command"] = " ".join(words)
folder.mkdir(parents=True, exist_ok=True)
(folder / "args.json").write_text(json.dumps(origin))
(folder / "last.pth").touch()
if seed == 3 and not (here / "mended").exists():
    (folder / "results.csv").write_text("phase,epoch\\nuntrained,0\\n")
    sys.exit("train.py: error: the disk is full")
if "--gpu-id" in words:
    (here / ("gpu" + value("--gpu-id"))).touch()
    while len(list(here.glob("gpu*"))) < 2 and time.time() < begun + 60:  # on the other one, too
        time.sleep(0.01)
best = 0.7 + 0.01 * seed * (1 + (not without))
rows = [f"train,{epoch},{best - 0.001 * (40 - epoch)},5.0" for epoch in range(1, 41)]
(folder / "results.csv").write_text("\\n".join(["phase,epoch,R@1,seconds", *rows]))
with open(here / "log", "a") as log:
    log.write(json.dumps([seed, without, words, begun, time.time()]) + "\\n")
"""


@pytest.fixture
def stand_in(tmp_path, cub):
    """A folder with a train.py that writes what a run of cub.args leaves. Seed 3 fails once, seed 4 takes long."""
    given = flags.plain(flags.train_parser().parse([f"@{reproduce.RECIPES['cub']}"])[0])
    digest = {"images": 24, "classes": 4, "digest": "ab"}
    origin = {"flags": given, "made_by": {"commit": "abc"}, "data": {"train": digest, "query": digest}}
    (tmp_path / "args.json").write_text(json.dumps(origin))
    (tmp_path / "train.py").write_text(STAND_IN)
    (tmp_path / "runs").mkdir()
    (tmp_path / "logs").symlink_to("runs")
    return tmp_path


@pytest.fixture
def run(call, cub, stand_in, monkeypatch):
    """reproduce.py cub with these words, report.py in this process: its outcome, and the runs that were started."""

    def report_here(command, **_):
        monkeypatch.setattr(sys, "argv", command[2:])
        report.main()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(reproduce, "TRAIN", stand_in / "train.py")
    monkeypatch.setattr(reproduce.subprocess, "run", report_here)

    def start(*words, further=()):
        log = stand_in / "log"
        log.unlink(missing_ok=True)
        outcome = call("reproduce.py", *words, "--log-dir", stand_in / "logs", "--", "--data-root", cub, *further)
        return outcome, [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    return start


def test_starts_what_is_missing_skips_what_is_finished_and_compares(run, stand_in):
    done, started = run("CUB", "--seeds", 1, 2, "--without-hypergraph")
    assert done.code == 0, done.err
    assert [entry[:2] for entry in started] == [[1, False], [1, True], [2, False], [2, True]]
    assert "cub: 0 of 4 runs are finished" in done.out and "training seed 2" in done.out
    assert re.search(r"run 1 of 4: .*runs/cub/cub/run_1\n", done.out)
    assert re.search(r"run 4 of 4, about 0 minutes to go: .*cub_without_hypergraph/cub/run_2\n", done.out)
    assert "### Groups" in done.out and (stand_in / "runs" / "cub" / "report.html").exists()
    # +1 and +2 points
    said = r"minus without, at the best epochs: \+1\.50 points \(2 pairs of seeds, 95 % interval -4\.85 to \+7\.85\)"
    assert re.search(said, done.out)
    done, started = run("cub", "--seeds", 1, 2)
    assert done.code == 0 and started == [] and "2 of 2 runs are finished" in done.out
    assert run("cub", "--seeds", 1, 2, "--without-hypergraph", "--print")[0].out == ""


def test_a_run_that_fails_is_named_the_others_go_on_and_it_is_resumed(run, stand_in):
    done, started = run("cub", "--seeds", 3, 5)
    assert done.code == 1 and [entry[0] for entry in started] == [5]
    assert f"failed: {stand_in}/runs/cub/cub/run_3: train.py: error: the disk is full" in done.err
    assert "### Groups" in done.out  # of the one that is finished
    (stand_in / "runs" / "cub" / "cub" / "run_3" / "results.csv").unlink()  # a kill came before it
    (stand_in / "mended").touch()
    done, started = run("cub", "--seeds", 3, 5)
    assert done.code == 0 and [entry[0] for entry in started] == [3]
    assert {"--resume", "--data-root"} < set(started[0][2])  # the data may lie elsewhere now


def test_printed_lines_are_what_would_run(run, refused, stand_in, cub):
    (stand_in / "runs" / "cub" / "cub" / "run_2").mkdir(parents=True)  # killed before it saved anything
    done, started = run("cub", "--seeds", 1, 2, "--print", further=["--tau", "24"])
    lines = [shlex.split(line) for line in done.out.splitlines()]
    assert done.code == 0 and started == [] and len(lines) == 2
    for seed, words in enumerate(lines, 1):
        args = flags.train_parser().parse(words[3:])[0]
        assert (args.seed, args.run_num, args.tau, args.alpha, args.overwrite) == (seed, seed, 24, 1.1, seed == 2)
    assert run("cub", "--seeds", 1)[0].code == 0
    logs = ["reproduce.py", "cub", "--seeds", 1, "--log-dir", stand_in / "runs", "--"]
    refused(*logs, "--tau", 24, match="args.json was trained with --tau 32.0, not 24.0")
    refused(*logs, "--seed", 7, match="--seed is set by this script")
    refused("reproduce.py", "cub", "--log-dir", stand_in / "new", "--", "--data-root", stand_in, match="CUB_200_2011")
    refused("reproduce.py", "nothing", match="invalid choice: 'nothing'")
    refused("reproduce.py", "pictures", match="invalid choice: 'pictures'")  # everybody's are others
    assert run("cub", "--seeds", 5, further=["--image-size", "224"])[0].code == 0
    refused(*logs[:2], "--seeds", 5, *logs[4:], match="was trained with --image-size 224, not None: give the same")
    assert not (stand_in / "new").exists()


def test_one_run_on_each_gpu(run):
    done, started = run("cub", "--seeds", 1, 2, 5, 6, "--gpus", 0, 3)
    assert done.code == 0 and "run_1: training seed 1" in done.out
    given = [words[words.index("--gpu-id") + 1] for _, _, words, _, _ in started]
    assert sorted(set(given)) == ["0", "3"]
    for gpu in ("0", "3"):  # one after another on each, two at a time in all
        times = sorted(entry[3:] for entry, used in zip(started, given, strict=True) if used == gpu)
        assert all(end <= begin for (_, end), (begin, _) in zip(times, times[1:], strict=False))
    begun, ended = ([entry[n] for entry in started] for n in (3, 4))
    assert sorted(begun)[1] < min(ended)


def test_ctrl_c_stops_the_run_under_way_and_says_how_to_go_on(stand_in, cub):
    words = ["cub", "--seeds", 4, 5, "--log-dir", stand_in / "runs", "--", "--data-root", cub]
    process = apart.Apart(apart.reproduce_with, stand_in / "train.py", *words)
    process.wait_for("training seed 4")
    os.kill(process.process.pid, signal.SIGINT)
    ended = process.end(timeout=30)
    assert ended.code == 130 and "SIGTERM: stopped. Kept:" in ended.out and "run 2" not in ended.out
    assert "the same command goes on from here" in ended.err


@pytest.mark.slow
def test_two_seeds_for_real(call, cub, tmp_path):
    words = ["cub", "--seeds", 1, 2, "--log-dir", tmp_path, "--", *TINY, "--data-root", cub, "--epochs", 1]
    done = call("reproduce.py", *words)
    assert done.code == 0 and done.out.count("epoch 1/1") == 2, done.err
    assert len(list((tmp_path / "cub" / "cub").glob("run_[12]/last.pth"))) == 2
