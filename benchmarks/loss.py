"""Measures HISTLoss, forward and backward, against the textbook form of the same loss.

The textbook form is what one writes from the paper's equations: an (N, C, D) tensor of squared differences, one-hot
labels made on the CPU by scikit-learn, softmax and then the logarithm, G as a product of diagonal matrices. Both have
the same parameters and inputs, each runs in a process of its own. Random labels, LayerNorm'ed embeddings, float32.

    python benchmarks/loss.py                     # a few minutes on two cores
    python benchmarks/loss.py --quick             # half a minute: small sizes, to see that it works
    python benchmarks/loss.py --device cuda
    python benchmarks/loss.py --sweep-size 512    # the sweep over C at D = 512: a million classes need 30 GB

Time: median of the repetitions, gradients set to None before each. Extra memory: the highest during one forward and
backward over what the process holds just before it. Inputs, parameters and gradients (allocated before, added to) are
there before, as is whatever the libraries keep (both have run at a small size); all that is made on the way, such as
the increment of a gradient until it is added, counts. On a GPU: memory allocated by torch.

Differences: norm of the difference over the norm, of the two forms and of either from HISTLoss in float64. Theta 1 is
apart: BatchNorm behind it cancels most of its gradient, and what is left carries the rounding of float32 in any form.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import Memory, alone, free_memory, machine, table, timed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "code"))
from hist import HISTLoss  # noqa: E402


def textbook_loss(criterion: HISTLoss, X: torch.Tensor, T: torch.Tensor) -> torch.Tensor:
    """The loss of `criterion` as its equations read, tensor by tensor."""
    from sklearn.preprocessing import label_binarize

    classes, hgnn = criterion.cds2hg, criterion.hgnn
    one_hot = label_binarize(T.cpu().numpy(), classes=range(criterion.num_classes))
    one_hot = torch.from_numpy(one_hot).to(X.device, X.dtype)  # (N, C)

    x, means = F.normalize(X), F.normalize(classes.means)
    variances = F.relu6(classes.log_vars).exp()
    squares = (x[:, None, :] - means[None, :, :]) ** 2 / variances[None, :, :]  # (N, C, D)
    distances = squares.sum(dim=2)  # (N, C)

    probabilities = torch.softmax(-classes.tau * distances, dim=1)
    own = (probabilities * one_hot).sum(dim=1)
    dist_loss = -torch.log(own[own > 0]).mean()

    present = one_hot.sum(dim=0) > 0
    members = one_hot[:, present]  # (N, E)
    H = members + (1 - members) * torch.exp(-classes.alpha * distances[:, present])
    Dv = torch.diag(H.sum(dim=1) ** -0.5)
    De = torch.diag(1 / H.sum(dim=0))
    W = torch.eye(H.shape[1], device=H.device)
    G = Dv @ H @ W @ De @ H.T @ Dv  # (N, N)

    hidden = hgnn.lrelu(hgnn.bn1(G @ hgnn.theta1(X)))
    logits = G @ hgnn.theta2(hidden)
    return dist_loss + criterion.ls * F.cross_entropy(logits, T)


def our_loss(criterion: HISTLoss, X: torch.Tensor, T: torch.Tensor) -> torch.Tensor:
    return criterion(X, T)


FORMS = {"ours": our_loss, "textbook": textbook_loss, "float64": our_loss}


def problem(N: int, C: int, D: int, device: str, dtype=torch.float32) -> tuple[HISTLoss, torch.Tensor, torch.Tensor]:
    """The same parameters, embeddings and labels in every process."""
    torch.manual_seed(0)
    criterion = HISTLoss(C, D, D)
    X, T = F.layer_norm(torch.randn(N, D), (D,)), torch.randint(C, (N,))
    return criterion.to(device, dtype), X.to(device, dtype).requires_grad_(), T.to(device)


def results(loss: torch.Tensor, criterion: HISTLoss, X: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss and, after its backward pass, the gradients of X and by parameter name, on the CPU."""
    gradients = {name: parameter.grad.cpu() for name, parameter in criterion.named_parameters()}
    return {"loss": loss.detach().cpu(), "X": X.grad.cpu()} | gradients


def measure_loss(form: str, N: int, C: int, D: int, device: str, threads: int, repeats: int, file: str) -> dict:
    """Seconds and extra bytes of one form; its loss and gradients (of X and by parameter name) go to a file."""
    torch.set_num_threads(threads)
    run, dtype = FORMS[form], torch.float64 if form == "float64" else torch.float32
    small = problem(4, 10, 8, device)
    run(*small).backward()  # loads what the libraries load at their first call

    criterion, X, T = problem(N, C, D, device, dtype)
    inputs = {"X": X, **dict(criterion.named_parameters())}
    for tensor in inputs.values():
        tensor.grad = torch.full_like(tensor, 0.0)
    memory = Memory(device)
    loss = run(criterion, X, T)
    loss.backward()
    extra = memory.extra()
    torch.save(results(loss, criterion, X), file)
    if form == "float64":
        return {}

    def step():
        for tensor in inputs.values():
            tensor.grad = None
        run(criterion, X, T).backward()

    return {"seconds": timed(step, device, repeats), "extra": extra}


def relative_differences(one: dict, two: dict) -> dict[str, float]:
    """The loss, all gradients as one vector, the worst of the gradients without theta 1, the worst of theta 1.

    one, two: from results().
    """
    errors = {name: (one[name].double() - two[name].double()).norm().item() for name in one}
    norms = {name: two[name].double().norm().item() for name in one}
    relative = {name: errors[name] / norms[name] for name in one}
    gradients = [name for name in one if name != "loss"]
    theta1 = [name for name in gradients if "theta1" in name]
    return {
        "loss": relative["loss"],
        "all gradients": math.hypot(*map(errors.get, gradients)) / math.hypot(*map(norms.get, gradients)),
        "worst but theta 1": max(relative[name] for name in gradients if name not in theta1),
        "theta 1": max(relative[name] for name in theta1),
    }


def bytes_needed(form: str, N: int, C: int, D: int) -> int:
    """A generous estimate: parameters and gradients, and the tensors that are alive at the same time."""
    alive = 16 * C * D + 20 * N * C
    if form == "textbook":
        alive += 8 * N * C * D
    return 4 * alive * (2 if form == "float64" else 1)


def measure_size(N: int, C: int, D: int, args) -> dict:
    """Everything about one size; a form that needs more than the free memory is left out (None)."""
    found = {"size": " × ".join(f"{n:,}" for n in (N, C, D))}
    size = (N, C, D, args.device, args.threads)
    with tempfile.TemporaryDirectory() as folder:
        files = {form: Path(folder) / f"{form}.pt" for form in FORMS}
        for form in FORMS:
            wanted = (
                form == "ours" or found["ours"] is not None and (form == "textbook" or found["textbook"] is not None)
            )
            fits = bytes_needed(form, N, C, D) < 0.85 * free_memory(args.device)
            repeats = args.repeats if form == "ours" else max(1, args.repeats // 3)
            found[form] = alone(measure_loss, form, *size, repeats, str(files[form])) if wanted and fits else None
        pairs = [("ours", "textbook"), ("ours", "float64"), ("textbook", "float64")]
        found["differences"] = {
            f"{one} from {two}": relative_differences(torch.load(files[one]), torch.load(files[two]))
            for one, two in pairs
            if files[one].exists() and files[two].exists()
        }
    return found


def ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}"


def mb(size: int) -> str:
    return f"{size / 1e6:,.0f}"


def comparison_row(found: dict) -> list[str]:
    ours, textbook = found["ours"], found["textbook"]
    times, sizes = (
        [text(run[what]) if run else "too large" for run in (ours, textbook)]
        for what, text in (("seconds", ms), ("extra", mb))
    )
    ratios = [f"{textbook[what] / max(ours[what], 1e-9):.1f}" if textbook else "" for what in ("seconds", "extra")]
    return [found["size"], *times, ratios[0], *sizes, ratios[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="small sizes, few repetitions: only to see that it works")
    parser.add_argument("--threads", type=int, default=2, help="threads on the CPU (default 2)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    parser.add_argument("--repeats", type=int, default=15, help="default 15; a third for the textbook form")
    parser.add_argument("--sweep-size", type=int, default=128, help="D and hidden width of the sweep (default 128)")
    args = parser.parse_args()

    sizes, sweep = [(32, 100, 512), (32, 11_318, 512), (180, 11_318, 512)], [100, 1_000, 10_000, 100_000, 1_000_000]
    if args.quick:
        sizes, sweep, args.repeats = [(32, 100, 512), (32, 2_000, 128)], [100, 1_000], 3
    sizes += [(32, C, args.sweep_size) for C in sweep]

    print(machine(args.device, args.threads))
    rows = [measure_size(*size, args) for size in sizes]
    print("\nForward and backward of the whole loss; what counts as extra memory: see the top of this script\n")
    head = ["N × C × D", "ours ms", "textbook ms", "ratio", "ours MB", "textbook MB", "ratio"]
    print(table(head, [comparison_row(found) for found in rows]))
    print("\nRelative differences\n")
    columns = ["loss", "all gradients", "worst but theta 1", "theta 1"]
    differences = [
        [f"{found['size']}: {pair}", *(f"{values[column]:.1e}" for column in columns)]
        for found in rows
        for pair, values in found["differences"].items()
    ]
    print(table(["N × C × D", *columns], differences))


if __name__ == "__main__":
    main()
