"""Tests of code/inference.py: embedding a loader, and the figures of what it embeds."""

import dataset
import inference
import net
import pytest
import torch
import trees
from torchvision import transforms


class Tiny(torch.nn.Module):
    """Flattens an image; dropout and BatchNorm would show if the network were not in eval mode."""

    def __init__(self):
        super().__init__()
        self.bn = torch.nn.BatchNorm2d(3)
        self.dropout = torch.nn.Dropout(0.5)

    def normalise(self, images):
        return images  # those of make_loader are floats

    def forward(self, images):
        return self.dropout(self.bn(images)).flatten(1)


class Pixels(net.EmbeddingNet):
    """Its embeddings are its inputs."""

    def __init__(self, mean, std, bgr, scale):
        torch.nn.Module.__init__(self)
        self.mean, self.std, self.bgr, self.scale = mean, std, bgr, scale

    def forward(self, images):
        return images.flatten(1)


def make_loader(labels, batch_size, seed=0):
    images = torch.randn(len(labels), 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    data = torch.utils.data.TensorDataset(images, torch.tensor(labels))
    return torch.utils.data.DataLoader(data, batch_size), images


def test_embed_in_order_with_a_ragged_last_batch():
    labels = [4, 1, 1, 0, 2, 9, 9]
    loader, images = make_loader(labels, 3)
    network, seen = Tiny().train(), []
    embeddings, found = inference.embed(network, loader, "cpu", after_batch=lambda: seen.append(True))
    assert not network.training and not network.bn.training
    assert embeddings.dtype == torch.float32 and found.dtype == torch.int64
    assert found.tolist() == labels and len(seen) == 3
    torch.testing.assert_close(embeddings, images.flatten(1) / (1 + 1e-5) ** 0.5)
    assert not embeddings.requires_grad
    other = inference.embed(network, loader, "cpu", amp=True, channels_last=True).embeddings
    assert other.dtype == torch.float32
    torch.testing.assert_close(other, embeddings, rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match="no image"):
        inference.embed(network, make_loader([], 2)[0], "cpu")


IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), bgr=False, scale=1.0)
INCEPTION = dict(mean=(104, 117, 128), std=(1, 1, 1), bgr=True, scale=255.0)
ODD = dict(mean=(33.3, 0.1, 254.9), std=(57.1, 0.3, 255.0), bgr=True, scale=255.0)


@pytest.mark.parametrize("wanted", [IMAGENET, INCEPTION, ODD])
@pytest.mark.parametrize("workers, channels_last", [(0, False), (2, True)])
def test_networks_see_what_torchvision_would_give_them_to_the_bit(tmp_path, wanted, workers, channels_last):
    trees.make_cub(tmp_path, classes=4, images=3, size=40)
    images = dataset.load_benchmark("cub", tmp_path).query
    to_float = [transforms.ToTensor()]
    if wanted["bgr"]:
        to_float.append(lambda image: image.flip(0))
    to_float.append(transforms.Normalize(*([x / wanted["scale"] for x in wanted[name]] for name in ("mean", "std"))))
    usual = transforms.Compose([transforms.Resize(37), transforms.CenterCrop(32), *to_float])
    expected = torch.stack([usual(dataset.read_rgb(str(images.root / path))) for path in images.paths])
    loader = inference.make_loader(images, 32, 4, workers, "cpu")
    found = inference.embed(Pixels(**wanted), loader, "cpu", channels_last=channels_last)
    assert torch.equal(found.embeddings, expected.flatten(1))
