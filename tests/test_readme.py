"""What README.md says, held against the repository."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def test_ci_runs_the_tests_with_the_line_of_the_readme():
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (line,) = (line for block in blocks for line in block.splitlines() if line.endswith("-m pytest -q"))
    tests_and_style = (ROOT / ".ci" / "run").read_text().splitlines()[-2:]
    assert tests_and_style[0] == line
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML reads `on` as a truth value
    job = workflow["jobs"]["tests"]
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.13"]
    assert [step["run"] for step in job["steps"] if "run" in step] == tests_and_style
