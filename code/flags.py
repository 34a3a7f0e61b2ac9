"""Command-line flags: the ones the scripts share, and each script's own.

Names, destinations and defaults of the original flags are part of the interface: command lines of the paper's code
work unchanged. Flags can also come from a file, `@recipes/cub.args`, one or more to a line; '#' begins a comment.
Later flags override earlier ones.
"""

import argparse
import errno
import functools
import math
import os
import re
import select
import shlex
import signal
import sys
from pathlib import Path

import distributed
import layouts
import torch
from refused import Refused, one_line

CODE = Path(__file__).resolve().parent
DATA = CODE.parent / "data"  # where the benchmarks are looked for
ARCHITECTURE = ("model", "sz_embedding", "add_gmp", "layer_norm")  # make the network: a trained one cannot change them
TAKEN_FROM_CHECKPOINT = (*ARCHITECTURE, "dataset", "image_size", "train_classes", "amp", "channels_last")
# Flags that change nothing about an experiment, by destination: they may change when a run is resumed, and runs that
# differ only in them are repetitions of one experiment. --cuda-graphs is here because float32 gives the same bits.
BOOKKEEPING = frozenset(
    "resume allow_changed_images skip_bad_images run_num overwrite log_dir data_root nb_workers gpu_id cuda_graphs "
    "search_memory wandb remark".split()
)
EVALUATION_BATCH = 150  # images, in training's scoring too: both compute the same scores, on the CPU to the bit
NO_FOLDER = "--dataset folder needs --data-root, your folder of class folders or a CSV file"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds the default to every flag that has one; keeps the description's line breaks."""

    def _get_help_string(self, action):
        without = action.default is None or action.default is False or action.default == ""
        return action.help if without else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """ArgumentParser with one-line errors, recipe files with comments, and no abbreviations."""

    def __init__(self, description: str, **options):
        options |= dict(formatter_class=HelpFormatter, fromfile_prefix_chars="@", allow_abbrev=False)
        super().__init__(description=description, **options)

    def add_table(self, title: str, *rows: tuple, description: str | None = None) -> None:
        """Adds a group of flags, without a title beside --help, from rows such as those of DATA_FLAGS."""
        group = self.add_argument_group(title, description) if title else self
        for flag, kind, default, placeholder, text, *further in rows:
            options = {"default": default, "help": text}
            if kind == "switch":
                options["action"] = "store_true"
            else:
                options |= {"choices" if isinstance(kind, tuple) else "type": kind, "metavar": placeholder}
            group.add_argument(flag, **options, **(further[0] if further else {}))

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"a file of flags has the line {line!r}: {str(error).lower()}")

    def parse_known_args(self, args=None, namespace=None):
        """@recipes/x.args also means the one beside the scripts, wherever they are started from."""
        words = list(sys.argv[1:] if args is None else args)
        for place, word in enumerate(words):
            if word.startswith("@") and not Path(word[1:]).exists() and (CODE / word[1:]).is_file():
                words[place] = f"@{CODE / word[1:]}"
        return super().parse_known_args(words, namespace)

    def error(self, message: str):
        line = f"{self.prog.split()[0]}: error: {message} ({self.prog} --help lists the flags)\n"
        self.exit(2, line if distributed.reports_errors() else None)

    def command_line(self, values: dict[str, object]) -> list[str]:
        """The command line that gives these values (by destination), without destinations that this parser lacks.

        Values stored in a checkpoint come back through the parser, so that they are checked like typed ones.
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
        """(all flags, destinations of the flags that were given rather than left to their defaults)."""
        args = self.parse_args(argv)
        untouched = argparse.Namespace(**dict.fromkeys(vars(args), argparse.SUPPRESS))  # argparse keeps what is there
        typed = vars(self.parse_args(argv, untouched))
        return args, {name for name, value in typed.items() if value is not argparse.SUPPRESS}

    def refuse_changes(self, args: argparse.Namespace, names: set[str], stored: dict, path: Path) -> None:
        """Raises Refused where flags of these names (by destination) differ from those in the checkpoint at path."""
        changed = [
            f"{action.option_strings[0]} {stored[action.dest]}, not {getattr(args, action.dest)}"
            for action in self._actions
            if action.dest in names & stored.keys() and getattr(args, action.dest) != stored[action.dest]
        ]
        if changed:
            raise Refused(f"{path} was trained with {'; '.join(changed)}: give the same, or none")

    def adopt(self, args: argparse.Namespace, given: set[str], stored: dict, path: Path) -> argparse.Namespace:
        """Takes flags that were not given from a checkpoint. Given flags override it, except the network's.

        args, given: what parse() returned; stored: the flags in the checkpoint at path. Raises Refused.
        """
        self.refuse_changes(args, given.intersection(ARCHITECTURE), stored, path)
        taken = {name: stored[name] for name in TAKEN_FROM_CHECKPOINT if name in stored}
        if "dataset" in given and args.dataset != stored.get("dataset"):
            taken.pop("train_classes", None)  # it said how to divide another data set
        elif stored.get("dataset") == "folder" and "data_root" in stored:
            taken["data_root"] = stored["data_root"]  # the benchmarks have a usual place, the user's pictures have none
        return self.parse(self.command_line(taken) + sys.argv[1:])[0]


def plain(args: argparse.Namespace) -> dict[str, object]:
    """Flags by destination as plain data, for files. Paths are absolute; links in them stay links."""
    return {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in vars(args).items()}


def explain(error: Exception) -> str | None:
    """One line for what the user can mend, None for a mistake of the program."""
    line = one_line(error)
    full_disk = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)  # which writing does not name
    if isinstance(error, Refused) or full_disk or (isinstance(error, OSError) and error.filename):
        return line
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full: a smaller --batch-size or --image-size, or --amp bf16, needs less"
    if isinstance(error, MemoryError) or re.search("can't allocate memory|Storage size .* overflow", line):
        return "this machine's memory is not enough: smaller sizes (--batch-size, --embedding-size, …) need less"
    if isinstance(error, distributed.Lost):
        return f"the other processes were lost ({line[:300]}); if one of them ended, its own message says why"
    if isinstance(error, RuntimeError) and re.match("DataLoader worker|unable to .* shared memory", line):
        cause = "too little memory, or shared memory (docker run --shm-size=8g)? --workers 0 needs less"
        return f"{line.rstrip('.')}: {cause}"
    return None


def run_script(main) -> None:
    """Run a script's main. What its user can mend becomes one line and a non-zero exit; all else keeps its traceback.

    `python -X dev script.py` always shows the traceback. Of several processes only one prints the line. Whoever reads
    the output may stop reading, as `head` does: that ends the script without a word.
    """
    stderr = sys.stderr
    for stream in (sys.stdout, stderr):
        stream.reconfigure(errors="backslashreplace")  # file names may hold bytes that are not text
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout, 0)
        if not output.poll(0):  # it is another pipe that broke
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be written goes there
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        line = explain(error)
        if line is None or sys.flags.dev_mode:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: {line}" if distributed.reports_errors() else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        sys.stderr = stderr  # distributed.start silences it; a traceback is never silenced


def dataset_name(name: str) -> str:
    """The documented name of a data set, in any letter case and with hyphens; any other as it is, to be refused."""
    return {known.lower(): known for known in layouts.DATASETS}.get(name.lower().replace("-", ""), name)


def binary(text: str) -> int:
    """A 0/1 flag; true and false are understood too."""
    try:
        return {"0": 0, "false": 0, "1": 1, "true": 1}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"must be 0 or 1, got {text!r}") from None


def number(kind: type, at_least: float = 0, below: float = math.inf, positive: bool = False):
    """A flag type: numbers of that kind in [at_least, below), without zero if positive."""
    what = "a whole number" if kind is int else "a number"
    what += " above 0" if positive else f" of at least {at_least:g}"

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if at_least <= value < below and (value or not positive):
            return value
        limit = f" and below {below:,}" if below == 1 or value >= below else ""
        raise argparse.ArgumentTypeError(f"must be {what}{limit}, got {text!r}")

    return convert


whole, real = functools.partial(number, int, below=2**31), functools.partial(number, float)


# A row: flag, type or choices or "switch", default, what stands for the value in --help, help; more for argparse, such
# as a destination of the original that is not named like its flag.
# fmt: off

# hist is in hist.py, the others in losses.py, which is imported only when one of them is asked for.
LOSSES = ("hist", "proxy_anchor", "proxy_nca", "softtriple", "arcface", "normalized_softmax", "multi_similarity",
          "triplet", "contrastive")
MODEL_PATH = ("--model-path", str, "", "PATH")
SKIP_BAD_IMAGES = (
    "--skip-bad-images", "switch", False, None,
    "go on without images that cannot be decoded: all are decoded once at the start, those that fail are counted and "
    "left out of training and scoring",
)
DATA_FLAGS = (
    ("--dataset", layouts.DATASETS, "cars", None, "benchmark, or 'folder' for your own pictures",
     {"type": dataset_name}),
    ("--data-root", Path, DATA, "DIR",
     "folder that holds the benchmarks; with --dataset folder your folder of class folders, or a CSV file (or a "
     ".tsv or .txt list)"),
    ("--train-classes", real(0, 1, positive=True), 0.5, "SHARE",
     "share of the classes, in sorted order, to train on when --dataset folder has no train/ and test/ of its own; "
     "the other classes are the test split"),
)


def image_flags(batch_size: int, smallest: int = 1) -> tuple:
    return (
        ("--image-size", whole(8), None, "PIXELS",
         "side of the images fed to the network; default: that of the loaded checkpoint, else the "
         "backbone's own (usually 224). Evaluation first resizes the shorter side to 256/224 of it"),
        ("--batch-size", whole(smallest), batch_size, "N",
         "images in a batch; with several processes, those of all in training, those of each in evaluation",
         {"dest": "sz_batch"}),
        ("--workers", whole(0), 4, "N",
         "processes that decode images, for each main process; at most one a core; results do not change",
         {"dest": "nb_workers"}),
    )


FROM_CHECKPOINT = "only needed for published checkpoints and bare weights: others carry them and the image size"
NETWORK_FLAGS = (
    ("--model", str, "resnet50", "NAME",
     "backbone: resnet18, resnet34, resnet50, resnet101, googlenet, bn_inception, or timm:NAME for any model of timm"),
    ("--embedding-size", whole(1), 512, "D", "dimensions of an embedding", {"dest": "sz_embedding"}),
    ("--add-gmp", binary, 1, "0|1", "1: add global max pooling to global average pooling"),
    ("--layer-norm", binary, 1, "0|1", "1: LayerNorm (without affine parameters) after the embedding layer"),
)
DEVICE_FLAGS = (
    ("--gpu-id", whole(-1), 0, "N",
     "GPU to use; -1 is the CPU, which is also used where there is no GPU"),
    ("--amp", ("off", "bf16"), "off", None,
     "bf16: the network computes in bfloat16 where that is safe, the loss in float32; changes results slightly. "
     "off: float32; convolutions on GPUs use TF32, as torch does by default"),
    ("--channels-last", binary, 0, "0|1",
     "1: channels-last memory layout, faster with --amp bf16; changes results by rounding"),
    ("--search-memory", real(positive=True), 1.0, "GIB",
     "memory that the nearest-neighbour search may take in addition to the embeddings, in GiB"),
)


def train_parser() -> Parser:
    parser = Parser(
        "Train a network with HIST loss and score it on classes it never saw.\n\n"
        "  a first try, offline   python code/train.py @recipes/glyphs.args\n"
        "  the paper's recipe     python code/train.py @recipes/cub.args\n"
        "  your own pictures      python code/train.py --dataset folder --data-root my_pictures\n"
        "  search in them         python code/retrieve.py --model-path logs/folder/run_1 --gallery my_pictures "
        "--query photo.jpg\n"
        "  resume a run           python code/train.py --dataset folder --resume"
    )
    parser.add_table(
        "data", *DATA_FLAGS, *image_flags(batch_size=32, smallest=2), SKIP_BAD_IMAGES,
        ("--IPC", whole(0), 0, "K",
         "images per class in a batch: batch-size/K classes with K images each; 0: plain shuffling"),
        ("--val-classes", real(0, 1), 0.0, "SHARE",
         "share of the training classes to hold out, drawn by --seed; they choose the best epoch. 0: the test split "
         "chooses it, as in the paper's protocol"),
    )
    parser.add_table(
        "network", *NETWORK_FLAGS,
        ("--weights", str, "imagenet", "imagenet|none|FILE",
         "initial weights of the backbone: imagenet (downloaded: torchvision's IMAGENET1K_V1; for timm:NAME timm's own "
         "default, which need not be ImageNet; none for bn_inception), none (random), or a file (.pth or .safetensors: "
         "a state dict of the backbone, or a checkpoint), looked for in the current folder, the data root and data/"),
        ("--bn-freeze", binary, 1, "0|1",
         "1: the backbone's BatchNorm statistics stay fixed. Its affine parameters start frozen too, but train once a "
         "warm-up has un-frozen the backbone; with --warm 0 they stay frozen. 0: all of BatchNorm trains"),
    )
    parser.add_table(
        "loss",
        ("--loss", LOSSES, "hist", None,
         "hist, or for comparison a loss of pytorch-metric-learning; multi_similarity, triplet and contrastive compare "
         "the images of a batch with each other and need --IPC 4 or so"),
        ("--loss-args", str, "", "NAME=NUMBER,…",
         "settings of a loss other than hist, such as margin=0.1,alpha=32; default: those of its paper or library"),
        ("--tau", real(positive=True), 32.0, "X", "temperature of the distribution loss; the paper uses 16 to 32"),
        ("--alpha", real(), 0.9, "X", "scale of distances in the hypergraph; the paper uses 0.9 to 2"),
        ("--ls", real(), 1.0, "X", "lambda_s, weight of the HGNN's cross-entropy; 0: only the distribution loss"),
        ("--hgnn-hidden", whole(1), 512, "N", "width of the HGNN's hidden layer"),
        description="tau, alpha, ls and hgnn-hidden only apply to HIST",
    )
    parser.add_table(
        "optimisation",
        ("--epochs", whole(0), 50, "N", "training epochs; warm-up epochs are not counted", {"dest": "nb_epochs"}),
        ("--warm", whole(0), 1, "N", "warm-up epochs, in which the backbone is frozen"),
        ("--optimizer", ("adam", "adamw", "sgd", "rmsprop"), "adam", None,
         "sgd: Nesterov momentum 0.9; rmsprop: alpha 0.9, momentum 0.9"),
        ("--lr", real(), 1e-4, "RATE", "learning rate of backbone and embedding layer"),
        ("--lr-ds", real(), 1e-1, "RATE",
         "learning rate of the class distributions, or of the proxies, centres or class weights of another --loss"),
        ("--lr-hgnn-factor", real(), 10.0, "X", "learning rate of the HGNN, as a multiple of --lr"),
        ("--weight-decay", real(), 1e-4, "X", "weight decay of all parameters"),
        ("--lr-decay-step", whole(1), 10, "N", "epochs between drops of all learning rates"),
        ("--lr-decay-gamma", real(), 0.5, "X", "factor of each drop of the learning rates"),
    )
    parser.add_table(
        "device and speed", *DEVICE_FLAGS,
        ("--compile", binary, 0, "0|1",
         "1: torch.compile the network for training; the first epoch starts slowly; changes results by rounding"),
        ("--cuda-graphs", binary, 0, "0|1",
         "1: record the network's training step on the GPU once, as CUDA graphs, and replay it, so that a fast GPU "
         "does not wait for Python at small batches; float32 results stay the same, bf16 changes by rounding. Not yet "
         "run on a GPU"),
    )
    parser.add_table(
        "run",
        ("--seed", whole(0, below=2**32), 1, "N", "seed of everything random: initial weights, batches, augmentation"),
        ("--deterministic", "switch", False, None, "deterministic algorithms on the GPU too; slower"),
        ("--log-dir", Path, CODE.parent / "logs", "DIR", "a run is kept in log-dir/DATASET/run_N"),
        ("--run-num", whole(0), 1, "N",
         "N of run_N (%(default)s in the original); without this flag the next free number"),
        ("--overwrite", "switch", False, None, "replace the run of --run-num if it exists"),
        ("--resume", str, None, "RUN",
         "resume an interrupted run: RUN is its folder or its last.pth; without RUN the run of --run-num, else the one "
         "of --dataset with the highest number. The run's own flags apply", {"nargs": "?", "const": ""}),
        ("--allow-changed-images", "switch", False, None,
         "resume although images were added, removed or replaced; the classes must be the same, in the same order"),
        ("--wandb", ("off", "offline", "online"), None, None,
         "also record the run in wandb; without this flag WANDB_MODE decides, else off"),
        ("--remark", str, "", "TEXT", "a note that is kept with the run"),
    )
    return parser


def evaluate_parser() -> Parser:
    parser = Parser("Score a checkpoint: R@K on images of classes that it was not trained on.")
    parser.add_table(
        "", (*MODEL_PATH, "checkpoint or .safetensors file, or a folder that holds DATASET_MODEL_best.pth")
    )
    parser.add_table("data", *DATA_FLAGS, *image_flags(EVALUATION_BATCH), SKIP_BAD_IMAGES)
    parser.add_table("network", *NETWORK_FLAGS, description=FROM_CHECKPOINT)
    parser.add_table("device and speed", *DEVICE_FLAGS)
    parser.add_table("", ("--remark", str, "", "TEXT", "a note to print with the scores"))
    parser.add_table(
        "scores",
        ("--metrics", ("rp", "map", "nmi", "all"), None, "NAME",
         "beside R@K, rp: R-precision; map: MAP@R; nmi: normalised mutual information of k-means; or all",
         {"nargs": "+"}),
        ("--json", Path, None, "FILE", "also write the scores to FILE"),
        ("--save-embeddings", Path, None, "FILE.npz", "keep embeddings, labels and paths"),
        ("--embeddings", Path, None, "FILE.npz", "score these embeddings, without a network or images"),
        ("--pictures", Path, None, "DIR", "draw the nearest neighbours of some queries and a map of the pictures"),
        ("--export", Path, None, "FILE.onnx", "write the network as ONNX, for other programs, instead of scoring it"),
    )
    return parser


def retrieve_parser() -> Parser:
    parser = Parser("Find the images in a folder that are most like given ones.")
    parser.add_table("", (*MODEL_PATH, "checkpoint or .safetensors file, or a run's folder that holds its *_best.pth"))
    parser.add_table(
        "search",
        ("--gallery", Path, None, "DIR", "folder of images to search in", {"required": True}),
        ("--query", Path, None, "IMAGE_OR_DIR", "image to search for, or a folder of images", {"required": True}),
        ("--top-k", whole(1), 10, "K", "neighbours of each query; pictures and page show at most 20"),
        ("--output", Path, Path("retrieved"), "DIR", "folder for neighbours.csv, .png and .html"),
    )
    parser.add_table("images", *image_flags(EVALUATION_BATCH))
    parser.add_table("network", *NETWORK_FLAGS, description=FROM_CHECKPOINT)
    parser.add_table("device and speed", *DEVICE_FLAGS)
    return parser
