"""BN-Inception (Ioffe & Szegedy, ICML 2015), with the layer names of its widely used Caffe conversion.

The ImageNet weights published for these names (bn_inception-52deb4733.pth of pretrained-models.pytorch) want
images as Caffe reads them: BGR, 0 to 255, minus a mean colour.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .head import EmbeddingNet

# Output channels of each block's convolutions; both convolutions of the double 3x3 branch have the same.
# 3c and 4e halve the resolution: no 1x1 branch, and their pooling passes through without projection.
BLOCKS = {
    # 1x1, 3x3_reduce, 3x3, double_3x3_reduce, double_3x3, pool_proj
    "3a": (64, 64, 64, 64, 96, 32),
    "3b": (64, 64, 96, 64, 96, 64),
    "3c": (0, 128, 160, 64, 96, 0),
    "4a": (224, 64, 96, 96, 128, 128),
    "4b": (192, 96, 128, 96, 128, 128),
    "4c": (160, 128, 160, 128, 160, 128),
    "4d": (96, 128, 192, 160, 192, 128),
    "4e": (0, 128, 192, 192, 256, 0),
    "5a": (352, 192, 320, 160, 224, 128),
    "5b": (352, 192, 320, 192, 224, 128),
}


class Backbone(nn.Module):
    """BN-Inception; forward: images (N, 3, H, W) → maps (N, 1024, H/32, W/32).

    `last_linear`, the ImageNet classifier, is there for the state dict only.
    """

    def __init__(self):
        super().__init__()
        self._add("conv1_7x7_s2", 3, 64, kernel=7, stride=2)
        self._add("conv2_3x3_reduce", 64, 64, kernel=1)
        self._add("conv2_3x3", 64, 192, kernel=3)
        channels = 192
        for block, (one, three_reduce, three, double_reduce, double, pool_proj) in BLOCKS.items():
            name = f"inception_{block}_"
            stride = 1 if one else 2
            if one:
                self._add(name + "1x1", channels, one, kernel=1)
            self._add(name + "3x3_reduce", channels, three_reduce, kernel=1)
            self._add(name + "3x3", three_reduce, three, kernel=3, stride=stride)
            self._add(name + "double_3x3_reduce", channels, double_reduce, kernel=1)
            self._add(name + "double_3x3_1", double_reduce, double, kernel=3)
            self._add(name + "double_3x3_2", double, double, kernel=3, stride=stride)
            if pool_proj:
                self._add(name + "pool_proj", channels, pool_proj, kernel=1)
            channels = one + three + double + (pool_proj or channels)
        self.last_linear = nn.Linear(channels, 1000)

    def _add(self, name, channels_in, channels_out, kernel, stride=1):
        self.add_module(name, nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2))
        # Momentum as published. In torch's sense of it the latest batch makes up 90 % of the statistics.
        self.add_module(name + "_bn", nn.BatchNorm2d(channels_out, eps=1e-5, momentum=0.9))

    def _run(self, x, *names):
        """Convolution, BatchNorm and ReLU of each name in turn."""
        for name in names:
            x = F.relu(getattr(self, name + "_bn")(getattr(self, name)(x)), inplace=True)
        return x

    def _block(self, block, x):
        """One inception block: (N, C, h, w) → its branches one after another along the channels."""
        name = f"inception_{block}_"
        downsamples = BLOCKS[block][0] == 0
        if downsamples:
            pooled = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
        elif block == "5b":
            pooled = F.max_pool2d(x, 3, stride=1, padding=1, ceil_mode=True)
        else:
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, ceil_mode=True, count_include_pad=True)
        branches = [] if downsamples else [self._run(x, name + "1x1")]
        branches.append(self._run(x, name + "3x3_reduce", name + "3x3"))
        branches.append(self._run(x, name + "double_3x3_reduce", name + "double_3x3_1", name + "double_3x3_2"))
        branches.append(pooled if downsamples else self._run(pooled, name + "pool_proj"))
        return torch.cat(branches, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(self._run(images, "conv1_7x7_s2"), 3, stride=2, ceil_mode=True)
        x = F.max_pool2d(self._run(x, "conv2_3x3_reduce", "conv2_3x3"), 3, stride=2, ceil_mode=True)
        for block in BLOCKS:
            x = self._block(block, x)
        return x


class BNInception(EmbeddingNet):
    """BN-Inception with an embedding layer. Note its input: BGR, 0 to 255, minus (104, 117, 128)."""

    mean = (104.0, 117.0, 128.0)
    std = (1.0, 1.0, 1.0)
    bgr = True
    scale = 255.0

    def __init__(self, name="bn_inception", **options):
        model = Backbone()
        super().__init__(model, name, model.last_linear.in_features, unused=("last_linear.",), **options)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)
