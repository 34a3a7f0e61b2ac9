"""Checks and measures on a GPU, in one run, everything that this project does on one.

    python benchmarks/gpu.py                        # about seven minutes on one GPU
    python benchmarks/gpu.py --parts step,loss      # some of the parts
    python benchmarks/gpu.py --device cpu --quick   # does it run? small sizes, on any machine (Linux)

Nothing is downloaded, and all data are drawn. The tables are printed and written to gpu.md, their numbers to gpu.json.
A part that fails says why, and the others go on; the exit status is 1 if any part failed. `ok` is a check that must
hold; `goal` is a figure to reach and fails nothing.
"""

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path

import gpu_checks
import gpu_speed
import torch
from measure import machine, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "code"))
import checkpoint  # noqa: E402
import distributed  # noqa: E402
import flags  # noqa: E402
import refused  # noqa: E402
import summary  # noqa: E402

PARTS = {
    "values": gpu_checks.check_values,
    "training": gpu_checks.check_training,
    "scores": gpu_checks.check_scores,
    "bf16": gpu_checks.check_bf16,
    "labels": gpu_checks.check_labels,
    "onnx": gpu_checks.check_onnx,
    "determinism": gpu_checks.check_determinism,
    "graph": gpu_checks.check_graph,
    "step": gpu_speed.measure_step,
    "loss": gpu_speed.measure_loss,
    "evaluation": gpu_speed.measure_evaluation,
    "loader": gpu_speed.measure_loader,
    "convolutions": gpu_speed.measure_convolutions,
    "epoch": gpu_speed.measure_epoch,
    "gpus": gpu_speed.measure_several_gpus,
}


def run_part(name: str, sizes: gpu_checks.Sizes, device: torch.device) -> dict:
    """The part's rows as far as it came, and why it failed, None if it did not."""
    started, rows, error = time.monotonic(), [], None
    title = PARTS[name].__doc__.splitlines()[0]
    print(f"{name}: {title}", file=sys.stderr, flush=True)
    try:
        gc.collect()  # what the part before left on the device
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for row in PARTS[name](sizes, device):
            rows.append(row)
        wrong = sum(row.get("ok") is False for row in rows)
        error = f"{wrong} of {len(rows)} checks do not hold" if wrong else None
    except Exception as problem:
        error = f"{type(problem).__name__}: {refused.one_line(problem)}"
    return {"part": name, "title": title, "seconds": time.monotonic() - started, "error": error, "rows": rows}


def cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else value
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def part_markdown(part: dict) -> str:
    head = list(dict.fromkeys(name for row in part["rows"] for name in row))
    lines = [[cell(row.get(name)) for name in head] for row in part["rows"]]
    said = [f"### {part['part']}", f"{part['title']}. {part['seconds']:.0f} s."]
    said += [table(head, lines)] if lines else []
    said += [f"FAILED: {part['error']}"] if part["error"] else []
    return "\n\n".join(said)


def head_markdown(report: dict) -> str:
    return f"## On a GPU\n\n`{report['command']}`: {report['machine']}, commit {report['commit']}"


def markdown(report: dict) -> str:
    return "\n\n".join([head_markdown(report), *map(part_markdown, report["parts"])]) + "\n"


def names_of_parts(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"there is no part {name!r}, there are {', '.join(PARTS)}")
    return names


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=gpu, help="default cuda if there is a GPU")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument(
        "--parts", "--only", type=names_of_parts, default=list(PARTS), metavar="PART,…", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="for gpu.md and gpu.json, default .")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    return args


def main() -> None:
    args = parse_flags()
    checkpoint.require_writable(args.output, "--output", folder=True)
    args.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch looks at it once; part graph needs it
    device = distributed.choose_device(0 if args.device == "cuda" else -1)
    report = {
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "machine": machine(device, torch.get_num_threads()),
        "commit": summary.environment(device)["commit"],
        "parts": [],
    }
    print(head_markdown(report), flush=True)
    for name in args.parts:
        part = run_part(name, gpu_checks.QUICK if args.quick else gpu_checks.FULL, device)
        report["parts"].append(part)
        print("\n" + part_markdown(part), flush=True)
        # After every part: whoever stops the script keeps what there is.
        checkpoint.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", args.output / "gpu.json")
        checkpoint.write_text(markdown(report), args.output / "gpu.md")
    failed = [part["part"] for part in report["parts"] if part["error"]]
    if failed:
        sys.exit(f"gpu.py: failed: {', '.join(failed)}")


if __name__ == "__main__":
    flags.run_script(main)
