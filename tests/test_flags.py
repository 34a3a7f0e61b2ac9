"""The command line: the original's flags and values, recipes, and one-line errors."""

import re
import sys
from pathlib import Path

import distributed
import flags
import pytest
import torch
from refused import Refused

ROOT = Path(__file__).resolve().parent.parent

# Command lines as published for the three benchmarks, and what they mean.
PUBLISHED = {
    "cub": (
        "--gpu-id 0 --dataset cub --model resnet50 --embedding-size 512 --tau 32 --alpha 1.1 --epochs 40 --lr 1.2e-4 "
        "--lr-ds 1e-1 --lr-hgnn-factor 5 --weight-decay 5e-5 --lr-decay-step 5",
        dict(tau=32, alpha=1.1, nb_epochs=40, lr=1.2e-4, lr_ds=0.1, lr_hgnn_factor=5, weight_decay=5e-5,
             lr_decay_step=5),
    ),
    "cars": (
        "--gpu-id 0 --dataset cars --model resnet50 --embedding-size 512 --tau 32 --alpha 0.9 --epochs 50 --lr 1e-4 "
        "--lr-ds 1e-1 --lr-hgnn-factor 10 --weight-decay 1e-4 --lr-decay-step 10",
        dict(tau=32, alpha=0.9, nb_epochs=50, lr=1e-4, lr_ds=0.1, lr_hgnn_factor=10, weight_decay=1e-4,
             lr_decay_step=10),
    ),
    "SOP": (
        "--gpu-id 0 --dataset SOP --model resnet50 --embedding-size 512 --tau 16 --alpha 2 --epochs 60 --lr 1e-4 "
        "--lr-ds 1e-2 --lr-hgnn-factor 10 --weight-decay 1e-4 --lr-decay-step 10 --bn-freeze 0",
        dict(tau=16, alpha=2, nb_epochs=60, lr=1e-4, lr_ds=0.01, lr_hgnn_factor=10, weight_decay=1e-4, bn_freeze=0),
    ),
}  # fmt: skip

DEFAULTS = dict(
    gpu_id=0, nb_workers=4, dataset="cars", model="resnet50", sz_embedding=512, hgnn_hidden=512, add_gmp=1, sz_batch=32,
    nb_epochs=50, optimizer="adam", lr=1e-4, lr_ds=1e-1, lr_hgnn_factor=10, weight_decay=1e-4, lr_decay_step=10,
    lr_decay_gamma=0.5, tau=32, alpha=0.9, ls=1, IPC=0, warm=1, bn_freeze=1, layer_norm=1, remark="", run_num=1,
)  # fmt: skip
EVALUATE_DEFAULTS = dict(
    dataset="cars", sz_embedding=512, sz_batch=150, gpu_id=0, nb_workers=4, model="resnet50", layer_norm=1,
    model_path="", remark="",
)  # fmt: skip


def parsed(parser, words):
    return vars(parser.parse(words)[0])


def test_defaults_are_the_originals():
    assert parsed(flags.train_parser(), []).items() >= DEFAULTS.items()
    assert parsed(flags.evaluate_parser(), []).items() >= EVALUATE_DEFAULTS.items()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_command_lines_mean_what_they_meant_and_are_the_recipes(name):
    line, expected = PUBLISHED[name]
    found = parsed(flags.train_parser(), line.split())
    assert found.items() >= (DEFAULTS | expected | {"dataset": name}).items()
    assert parsed(flags.train_parser(), [f"@recipes/{name.lower()}.args"]) == found


def test_given_names_exactly_what_was_typed(tmp_path):
    _, given = flags.train_parser().parse(["--lr", "1e-4", "--dataset=cub", "--deterministic"])
    assert given == {"lr", "dataset", "deterministic"}
    recipe = tmp_path / "my.args"
    recipe.write_text("# tuned\n--tau 24 --alpha 1.15   # both\n\n--remark 'two words'\n")
    args, given = flags.train_parser().parse([f"@{recipe}", "--tau", "20"])
    assert (args.tau, args.alpha, args.remark) == (20, 1.15, "two words")
    assert given == {"tau", "alpha", "remark"}


def test_every_recipe_parses_from_any_folder(tmp_path, monkeypatch):
    """Tuned ones change nothing but the loss."""
    monkeypatch.chdir(tmp_path)
    parser, tuned = flags.train_parser(), []
    for path in (ROOT / "code" / "recipes").glob("*.args"):
        found = parsed(parser, [f"@recipes/{path.name}"])
        if path.stem.endswith("_tuned"):
            published = parsed(parser, [f"@recipes/{path.stem.removesuffix('_tuned')}.args"])
            assert {flag for flag in found if found[flag] != published[flag]} <= {"tau", "alpha", "ls"}
            assert found != published
            tuned.append(path.stem)
    assert len(tuned) == 6


def test_stored_flags_come_back_through_the_parser():
    parser = flags.train_parser()
    args, _ = parser.parse(["--lr", "0.00012", "--dataset", "cub", "--deterministic", "--remark", "odd remark"])
    assert parser.parse(parser.command_line(flags.plain(args)))[0] == args
    assert parser.parse(parser.command_line({"remark": "--lr 5"}))[0].remark == "--lr 5"


IN_A_WORKER = (
    "Caught Refused in DataLoader worker process 1.\nOriginal Traceback (most recent call last):\n"
    '  File "a.py", line 1, in f\n    raise Refused\nrefused.Refused: the disk: is\nfull\n'
)


@pytest.mark.parametrize(
    "error, said",
    [
        (Refused("a\n b"), "train.py: error: a b$"),
        (Refused(IN_A_WORKER), "error: the disk: is full$"),
        (FileNotFoundError(2, "No such file", "a/b"), "error: a/b: No such file$"),
        (torch.OutOfMemoryError("Tried to allocate 2 GiB.\nOf which 3"), "a smaller --batch-size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "signal.*--shm-size.*--workers 0"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "exited unexpectedly: too little memory"),
        (distributed.Lost("lost: NCCL error"), r"the other processes were lost \(lost: NCCL error\)"),
        (KeyboardInterrupt(), "^130$"),
        (ValueError("4 is not in list"), None),
        (OSError("ours"), None),
        (RuntimeError("NCCL: Duplicate GPU detected by a peer"), None),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_a_slip_keeps_its_traceback(monkeypatch, error, said):
    monkeypatch.setattr(sys, "argv", ["code/train.py"])

    def main():
        raise error

    with pytest.raises(SystemExit if said else type(error), match=said):
        flags.run_script(main)


def test_help_names_defaults_of_zero_and_such_flags_take_words():
    text = " ".join(flags.train_parser().format_help().split())
    assert re.search(r"--gpu-id N .{,300}\(default: 0\)", text) and "(default: False)" not in text
    assert [flags.binary(word) for word in ("0", "1", "true", "False")] == [0, 1, 1, 0]
