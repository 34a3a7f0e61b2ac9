"""Command-line flags: the ones the scripts share, and each script's own.

Names, destinations and defaults of the original flags are part of the interface: command lines of the paper's code
work unchanged. Flags can also come from a file, `@recipes/cub.args`, one or more to a line; '#' begins a comment.
Later flags override earlier ones.
"""

import argparse
import difflib
import math
import re
import shlex
import sys
from pathlib import Path

import distributed
import layouts
import torch
from refused import Refused

CODE = Path(__file__).resolve().parent
DATA = CODE.parent / "data"  # where the benchmarks are looked for
# The flags that make the network, by destination: a trained one cannot change them.
ARCHITECTURE = {
    "model": "--model",
    "sz_embedding": "--embedding-size",
    "add_gmp": "--add-gmp",
    "layer_norm": "--layer-norm",
}
FROM_CHECKPOINT = "only needed for published checkpoints: this project's carry these flags and the image size"
TAKEN_FROM_CHECKPOINT = (*ARCHITECTURE, "dataset", "image_size", "train_classes", "amp", "channels_last")
# Flags that change nothing about an experiment, by destination: they may change when a run is resumed, and runs that
# differ only in them are repetitions of one experiment.
BOOKKEEPING = {
    "resume",
    "allow_changed_images",
    "skip_bad_images",
    "run_num",
    "overwrite",
    "log_dir",
    "data_root",
    "nb_workers",
    "gpu_id",
    "cuda_graphs",  # the same bits in float32; that bf16 is rounded otherwise is no reason to refuse a resume
    "search_memory",
    "wandb",
    "remark",
}
# Images in a batch of scoring, in training too: both compute the same scores, on the CPU to the bit.
EVALUATION_BATCH = 150
NO_FOLDER = "--dataset folder needs --data-root, your folder of class folders or a CSV file"
# hist is in hist.py, the others in losses.py, which is imported only when one of them is asked for.
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
    """Adds the default to every flag that has one; keeps the description's line breaks."""

    def _get_help_string(self, action):
        without = action.default is None or action.default is False or action.default == ""
        return action.help if without else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """ArgumentParser with one-line errors, recipe files with comments, and no abbreviations."""

    def __init__(self, description: str, **options):
        super().__init__(
            **options,
            description=description,
            formatter_class=HelpFormatter,
            fromfile_prefix_chars="@",
            allow_abbrev=False,
        )

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            self.error(f"a file of flags has the line {line!r}: {str(error).lower()}")

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
        if not distributed.reports_errors():
            self.exit(2)
        self.exit(2, f"{self.prog.split()[0]}: error: {message} ({self.prog} --help lists the flags)\n")

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
        defaults = {action: action.default for action in self._actions}
        for action in self._actions:
            action.default = argparse.SUPPRESS
        given = set(vars(self.parse_args(argv)))
        for action, default in defaults.items():
            action.default = default
        return args, given

    def adopt(self, args: argparse.Namespace, given: set[str], stored: dict, path: Path) -> argparse.Namespace:
        """Takes flags that were not given from a checkpoint. Given flags override it, except the network's.

        args, given: what parse() returned; stored: the flags in the checkpoint at path. Raises ValueError.
        """
        for name, option in ARCHITECTURE.items():
            if name in given and name in stored and getattr(args, name) != stored[name]:
                raise Refused(
                    f"{path} was trained with {option} {stored[name]}, the command line says {getattr(args, name)}"
                )
        taken = {name: stored[name] for name in TAKEN_FROM_CHECKPOINT if name in stored}
        if "dataset" in given and args.dataset != stored.get("dataset"):
            taken.pop("train_classes", None)  # it said how to divide another data set
        elif stored.get("dataset") == "folder" and "data_root" in stored:
            taken["data_root"] = stored["data_root"]  # the benchmarks have a usual place, the user's pictures have none
        adopted = self.command_line(taken)
        return self.parse(adopted + sys.argv[1:])[0]


def plain(args: argparse.Namespace) -> dict[str, object]:
    """Flags by destination as plain data, for files. Paths are absolute; links in them stay links."""
    return {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in vars(args).items()}


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full: a smaller --batch-size or --image-size, or --amp bf16, needs less"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = str(error).strip()
    _, wrapped, traceback = text.rpartition("Traceback (most recent call last):\n")
    if text.startswith("Caught ") and wrapped:  # torch copies the whole traceback of a loader's worker process
        message = "\n".join(line for line in traceback.splitlines() if not line.startswith(" "))
        text = re.sub(r"^[\w.]+: ", "", message)
    return " ".join(text.split()) or type(error).__name__


def run_script(main) -> None:
    """Run a script's main. A mistake that its user can correct becomes one line and a non-zero exit.

    `python -X dev script.py` shows the traceback instead. Of several processes only one prints the line.
    """
    stderr = sys.stderr
    for stream in (sys.stdout, stderr):
        stream.reconfigure(errors="backslashreplace")  # file names may hold bytes that are not text
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if sys.flags.dev_mode:
            raise
        _fail(one_line(error))
    except RuntimeError as error:
        if sys.flags.dev_mode:
            raise
        if distributed.lost_another_process(error):
            reason = one_line(error)[:300]
            _fail(f"the other processes were lost ({reason}); if one of them ended, its own message says why")
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = one_line(error).rstrip(".")
        _fail(f"{reason}: too little memory, or shared memory (docker run --shm-size=8g)? --workers 0 needs less")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        sys.stderr = stderr  # distributed.start silences it; a traceback is never silenced


def _fail(message: str):
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}" if distributed.reports_errors() else 1)


def text(value: str) -> str:
    """Any text. Bytes of the command line that are no text could not be written to a run's files."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"is not valid text: {value!r}") from None
    return value


def dataset_name(name: str) -> str:
    """The documented name of a data set, whatever the case it is given in; any other name as it is."""
    try:
        return layouts.dataset_name(name)
    except ValueError:
        return name  # argparse then lists the choices


def binary(text: str) -> int:
    """A 0/1 flag; true and false are understood too."""
    values = {"0": 0, "false": 0, "1": 1, "true": 1}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"must be 0 or 1, got {text!r}")
    return values[text.lower()]


def whole(at_least: int):
    """A flag type: whole numbers of at least a bound."""

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
    """A flag type: numbers in [at_least, below), without zero if positive."""

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
        type=text,
        default="resnet50",
        metavar="NAME",
        help="backbone: resnet18, resnet34, resnet50, resnet101, googlenet, bn_inception, or timm:NAME for any model "
        "of timm",
    )
    group.add_argument(
        "--embedding-size",
        dest="sz_embedding",
        type=whole(1),
        default=512,
        metavar="D",
        help="dimensions of an embedding",
    )
    group.add_argument(
        "--add-gmp", type=binary, default=1, metavar="0|1", help="1: add global max pooling to global average pooling"
    )
    group.add_argument(
        "--layer-norm",
        type=binary,
        default=1,
        metavar="0|1",
        help="1: LayerNorm (without affine parameters) after the embedding layer",
    )
    return group


def add_image_flags(group, batch_size: int) -> None:
    group.add_argument(
        "--image-size",
        type=whole(8),
        metavar="PIXELS",
        help="side of the images fed to the network; default: the training size, else the backbone's own (usually "
        "224). Evaluation first resizes the shorter side to 256/224 of it",
    )
    group.add_argument(
        "--batch-size",
        dest="sz_batch",
        type=whole(1),
        default=batch_size,
        metavar="N",
        help="images in a batch; with several processes, those of all in training, those of each in evaluation",
    )
    group.add_argument(
        "--workers",
        dest="nb_workers",
        type=whole(0),
        default=4,
        metavar="N",
        help="processes that decode images, for each process that computes; at most one a core; results do not change",
    )


def add_data_flags(parser: Parser, batch_size: int):
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        type=dataset_name,
        choices=layouts.DATASETS,
        default="cars",
        help="benchmark, or 'folder' for your own pictures",
    )
    group.add_argument(
        "--data-root",
        type=Path,
        default=DATA,
        metavar="DIR",
        help="folder that holds the benchmarks; with --dataset folder your folder of class folders, or a CSV file",
    )
    group.add_argument(
        "--train-classes",
        type=real(0, 1, positive=True),
        default=0.5,
        metavar="SHARE",
        help="share of the classes, in sorted order, to train on when --dataset folder has no train/ and test/ of its "
        "own; the other classes are the test split",
    )
    add_image_flags(group, batch_size)
    group.add_argument(
        "--skip-bad-images",
        action="store_true",
        help="go on without images that cannot be decoded: all are decoded once at the start, those that fail are "
        "counted and left out of training and scoring",
    )
    return group


def add_device_flags(parser: Parser):
    group = parser.add_argument_group("device and speed")
    group.add_argument(
        "--gpu-id",
        type=whole(-1),
        default=0,
        metavar="N",
        help="GPU to use; -1 is the CPU, which is also used where there is no GPU. torchrun gives each process "
        "its own: choose those with CUDA_VISIBLE_DEVICES",
    )
    group.add_argument(
        "--amp",
        choices=("off", "bf16"),
        default="off",
        help="bf16: the network computes in bfloat16 where that is safe, the loss in float32; changes results "
        "slightly. off: float32; convolutions on GPUs use TF32, as torch does by default",
    )
    group.add_argument(
        "--channels-last",
        type=binary,
        default=0,
        metavar="0|1",
        help="1: channels-last memory layout, faster with --amp bf16; changes results by rounding",
    )
    group.add_argument(
        "--search-memory",
        type=real(positive=True),
        default=1.0,
        metavar="GIB",
        help="memory that the nearest-neighbour search may take in addition to the embeddings, in GiB",
    )
    return group


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
    data = add_data_flags(parser, batch_size=32)
    data.add_argument(
        "--IPC",
        type=whole(0),
        default=0,
        metavar="K",
        help="images per class in a batch: batch-size/K classes with K images each; 0: plain shuffling",
    )
    data.add_argument(
        "--val-classes",
        type=real(0, 1),
        default=0.0,
        metavar="SHARE",
        help="share of the training classes to hold out, drawn by --seed; they choose the best epoch. 0: the test "
        "split chooses it, as in the paper's protocol",
    )
    network = add_network_flags(parser)
    network.add_argument(
        "--weights",
        type=text,
        default="imagenet",
        metavar="imagenet|none|FILE",
        help="initial weights of the backbone: imagenet (IMAGENET1K_V1, downloaded), none (random), or a file (a "
        "state dict of the backbone, or a checkpoint), looked for in the current folder, the data root and data/",
    )
    network.add_argument(
        "--bn-freeze",
        type=binary,
        default=1,
        metavar="0|1",
        help="1: the backbone's BatchNorm statistics stay fixed. Its affine parameters start frozen too, but train "
        "once a warm-up has un-frozen the backbone; with --warm 0 they stay frozen. 0: all of BatchNorm trains",
    )

    loss = parser.add_argument_group("loss", "tau, alpha, ls and hgnn-hidden only apply to HIST")
    loss.add_argument(
        "--loss",
        choices=LOSSES,
        default="hist",
        help="hist, or for comparison a loss of pytorch-metric-learning; multi_similarity, triplet and contrastive "
        "compare the images of a batch with each other and need --IPC 4 or so",
    )
    loss.add_argument(
        "--loss-args",
        type=text,
        default="",
        metavar="NAME=NUMBER,…",
        help="settings of a loss other than hist, such as margin=0.1,alpha=32; default: those of its paper or library",
    )
    loss.add_argument(
        "--tau",
        type=real(positive=True),
        default=32.0,
        metavar="X",
        help="temperature of the distribution loss; the paper uses 16 to 32",
    )
    loss.add_argument(
        "--alpha",
        type=real(),
        default=0.9,
        metavar="X",
        help="scale of distances in the hypergraph; the paper uses 0.9 to 2",
    )
    loss.add_argument(
        "--ls",
        type=real(),
        default=1.0,
        metavar="X",
        help="lambda_s, weight of the HGNN's cross-entropy; 0: only the distribution loss",
    )
    loss.add_argument("--hgnn-hidden", type=whole(1), default=512, metavar="N", help="width of the HGNN's hidden layer")

    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument(
        "--epochs",
        dest="nb_epochs",
        type=whole(0),
        default=50,
        metavar="N",
        help="training epochs; warm-up epochs are not counted",
    )
    optimisation.add_argument(
        "--warm", type=whole(0), default=1, metavar="N", help="warm-up epochs, in which the backbone is frozen"
    )
    optimisation.add_argument(
        "--optimizer",
        choices=("adam", "adamw", "sgd", "rmsprop"),
        default="adam",
        help="sgd: Nesterov momentum 0.9; rmsprop: alpha 0.9, momentum 0.9",
    )
    optimisation.add_argument(
        "--lr", type=real(), default=1e-4, metavar="RATE", help="learning rate of backbone and embedding layer"
    )
    optimisation.add_argument(
        "--lr-ds",
        type=real(),
        default=1e-1,
        metavar="RATE",
        help="learning rate of the class distributions, or of the proxies, centres or class weights of another --loss",
    )
    optimisation.add_argument(
        "--lr-hgnn-factor",
        type=real(),
        default=10.0,
        metavar="X",
        help="learning rate of the HGNN, as a multiple of --lr",
    )
    optimisation.add_argument(
        "--weight-decay", type=real(), default=1e-4, metavar="X", help="weight decay of all parameters"
    )
    optimisation.add_argument(
        "--lr-decay-step", type=whole(1), default=10, metavar="N", help="epochs between drops of all learning rates"
    )
    optimisation.add_argument(
        "--lr-decay-gamma", type=real(), default=0.5, metavar="X", help="factor of each drop of the learning rates"
    )

    device = add_device_flags(parser)
    device.add_argument(
        "--compile",
        type=binary,
        default=0,
        metavar="0|1",
        help="1: torch.compile the network for training; the first epoch starts slowly; changes results by rounding",
    )
    device.add_argument(
        "--cuda-graphs",
        type=binary,
        default=0,
        metavar="0|1",
        help="1: record the network's training step on the GPU once, as CUDA graphs, and replay it, so that a fast GPU "
        "does not wait for Python at small batches; float32 results stay the same, bf16 changes by rounding. Not yet "
        "run on a GPU",
    )

    run = parser.add_argument_group("run")
    run.add_argument(
        "--seed",
        type=whole(0),
        default=1,
        metavar="N",
        help="seed of everything random: initial weights, batches, augmentation",
    )
    run.add_argument("--deterministic", action="store_true", help="deterministic algorithms on the GPU too; slower")
    run.add_argument(
        "--log-dir",
        type=Path,
        default=CODE.parent / "logs",
        metavar="DIR",
        help="a run is kept in log-dir/DATASET/run_N",
    )
    run.add_argument(
        "--run-num",
        type=whole(0),
        default=1,
        metavar="N",
        help="N of run_N (%(default)s in the original); without this flag the next free number",
    )
    run.add_argument("--overwrite", action="store_true", help="replace the run of --run-num if it exists")
    run.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="resume an interrupted run: RUN is its folder or its last.pth; without RUN the run of --run-num, else the "
        "one of --dataset with the highest number. The run's own flags apply",
    )
    run.add_argument(
        "--allow-changed-images",
        action="store_true",
        help="resume although images were added or removed; the classes must be the same, in the same order",
    )
    run.add_argument(
        "--wandb",
        choices=("off", "offline", "online"),
        help="also record the run in wandb; without this flag WANDB_MODE decides, else off",
    )
    run.add_argument("--remark", type=text, default="", metavar="TEXT", help="a note that is kept with the run")
    return parser


def evaluate_parser() -> Parser:
    parser = Parser("Score a checkpoint: R@K of images of classes that it was not trained on.")
    parser.add_argument(
        "--model-path", default="", metavar="PATH", help="checkpoint, or a folder that holds DATASET_MODEL_best.pth"
    )
    add_data_flags(parser, batch_size=EVALUATION_BATCH)
    add_network_flags(parser, FROM_CHECKPOINT)
    add_device_flags(parser)
    parser.add_argument("--remark", type=text, default="", metavar="TEXT", help="a note to print with the scores")
    scores = parser.add_argument_group("scores")
    scores.add_argument(
        "--metrics",
        nargs="+",
        choices=("recall", "rp", "map", "nmi", "all"),
        default=["recall"],
        metavar="NAME",
        help="recall; rp: R-precision; map: MAP@R; nmi: normalised mutual information of k-means; all",
    )
    scores.add_argument("--json", type=Path, metavar="FILE", help="also write the scores to FILE")
    scores.add_argument("--save-embeddings", type=Path, metavar="FILE.npz", help="keep embeddings, labels and paths")
    scores.add_argument(
        "--embeddings", type=Path, metavar="FILE.npz", help="score these embeddings, without a network or images"
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
    parser.add_argument(
        "--model-path", default="", metavar="PATH", help="checkpoint, or a run's folder that holds its *_best.pth"
    )
    search = parser.add_argument_group("search")
    search.add_argument("--gallery", type=Path, required=True, metavar="DIR", help="folder of images to search in")
    search.add_argument(
        "--query", type=Path, required=True, metavar="IMAGE_OR_DIR", help="image to search for, or a folder of images"
    )
    search.add_argument(
        "--top-k",
        type=whole(1),
        default=10,
        metavar="K",
        help="neighbours of each query; pictures and page show at most 20",
    )
    search.add_argument(
        "--output",
        type=Path,
        default=Path("retrieved"),
        metavar="DIR",
        help="folder for neighbours.csv, .png and .html",
    )
    images = parser.add_argument_group("images")
    add_image_flags(images, batch_size=EVALUATION_BATCH)
    add_network_flags(parser, FROM_CHECKPOINT)
    add_device_flags(parser)
    return parser
