"""GoogLeNet (Szegedy et al., CVPR 2015), as torchvision builds it."""

from torch import Tensor
from torchvision import models

from .head import EmbeddingNet


class GoogLeNet(EmbeddingNet):
    """torchvision's GoogLeNet up to its last inception block.

    The auxiliary heads are built, because the published state dicts hold them, and never run.
    torchvision's own forward can turn ImageNet-normalised images into the (x - 0.5) / 0.5 that its ImageNet
    weights were made for (transform_input). The method takes ImageNet-normalised images as they are.
    """

    def __init__(self, name: str = "googlenet", **options):
        # init_weights=True is torchvision's default today; left out, it warns that the default will change.
        model = models.googlenet(weights=None, aux_logits=True, transform_input=False, init_weights=True)
        super().__init__(model, name, model.fc.in_features, unused=("fc.", "aux1.", "aux2."), **options)

    def features(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) → maps (N, 1024, H/32, W/32)."""
        model = self.model
        x = model.maxpool1(model.conv1(images))
        x = model.maxpool2(model.conv3(model.conv2(x)))
        x = model.maxpool3(model.inception3b(model.inception3a(x)))
        x = model.inception4c(model.inception4b(model.inception4a(x)))
        x = model.maxpool4(model.inception4e(model.inception4d(x)))
        return model.inception5b(model.inception5a(x))
