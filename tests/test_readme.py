"""The pages that users read: every command in them is parsed, every Python example run, every link followed."""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import evaluate
import flags
import inference
import layouts
import numpy as np
import prepare
import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "BENCHMARKS.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# Flags on these pages that are not this project's: of torchrun, pytest, docker and venv
OTHERS = {"--standalone", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--pdb", "--trace"}
OTHERS |= {"--shm-size", "--system-site-packages"}


def read(page):
    return page.read_text(encoding="utf-8")


def blocks(page, *languages):
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", read(page), re.DOTALL)


def without_blocks(page):
    return re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)


def commands(page):
    """(script as written, its words, the command) of code blocks and of `code` in the text; comments are left out."""
    lines = [line.partition(" #")[0] for block in blocks(page, "sh", "bash") for line in block.splitlines()]
    lines += re.findall(r"`((?:python|torchrun|\.venv/bin/python) [^`]*)`", without_blocks(page))
    for part in (part.strip() for line in lines for part in line.split("&&")):
        words = shlex.split(part)
        places = [number for number, word in enumerate(words) if word.endswith(".py")]
        if places:
            yield words[places[0]], words[places[0] + 1 :], part


COMMANDS = [pytest.param(*command, id=command[-1]) for page in PAGES for command in commands(page)]


class Parsed(Exception):
    """The command line was parsed: no need to go on."""


@pytest.mark.parametrize("script, words, command", COMMANDS)
def test_every_command_parses(monkeypatch, script, words, command):
    """The script is started as the command line would, and stopped once its flags are parsed."""
    if not script.startswith("code/") and "parse_args" not in read(ROOT / script):
        return  # it takes no flags
    original = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        raise Parsed(original(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    with pytest.raises(Parsed) as parsed:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    if script == "code/prepare.py":
        name = parsed.value.args[0].name
        assert name == prepare.WEIGHTS or flags.dataset_name(name) in layouts.DATASETS


def test_commands_are_found():
    for script in ("train", "evaluate", "retrieve", "report", "prepare", "reproduce"):
        assert any(f"code/{script}.py" in command for page in PAGES for _, _, command in commands(page))


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs" or page.name == "README.md"],
                         ids=lambda page: page.name)  # fmt: skip
def test_flags_in_the_text_exist(page):
    parsers = [flags.train_parser(), flags.evaluate_parser(), flags.retrieve_parser(), prepare.build_parser()]
    for action in parsers[-1]._actions:
        parsers += action.choices.values() if isinstance(action, argparse._SubParsersAction) else []
    known = {option for parser in parsers for option in parser._option_string_actions} | OTHERS
    known |= set(re.findall(r'add_argument\("(--[\w-]+)"', read(ROOT / "code" / "reproduce.py")))
    spoken_of = re.findall(r"`[^`\n]*?(--[A-Za-z][\w-]*)", without_blocks(page))
    assert set(spoken_of) <= known


def test_every_recipe_is_named():
    text = read(ROOT / "README.md") + read(ROOT / "docs" / "published.md")
    for recipe in (ROOT / "code" / "recipes").glob("*.args"):
        assert f"`{recipe.name}`" in text


def test_ci_runs_the_tests_with_the_line_of_the_readme():
    lines = [line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
    (line,) = (line for line in lines if line.endswith("-m pytest -q"))
    tests_and_style = (ROOT / ".ci" / "run").read_text().splitlines()[-2:]
    assert tests_and_style[0] == line
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML reads `on` as a truth value
    job = workflow["jobs"]["tests"]
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.14"]
    assert [step["run"] for step in job["steps"] if "run" in step] == tests_and_style


def anchors(page):
    """The names that links into a page may use, as GitHub makes them of its headings."""
    titles = re.findall(r"^#+ (.*)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked), target


def test_every_page_is_linked_from_the_readme():
    text = read(ROOT / "README.md")
    assert [page.name for page in PAGES[1:] if f"({page.relative_to(ROOT)}" not in text] == []


@pytest.mark.slow
def test_the_loss_learns_in_other_peoples_loops():
    """The examples of docs/your_own_loop.md, one after the other, in one namespace, as they are written."""
    examples = blocks(ROOT / "docs" / "your_own_loop.md", "python")
    assert len(examples) == 2 and "MetricLossOnly" in examples[1]
    torch.manual_seed(0)
    namespace = {}
    for example in examples:
        before = {} if not namespace else {n: p.clone() for n, p in namespace["criterion"].named_parameters()}
        exec(example, namespace)
        now = dict(namespace["criterion"].named_parameters())
        assert all(torch.isfinite(p).all() for p in now.values())
        assert all((now[name] != before[name]).any() for name in before)
    assert namespace["criterion"].hgnn.bn1.num_batches_tracked == 8  # 2 batches, 2 epochs, 2 loops


def test_saved_embeddings_go_into_a_database(tmp_path, monkeypatch):
    """The example of docs/evaluation.md, on a file that evaluate.py wrote."""
    (example,) = blocks(ROOT / "docs" / "evaluation.md", "python")
    images = SimpleNamespace(paths=["a.jpg", "c.jpg"])
    benchmark = SimpleNamespace(name="cub", recall_at=(1, 2), query=images, gallery=None)
    embedded = inference.Embedded(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([0, 1]))
    monkeypatch.chdir(tmp_path)
    evaluate.save_embeddings(Path("embeddings.npz"), benchmark, embedded, None)
    namespace = {}
    exec(example, namespace)
    assert list(namespace["records"]) == [("a.jpg", [3.0, 4.0]), ("c.jpg", [0.0, 2.0])]
    assert isinstance(namespace["arrays"]["labels"], np.ndarray)
