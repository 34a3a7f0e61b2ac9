"""Any image model of timm (https://github.com/huggingface/pytorch-image-models) as --model timm:NAME."""

import torch
from refused import Refused, one_line

from .head import EmbeddingNet


class TimmModel(EmbeddingNet):
    """timm's model NAME with an embedding layer; mean, std and image size are the model's own.

    Where its last layer gives maps (N, C, h, w), as convolutional models do, they are pooled like a ResNet's.
    Where it gives tokens, as vision transformers do, timm's own pooling is used (class token or mean, and the
    norms that belong to it): add_gmp does not apply.
    """

    def __init__(self, name: str, pretrained: bool, **options):
        model = create_model(name.removeprefix("timm:"), pretrained)
        config = model.pretrained_cfg
        image_size = config["input_size"][-1]

        # One image through the model in eval mode shows what comes out and which parameters had no part in it
        # (a convolutional model's own norm before its classifier, position embeddings that timm keeps fixed).
        model.eval()
        maps = model.forward_features(torch.zeros(1, 3, image_size, image_size))
        if not isinstance(maps, torch.Tensor):
            raise Refused(f"--model {name}: its features are a {type(maps).__name__}, not one tensor; not supported")
        gives_maps = maps.ndim == 4 and getattr(model, "output_fmt", "NCHW") == "NCHW"
        pooled = maps.mean((2, 3)) if gives_maps else model.forward_head(maps, pre_logits=True)
        pooled.sum().backward()
        unused = tuple(f"{n}." for n, p in model.named_parameters() if p.grad is None)
        model.zero_grad()
        model.train()

        super().__init__(model, name, pooled.shape[1], unused=unused, **options)
        self.gives_maps = gives_maps
        self.mean, self.std, self.image_size = tuple(config["mean"]), tuple(config["std"]), image_size
        # A weights file comes with the classifier that num_classes=0 left out.
        classifier = config.get("classifier") or ()
        classifier = (classifier,) if isinstance(classifier, str) else classifier
        self.optional = (*self.optional, *(part + "." for part in classifier))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) → maps (N, C, h, w), or tokens in timm's own layout."""
        return self.model.forward_features(images)

    def pool(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps (N, C, h, w) or tokens → (N, C)."""
        return super().pool(maps) if self.gives_maps else self.model.forward_head(maps, pre_logits=True)


def create_model(name: str, pretrained: bool) -> torch.nn.Module:
    """timm's model `name` (without 'timm:'), without classifier; pretrained: with timm's weights. Raises Refused."""
    try:
        import timm  # takes a second

        return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:  # timm passes on whatever its downloader raises, of many libraries
        way_out = "timm.list_models() has the names; where weights cannot be fetched, give --weights FILE or none"
        raise Refused(f"--model timm:{name}: timm cannot make it ({one_line(error)}); {way_out}") from error
