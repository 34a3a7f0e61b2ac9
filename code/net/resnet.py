"""ResNet-18, -34, -50 and -101 (He et al., CVPR 2016), as torchvision builds them."""

from torch import Tensor
from torchvision import models

from .head import EmbeddingNet


class ResNet(EmbeddingNet):
    """torchvision's ResNet up to its last block; `name` is torchvision's: resnet18, -34, -50 or -101."""

    def __init__(self, name: str, **options):
        model = getattr(models, name)(weights=None)
        super().__init__(model, name, model.fc.in_features, unused=("fc.",), **options)

    def features(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) → maps (N, C, H/32, W/32), C = 512 (resnet18, -34) or 2048 (resnet50, -101)."""
        model = self.model
        x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
        return model.layer4(model.layer3(model.layer2(model.layer1(x))))
