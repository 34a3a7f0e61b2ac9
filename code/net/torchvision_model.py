"""ResNet-18, -34, -50 and -101 (He et al., CVPR 2016) and GoogLeNet (Szegedy et al., CVPR 2015), of torchvision."""

from torch import Tensor
from torchvision import models

from .head import EmbeddingNet


class TorchvisionModel(EmbeddingNet):
    """torchvision's network of that name up to its last block.

    GoogLeNet's auxiliary heads are built, because the published state dicts hold them, and never run. torchvision's
    own forward can turn ImageNet-normalised images into the (x - 0.5) / 0.5 that its ImageNet weights were made for
    (transform_input). The method takes ImageNet-normalised images as they are.
    """

    def __init__(self, name: str, **options):
        # init_weights=True is torchvision's default today; left out, it warns that the default will change.
        of_googlenet = dict(aux_logits=True, transform_input=False, init_weights=True) if name == "googlenet" else {}
        model = getattr(models, name)(weights=None, **of_googlenet)
        super().__init__(model, name, model.fc.in_features, unused=("fc.", "aux1.", "aux2."), **options)

    def features(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) → maps (N, C, H/32, W/32), C = 512 (resnet18, -34), 1024 (googlenet) or 2048."""
        maps = images
        for name, layer in self.model.named_children():  # in the order in which torchvision's forward runs them
            if name == "avgpool":
                break
            if name not in ("aux1", "aux2"):
                maps = layer(maps)
        return maps
