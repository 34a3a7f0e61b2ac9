"""The networks, by the name that --model gives them, and the loading of their weights.

network = net.build('resnet50', embedding_size=512)
embeddings = network(images)            # (N, 3, 224, 224) → (N, 512)
"""

from pathlib import Path

import checkpoint
import torch
from refused import Refused, one_line
from torchvision import models

from .bn_inception import BNInception
from .googlenet import GoogLeNet
from .head import EmbeddingNet
from .resnet import ResNet
from .timm_model import TimmModel

MODELS = dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101"), ResNet)
MODELS |= {"googlenet": GoogLeNet, "bn_inception": BNInception}


def build(
    name: str,
    embedding_size: int = 512,
    weights: str | Path = "imagenet",
    add_gmp: bool = True,
    layer_norm: bool = True,
    bn_freeze: bool = True,
) -> EmbeddingNet:
    """Build a network on the CPU.

    name            one of MODELS, or 'timm:NAME' for a model of timm
    embedding_size  D, dimensions of an embedding
    weights         'imagenet': downloaded by torchvision, for timm's models timm's own default; 'none': random; or a
                    file that checkpoint.py reads: the backbone's state dict as published, or a checkpoint. The
                    embedding layer is taken from it if its size fits and is otherwise new
    add_gmp, layer_norm, bn_freeze      see EmbeddingNet

    Raises Refused: unknown name; no such file, or one that holds no weights or does not fit; no download.
    """
    if name not in MODELS and not name.startswith("timm:"):
        raise Refused(f"unknown model '{name}': the choices are {', '.join(MODELS)} and timm:NAME")
    # The weights first: what is wrong with them should not take a network to find out.
    state = None
    if weights == "imagenet" and name in MODELS:
        state = checkpoint.network_state(download_imagenet(name), name)
    elif weights not in ("imagenet", "none"):
        path = Path(weights).expanduser()
        if not path.is_file():
            raise Refused(
                f"no weights file '{path}': --weights takes imagenet, none or a file "
                "(`python code/prepare.py download efficientnet_lite0` fetches one)"
            )
        state = checkpoint.network_state(checkpoint.load(path), path)

    options = dict(embedding_size=embedding_size, add_gmp=add_gmp, layer_norm=layer_norm, bn_freeze=bn_freeze)
    network = MODELS[name](name, **options) if name in MODELS else TimmModel(name, weights == "imagenet", **options)
    if state is not None:
        load_network_state(network, state, weights, beginning=True)
    return network


def download_imagenet(name: str) -> dict[str, torch.Tensor]:
    """torchvision's ImageNet state dict of `name`, from torch's cache or downloaded; Refused without either.

    IMAGENET1K_V1 are the weights there were when the paper was written (ResNet-50: 76.1 % top-1). V2, today's
    default, comes from a much longer training (80.9 %): another starting point, whose results do not compare.
    """
    if name == "bn_inception":
        raise Refused(
            "bn_inception's ImageNet weights cannot be downloaded: give --weights FILE, "
            "the bn_inception-52deb4733.pth of pretrained-models.pytorch, or --weights none"
        )
    url = models.get_model_weights(name).IMAGENET1K_V1.url
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # no connection, a wrong hash, a damaged file in the cache
        raise Refused(
            f"no ImageNet weights: {url} could not be loaded ({one_line(error)}); torch looks for the file "
            f"in {Path(torch.hub.get_dir(), 'checkpoints')}: put it there, or give --weights FILE or --weights none"
        ) from error


def load_network_state(network: EmbeddingNet, state: dict[str, torch.Tensor], path, beginning=False) -> None:
    """Loads a state dict ('model.…', as checkpoint.network_state gives it), strictly; Refused if it does not fit.

    Only GoogLeNet's auxiliary heads, which forward does not use, and num_batches_tracked, which old files lack, may
    be missing. As the beginning of a training, classifier, auxiliary heads and embedding layer are taken where they
    fit and may be missing, and BatchNorm's vectors may be (1, C), as some old files hold them.
    """
    own, optional = network.state_dict(), ("model.aux1.", "model.aux2.")
    if beginning:
        optional = tuple(f"model.{prefix}" for prefix in network.optional)
        given, state = state, {}
        for key, value in given.items():
            if key in own and value.shape == (1, *own[key].shape):
                value = value[0]
            if not f"{key}.".startswith(optional) or (key in own and own[key].shape == value.shape):
                state[key] = value
    kept = {key: value for key, value in own.items() if f"{key}.".startswith(optional)}
    try:
        network.load_state_dict(kept | state)  # torch itself lets num_batches_tracked be missing
    except RuntimeError as error:
        reason = " ".join(str(error).partition(":")[2].split())[:300]
        raise Refused(
            f"{path} does not fit {network.name} with embedding size {network.embedding_size} ({reason}): "
            "give the --model and --embedding-size that it was made with"
        ) from error


def require_image_size(network: EmbeddingNet, image_size: int) -> None:
    """Refused unless the network (on the CPU) takes images of that many pixels. Leaves it in eval mode.

    Some vision transformers only take their own size; small images leave nothing of a deep network's maps.
    """
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:  # each network fails in its own way
        raise Refused(
            f"--image-size {image_size}: {network.name} cannot take such images ({one_line(error)[:150]}); "
            f"its own size is {network.image_size}"
        ) from error
