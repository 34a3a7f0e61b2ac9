"""Command-line flags: the ones the scripts share, and each script's own.

Names, destinations and defaults of the original flags are part of the interface: command lines of the paper's code
work unchanged. Flags can also come from a file, `@recipes/cub.args`, one or more to a line, '#' begins a comment;
flags behind it on the command line win.
"""

import argparse
import difflib
import math
import re
import shlex
import sys
from pathlib import Path

import torch
from layouts import DATASETS

CODE = Path(__file__).resolve().parent
# What cannot differ from what was trained, by destination
ARCHITECTURE = {
    "model": "--model",
    "sz_embedding": "--embedding-size",
    "add_gmp": "--add-gmp",
    "layer_norm": "--layer-norm",
}
FROM_CHECKPOINT = "needed for published checkpoints alone: this project's say these themselves, and the image size"
TAKEN_FROM_CHECKPOINT = (*ARCHITECTURE, "dataset", "image_size", "train_classes", "amp", "channels_last")
# hist, and what losses.py has, which is not imported before one of them is asked for
LOSSES = (
    "hist",
    "proxy_anchor",
    "proxy_nca",
    "softtriple",
    "arcface",
    "normalized_softmax",
    "multi_similarity",
    "triplet",
    "contrastive",
)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every flag that has one, the description's lines as they are."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, "", False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """ArgumentParser with one-line errors, recipe files with comments, and no abbreviations."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=HelpFormatter,
            fromfile_prefix_chars="@",
            allow_abbrev=False,
        )

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return shlex.split(line, comments=True)

    def parse_known_args(self, args=None, namespace=None):
        args = [self._locate(arg) for arg in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(args, namespace)

    @staticmethod
    def _locate(arg: str) -> str:
        """@recipes/x.args also means the one beside the scripts, wherever they are started from."""
        if arg.startswith("@") and not Path(arg[1:]).exists() and (CODE / arg[1:]).is_file():
            return f"@{CODE / arg[1:]}"
        return arg

    def error(self, message: str):
        if message.startswith("unrecognized arguments: -"):
            flag = message.split()[2].partition("=")[0]
            likely = difflib.get_close_matches(flag, self._option_string_actions, 1)
            message += f"; did you mean {likely[0]}?" if likely else ""
        elif "No such file or directory: '" in message:
            name = message.rpartition("No such file or directory: '")[2].rstrip("'")
            recipes = ", ".join(f"@recipes/{path.name}" for path in sorted((CODE / "recipes").glob("*.args")))
            message = f"@{name}: there is no such file of flags; shipped are {recipes}"
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help lists the flags)\n")

    def command_line(self, values: dict[str, object]) -> list[str]:
        """Flags that say these values (by destination); destinations that this parser lacks are passed over.

        Values that were stored in a checkpoint come back through the parser, and so are checked like typed ones.
        """
        words = []
        for action in self._actions:
            value = values.get(action.dest)
            if isinstance(action, argparse._StoreTrueAction):
                words += action.option_strings[:1] if value is True else []
            elif action.option_strings and isinstance(value, str | int | float):
                words.append(f"{action.option_strings[0]}={value}")
        return words

    def parse(self, argv: list[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
        """(all flags, destinations of those that were given and not left to their defaults)."""
        args = self.parse_args(argv)
        defaults = {action: action.default for action in self._actions}
        for action in self._actions:
            action.default = argparse.SUPPRESS
        given = set(vars(self.parse_args(argv)))
        for action, default in defaults.items():
            action.default = default
        return args, given

    def adopt(self, args: argparse.Namespace, given: set[str], stored: dict, path: Path) -> argparse.Namespace:
        """Flags left open come from a checkpoint; those given win, but for what a trained network cannot change.

        args, given: what parse() returned; stored: the flags in the checkpoint at path. Raises ValueError.
        """
        for name, option in ARCHITECTURE.items():
            if name in given and name in stored and getattr(args, name) != stored[name]:
                raise ValueError(
                    f"{path} was trained with {option} {stored[name]}, the command line says {getattr(args, name)}"
                )
        taken = {name: stored[name] for name in TAKEN_FROM_CHECKPOINT if name in stored}
        if "dataset" in given and args.dataset != stored.get("dataset"):
            taken.pop("train_classes", None)  # it said how to divide another data set
        # The user's own folder has no usual place as the benchmarks have: it is where it was, if it still is.
        elif stored.get("dataset") == "folder" and Path(str(stored.get("data_root"))).exists():
            taken["data_root"] = stored["data_root"]
        adopted = self.command_line(taken)
        return self.parse(adopted + sys.argv[1:])[0]


def plain(args: argparse.Namespace) -> dict[str, object]:
    """Flags by destination as plain data, for files. Paths whole, so that they are found from any folder; links in
    them stay links."""
    return {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in vars(args).items()}


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full: a smaller --batch-size or --amp bf16 needs less"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = str(error).strip()
    _, wrapped, traceback = text.rpartition("Traceback (most recent call last):\n")
    if text.startswith("Caught ") and wrapped:  # torch copies the whole traceback of a loader's worker process
        message = "\n".join(line for line in traceback.splitlines() if not line.startswith(" "))
        text = re.sub(r"^[\w.]+: ", "", message)
    return " ".join(text.split()) or type(error).__name__


def run_script(main) -> None:
    """Run a script's main; what its user can put right is said in one line, with a non-zero exit.

    `python -X dev script.py` shows the traceback instead.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names may be bytes that are no text
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: {one_line(error)}")
    except RuntimeError as error:
        lost = torch.distributed.is_initialized() and any(word in str(error) for word in ("gloo", "NCCL", "peer"))
        if not lost or sys.flags.dev_mode:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: another process of this run ended; its own message says why")
    except KeyboardInterrupt:
        sys.exit(130)


def binary(text: str) -> int:
    """0 or 1; true and false are understood."""
    values = {"0": 0, "false": 0, "1": 1, "true": 1}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"must be 0 or 1, got {text!r}")
    return values[text.lower()]


def whole(at_least: int):
    """A type for whole numbers from a bound on."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = at_least - 1
        if value < at_least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {at_least}, got {text!r}")
        return value

    return number


def real(at_least: float = 0.0, below: float = math.inf, positive: bool = False):
    """A type for numbers in [at_least, below), zero excluded where positive."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not at_least <= value < below or (positive and value == 0):
            bounds = "above 0" if positive else f"of at least {at_least:g}"
            limit = "" if below == math.inf else f" and below {below:g}"
            raise argparse.ArgumentTypeError(f"must be a number {bounds}{limit}, got {text!r}")
        return value

    return number


def add_network_flags(parser: Parser, description: str | None = None):
    group = parser.add_argument_group("network", description)
    group.add_argument(
        "--model",
        default="resnet50",
        help="backbone: resnet18, resnet34, resnet50, resnet101, googlenet, "
        "bn_inception, or timm:NAME for any model of timm",
    )
    group.add_argument(
        "--embedding-size", dest="sz_embedding", type=whole(1), default=512, help="D, dimensions of the embedding"
    )
    group.add_argument(
        "--add-gmp", type=binary, default=1, help="1: global max pooling is added to the global average pooling"
    )
    group.add_argument(
        "--layer-norm", type=binary, default=1, help="1: LayerNorm without affine behind the embedding layer"
    )
    return group


def add_image_flags(group, batch_size: int) -> None:
    group.add_argument(
        "--image-size",
        type=whole(8),
        help="pixels fed to the network, by default those it was trained with; if that is not known its own, 224 but "
        "for some of timm's; evaluation first resizes to image-size·256/224",
    )
    group.add_argument("--batch-size", dest="sz_batch", type=whole(1), default=batch_size, help="images in a batch")
    group.add_argument(
        "--workers",
        dest="nb_workers",
        type=whole(0),
        default=4,
        help="processes that decode images; does not change results",
    )


def add_data_flags(parser: Parser, batch_size: int):
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset", choices=DATASETS, default="cars", help="benchmark, or 'folder' for your own pictures"
    )
    group.add_argument(
        "--data-root",
        type=Path,
        default=CODE.parent / "data",
        help="folder that holds the benchmarks; with --dataset folder the folder of class folders, or a CSV file",
    )
    group.add_argument(
        "--train-classes",
        type=real(0, 1, positive=True),
        default=0.5,
        help="share of the sorted classes "
        "that trains when --dataset folder has no train/ and test/; the rest is the test split",
    )
    add_image_flags(group, batch_size)
    group.add_argument(
        "--skip-bad-images",
        action="store_true",
        help="go on past images that cannot be decoded and count them, instead of stopping at the first",
    )
    return group


def add_device_flags(parser: Parser):
    group = parser.add_argument_group("device and speed")
    group.add_argument(
        "--gpu-id", type=whole(-1), default=0, help="GPU to use, -1 for the CPU; without any GPU the CPU is used"
    )
    group.add_argument(
        "--amp",
        choices=("off", "bf16"),
        default="off",
        help="bf16: the network computes in bfloat16 where that is safe, the loss in float32; changes "
        "results slightly. off: float32; convolutions on GPUs use TF32, as torch has always done by default",
    )
    group.add_argument(
        "--channels-last",
        type=binary,
        default=0,
        help="1: channels-last memory layout, faster with --amp bf16; changes results by rounding",
    )
    group.add_argument(
        "--search-memory",
        type=real(positive=True),
        default=1.0,
        help="memory the nearest-neighbour search may take, in GiB",
    )
    return group


def train_parser() -> Parser:
    parser = Parser(
        "Train a network with HIST loss and score it on classes it never saw.\n\n"
        "  a first try, offline   python code/train.py @recipes/glyphs.args\n"
        "  the paper's recipe     python code/train.py @recipes/cub.args\n"
        "  your own pictures      python code/train.py --dataset folder --data-root my_pictures\n"
        "  to search in them      python code/retrieve.py --model-path logs/folder/run_1 --gallery my_pictures "
        "--query photo.jpg\n"
        "  on with a run          python code/train.py --dataset folder --resume"
    )
    data = add_data_flags(parser, batch_size=32)
    data.add_argument(
        "--IPC",
        type=whole(0),
        default=0,
        help="images per class in a batch: batch-size/IPC classes with IPC images each; 0: plain shuffling",
    )
    data.add_argument(
        "--val-classes",
        type=real(0, 1),
        default=0.0,
        help="share of the training classes held out to "
        "choose the best epoch by; 0: the test split chooses it, as in the paper's protocol",
    )
    network = add_network_flags(parser)
    network.add_argument(
        "--weights",
        default="imagenet",
        help="start of the backbone: imagenet (IMAGENET1K_V1, downloaded), none (random), or a local file",
    )
    network.add_argument(
        "--bn-freeze",
        type=binary,
        default=1,
        help="1: BatchNorm statistics of the backbone stay fixed. "
        "Its affine parameters start frozen too, but are trained once a warm-up has un-frozen the backbone; "
        "with --warm 0 they stay frozen. 0: all of BatchNorm trains",
    )

    loss = parser.add_argument_group("loss", "tau, alpha, ls and hgnn-hidden are settings of HIST alone")
    loss.add_argument(
        "--loss",
        choices=LOSSES,
        default="hist",
        help="hist, or for comparison a loss of pytorch-metric-learning; multi_similarity, triplet and contrastive "
        "compare the images of a batch with each other: give them --IPC 4",
    )
    loss.add_argument(
        "--loss-args",
        default="",
        metavar="NAME=NUMBER,…",
        help="settings of a loss other than hist, as margin=0.1,alpha=32; without them those of its paper or library",
    )
    loss.add_argument(
        "--tau",
        type=real(positive=True),
        default=32.0,
        help="temperature of the distribution loss; the paper uses 16 to 32",
    )
    loss.add_argument(
        "--alpha", type=real(), default=0.9, help="scale of distances in the hypergraph; the paper uses 0.9 to 2"
    )
    loss.add_argument(
        "--ls",
        type=real(),
        default=1.0,
        help="lambda_s, weight of the HGNN's cross-entropy; 0 is the distribution loss alone",
    )
    loss.add_argument("--hgnn-hidden", type=whole(1), default=512, help="width of the HGNN's hidden layer")

    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument(
        "--epochs",
        dest="nb_epochs",
        type=whole(0),
        default=50,
        help="training epochs; those of the warm-up are not counted",
    )
    optimisation.add_argument("--warm", type=whole(0), default=1, help="warm-up epochs with the backbone frozen")
    optimisation.add_argument(
        "--optimizer",
        choices=("adam", "adamw", "sgd", "rmsprop"),
        default="adam",
        help="sgd: Nesterov momentum 0.9; rmsprop: alpha 0.9, momentum 0.9",
    )
    optimisation.add_argument("--lr", type=real(), default=1e-4, help="learning rate of backbone and embedding layer")
    optimisation.add_argument(
        "--lr-ds",
        type=real(),
        default=1e-1,
        help="learning rate of the class distributions; of the proxies, centres or class weights of another --loss",
    )
    optimisation.add_argument("--lr-hgnn-factor", type=real(), default=10.0, help="the HGNN learns at lr times this")
    optimisation.add_argument("--weight-decay", type=real(), default=1e-4, help="one weight decay for everything")
    optimisation.add_argument(
        "--lr-decay-step", type=whole(1), default=10, help="epochs between drops of all learning rates"
    )
    optimisation.add_argument("--lr-decay-gamma", type=real(), default=0.5, help="factor of each drop")

    device = add_device_flags(parser)
    device.add_argument(
        "--compile",
        type=binary,
        default=0,
        help="1: torch.compile the network for training; the first epoch begins slowly; changes results by rounding",
    )

    run = parser.add_argument_group("run")
    run.add_argument(
        "--seed", type=whole(0), default=1, help="governs everything random: initial weights, batches, augmentation"
    )
    run.add_argument("--deterministic", action="store_true", help="use deterministic algorithms on the GPU too; slower")
    run.add_argument(
        "--log-dir", type=Path, default=CODE.parent / "logs", help="runs are kept under log-dir/DATASET/run_N"
    )
    run.add_argument(
        "--run-num",
        type=whole(0),
        default=1,
        help="N of run_N (%(default)s in the original); without this flag the next free number",
    )
    run.add_argument("--overwrite", action="store_true", help="replace the run of --run-num if it exists")
    run.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="go on with an interrupted run from its last.pth: "
        "that of --run-num, of the newest run, or FILE; its stored flags apply",
    )
    run.add_argument(
        "--wandb",
        choices=("off", "offline", "online"),
        help="record the run in wandb too; without this flag what WANDB_MODE says, else off",
    )
    run.add_argument("--remark", default="", help="a note that is kept with the run")
    return parser


def evaluate_parser() -> Parser:
    parser = Parser("Score a checkpoint: recall@K of images of classes that were not trained on.")
    parser.add_argument("--model-path", default="", help="checkpoint, or a folder that holds DATASET_MODEL_best.pth")
    add_data_flags(parser, batch_size=150)
    add_network_flags(parser, FROM_CHECKPOINT)
    add_device_flags(parser)
    parser.add_argument("--remark", default="", help="a note that is printed with the figures")
    scores = parser.add_argument_group("figures")
    scores.add_argument(
        "--metrics",
        nargs="+",
        choices=("recall", "rp", "map", "nmi", "all"),
        default=["recall"],
        help="rp: R-precision, map: MAP@R, nmi: normalised mutual information of k-means",
    )
    scores.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    scores.add_argument("--save-embeddings", type=Path, metavar="FILE.npz", help="keep embeddings, labels and paths")
    scores.add_argument(
        "--embeddings", type=Path, metavar="FILE.npz", help="score these embeddings; no network, no images"
    )
    scores.add_argument(
        "--pictures", type=Path, metavar="DIR", help="draw the nearest neighbours of some queries and a map of classes"
    )
    scores.add_argument(
        "--export", type=Path, metavar="FILE.onnx", help="write the network for other programs instead of scoring it"
    )
    return parser


def retrieve_parser() -> Parser:
    parser = Parser("Find the images of a folder that are most like given ones.")
    parser.add_argument("--model-path", default="", help="checkpoint, or a run's folder that holds its *_best.pth")
    search = parser.add_argument_group("search")
    search.add_argument(
        "--gallery", type=Path, required=True, metavar="DIR", help="folder with the images to search in"
    )
    search.add_argument(
        "--query", type=Path, required=True, metavar="IMAGE_OR_DIR", help="image to search for, or a folder of them"
    )
    search.add_argument(
        "--top-k", type=whole(1), default=10, help="neighbours of each query; pictures and page show 20 at most"
    )
    search.add_argument(
        "--index",
        choices=("exact", "faiss"),
        default="exact",
        help="faiss: an inverted file of faiss, which misses about one neighbour in 20; for thousands of queries in "
        "millions of images, else making it takes longer than it saves",
    )
    search.add_argument(
        "--output",
        type=Path,
        default=Path("retrieved"),
        metavar="DIR",
        help="folder for neighbours.csv, .png and .html",
    )
    images = parser.add_argument_group("images")
    add_image_flags(images, batch_size=150)
    add_network_flags(parser, FROM_CHECKPOINT)
    add_device_flags(parser)
    return parser
