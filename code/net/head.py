"""What every network of this project shares: pooling, the embedding layer, and which parameters may train.

A backbone file (resnet.py, googlenet.py, bn_inception.py, timm_model.py) adds one method, features().
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class EmbeddingNet(nn.Module):
    """A backbone with its classifier replaced by an embedding layer.

    forward: images (N, 3, H, W), normalised as `mean`, `std`, `bgr` and `scale` say → embeddings (N, D), not
    L2-normalised. Source: Lim et al., CVPR 2022, and the names and shapes in the published checkpoints.

    model         the bare backbone; all parameters live in it, so every key of the state dict starts with
                  'model.', as in the published checkpoints, and the embedding layer is model.embedding
    num_features  channels of the backbone's last layer
    name, embedding_size    as --model and --embedding-size give them
    add_gmp       add the global maximum to the global average of each channel
    layer_norm    normalise each embedding to mean 0, variance 1 (LayerNorm without affine parameters)
    bn_freeze     start with the affine parameters of the backbone's BatchNorm2d frozen
    unused        names inside `model`, with a dot at the end, of modules and parameters that forward does not use:
                  classifier, auxiliary heads. Kept only because the published state dicts hold them
    """

    # The input this network wants: values in [0, 1] times scale, in BGR order if bgr, minus mean, over std;
    # H = W = image_size pixels.
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    bgr = False
    scale = 1.0
    image_size = 224

    def __init__(self, model, name, num_features, embedding_size, add_gmp, layer_norm, bn_freeze, unused):
        super().__init__()
        self.name = name
        self.embedding_size = embedding_size
        self.add_gmp = add_gmp
        self.unused = unused
        # Parts that a weights file may lack, or hold in another shape.
        self.optional = (*unused, "embedding.")

        self.model = model
        self.model.embedding = nn.Linear(num_features, embedding_size)
        nn.init.kaiming_normal_(self.model.embedding.weight, mode="fan_out")
        nn.init.zeros_(self.model.embedding.bias)
        self.layer_norm = nn.LayerNorm(embedding_size, elementwise_affine=False) if layer_norm else nn.Identity()

        for parameter_name, parameter in self.model.named_parameters():
            if f"{parameter_name}.".startswith(self.unused):
                parameter.requires_grad_(False)
        if bn_freeze:
            for module in self._batchnorms():
                module.requires_grad_(False)

    def normalise(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) uint8, RGB, as dataset.py gives them → (N, 3, H, W) float32, as forward takes them.

        The arithmetic is that of torchvision's ToTensor and Normalize, on the CPU to the bit; the memory format stays.
        mean and std go in as numbers: copying tensors of them to a GPU would make the host wait in every step.
        """
        if self.bgr:
            images = images.flip(1)
        images = images.float().div_(255)
        for channel, mean, std in zip(images.unbind(1), self.mean, self.std, strict=True):
            channel.sub_(mean / self.scale).div_(std / self.scale)  # (scale·x - mean) / std in fewer passes
        return images

    def features(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) → what pool() takes: feature maps (N, C, h, w)."""
        raise NotImplementedError

    def pool(self, maps: Tensor) -> Tensor:
        """Feature maps (N, C, h, w) → (N, C): global average, plus global maximum with add_gmp."""
        pooled = F.adaptive_avg_pool2d(maps, 1)
        if self.add_gmp:
            # A window as large as the map: torch refuses to differentiate adaptive_max_pool2d on a GPU under
            # --deterministic. Values and gradients are the same, ties go to the first place in both.
            pooled = pooled + F.max_pool2d(maps, maps.shape[-2:])
        return pooled.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) → embeddings (N, D), in the parameters' precision, under autocast too.

        The embedding layer costs next to nothing, and the 8 bits of a bfloat16 would make distances coarse.
        """
        pooled = self.pool(self.features(images))  # (N, C)
        with torch.autocast(pooled.device.type, enabled=False):
            return self.layer_norm(self.model.embedding(pooled.to(self.model.embedding.weight.dtype)))

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Every parameter but the embedding layer's, in order of definition (unused classifier included)."""
        return [p for name, p in self.model.named_parameters() if not name.startswith("embedding.")]

    def set_backbone_trainable(self, trainable: bool) -> None:
        """Freezes the backbone for the warm-up epochs (False) or lets it train (True).

        True reaches the affine parameters of BatchNorm too, also those that bn_freeze froze at construction:
        with a warm-up they train from then on and only the statistics stay fixed (106 tensors of ResNet-50);
        without a warm-up this is never called and they stay frozen. The research code behaves so and the
        published figures depend on it.
        What forward does not use stays frozen: data parallel training would wait for its gradients for ever.
        """
        for name, parameter in self.model.named_parameters():
            if not f"{name}.".startswith(("embedding.", *self.unused)):
                parameter.requires_grad_(trainable)

    def freeze_batchnorm_statistics(self) -> None:
        """Puts every BatchNorm2d of the backbone in eval mode. train() undoes it: call this after train()."""
        for module in self._batchnorms():
            module.eval()

    def synchronise_batchnorm(self) -> None:
        """Makes BatchNorm compute its statistics over the batches of all processes; torch has that on GPUs only."""
        from timm.layers import convert_sync_batchnorm  # torch's would drop the activations in timm's own BatchNorm

        self.model = convert_sync_batchnorm(self.model)

    def _batchnorms(self) -> list[nn.Module]:
        return [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]
