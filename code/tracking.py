"""wandb: off unless asked for; project hist_DATASET, run run_N, kept in the run's folder."""

import os
from argparse import Namespace
from pathlib import Path

from refused import Refused, one_line


def start(args: Namespace, folder: Path, config: dict, run_id: str | None):
    """A wandb run, or None where it is off.

    args.wandb: off, offline, online, or None for what WANDB_MODE says. run_id continues an earlier run. Never asks for
    a key: online without one, or without the network, becomes offline. Raises Refused if wandb is not installed.
    """
    mode = args.wandb or os.environ.get("WANDB_MODE", "off").replace("dryrun", "offline")  # wandb's older word
    if mode not in ("online", "offline"):
        return None
    try:
        import wandb
    except ImportError as error:
        raise Refused(f"--wandb {mode}: wandb is not installed (pip install wandb, or --wandb off)") from error
    tags = [args.dataset, args.model, f"seed {args.seed}", *args.remark.split()]
    options = dict(project=f"hist_{args.dataset}", name=folder.name, config=config, dir=str(folder),
                   tags=[tag[:64] for tag in tags],  # wandb takes no longer ones
                   id=run_id, resume="allow", settings=wandb.Settings(silent=True))  # fmt: skip
    run = None
    if mode == "online":
        try:
            run = wandb.init(mode="online", **options) if wandb.login(prompt=False) else None
        except wandb.errors.Error as error:
            print(f"wandb: {one_line(error)[:100]}")
        if run is None:
            print("wandb: no key or no connection, recording offline; `wandb sync` sends it later")
    run = run or wandb.init(mode="offline", **options)
    run.define_metric("*", step_metric="epoch")
    return run


def chosen_by(row: dict) -> str:
    """The figure of a row that chooses the best epoch: of the held-out classes if there are any."""
    return "val R@1" if "val R@1" in row else "R@1"


def log(run, row: dict, best: dict | None) -> None:
    """One row; the summary keeps the best epoch: the figure that chose it, and its R@K."""
    run.log(row)
    if best:
        names = [name for name in best if name.startswith("R@") or name in ("epoch", chosen_by(best))]
        run.summary.update({f"best {name}": best[name] for name in names})


def log_pictures(run, folder: Path) -> None:
    import wandb

    run.log({path.stem: wandb.Image(str(path)) for path in sorted(folder.glob("*.png"))})


def finish(run) -> None:
    where = Path(run.dir).parent
    run.finish()
    if run.settings.mode == "offline":
        print(f"wandb: {os.path.relpath(where)}; `wandb sync` sends it")
