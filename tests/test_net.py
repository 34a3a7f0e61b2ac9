"""The networks: published numbers and names, what trains and what stays fixed, where weights come from."""

import json
import math
import sys
import urllib.error
from pathlib import Path

import net
import numpy as np
import pytest
import torch
from refused import Refused
from torch import nn
from torchvision import models

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_NETWORKS = ("resnet50", "bn_inception", "googlenet")
KINDS = ("resnet18", "googlenet", "bn_inception")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def golden_keys(name):
    return json.loads((GOLDEN / f"{name}_state_dict_keys.json").read_text())


def golden_value(key, shape, seed):
    """A weight of the golden embeddings' network; seed is the position of its key in sorted order."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if key.endswith("running_var"):
        return 0.5 + torch.rand(shape, generator=generator(seed))
    if len(shape) > 1:
        return torch.randn(shape, generator=generator(seed)) * math.sqrt(2 / math.prod(shape[1:]))
    if key.endswith("weight"):
        return 0.75 + 0.5 * torch.rand(shape, generator=generator(seed))
    return 0.1 * torch.randn(shape, generator=generator(seed))


def build(name="resnet18", **options):
    return net.build(name, **{"embedding_size": 16, "weights": "none", **options})


def images(size=64, n=2):
    return torch.randn(n, 3, size, size, generator=generator(0))


def batchnorm_parameters(network):
    batchnorms = [module for module in network.model.modules() if isinstance(module, nn.BatchNorm2d)]
    return [parameter for module in batchnorms for parameter in module.parameters()]


def same_backbone(state, network):
    """Whether the network holds the backbone `state` (names without 'model.'), classifier aside."""
    own = network.model.state_dict()
    return all(
        torch.equal(own[key], value.reshape(own[key].shape))
        for key, value in state.items()
        if not key.startswith(network.optional)
    )


def refused(function, *arguments, **options):
    """What the user is told, which must be one line."""
    with pytest.raises(Refused) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize("name", GOLDEN_NETWORKS)
def test_names_shapes_and_embeddings_of_the_published_networks(name):
    network, keys = net.build(name, weights="none").eval(), golden_keys(name)
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == keys
    state = {key: golden_value(key, keys[key], seed) for seed, key in enumerate(sorted(keys))}
    net.load_network_state(network, state, "golden")
    noise = torch.randn(2, 3, 9, 9, generator=generator(123))
    with torch.no_grad():
        embeddings = network(nn.functional.interpolate(noise, size=224, mode="bilinear", align_corners=False)).numpy()
    np.testing.assert_allclose(embeddings, np.load(GOLDEN / "backbones.npz")[name], atol=1e-4, rtol=0)


def test_preprocessing():
    usual = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), False, 1.0, 224)
    caffe = ((104, 117, 128), (1, 1, 1), True, 255.0, 224)
    for network, expected in ((build(), usual), (build("bn_inception"), caffe)):
        assert (network.mean, network.std, network.bgr, network.scale, network.image_size) == expected


def test_embedding_layer_starts_with_kaiming_fan_out_and_no_bias():
    torch.manual_seed(0)
    layer = build("resnet18", embedding_size=128).model.embedding
    assert layer.weight.shape == (128, 512) and not layer.bias.any()
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.02)
    assert layer.weight.mean().item() == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("add_gmp", [True, False])
def test_pooling_and_layer_norm_are_what_the_flags_say(add_gmp, layer_norm):
    network = build(add_gmp=add_gmp, layer_norm=layer_norm).eval()
    with torch.no_grad():
        maps = network.features(images())
        pooled = maps.mean((2, 3)) + (maps.amax((2, 3)) if add_gmp else 0)
        expected = pooled @ network.model.embedding.weight.T
        if layer_norm:
            expected = expected - expected.mean(1, keepdim=True)
            expected = expected / (expected.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(network(images()), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_autocast_and_channels_last(name):
    network = build(name).train()
    network.freeze_batchnorm_statistics()
    with torch.no_grad():
        expected = network(images(96))
    network.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = network(images(96).contiguous(memory_format=torch.channels_last))
    assert nn.functional.cosine_similarity(embeddings.float(), expected).min() > 0.99
    embeddings.float().square().sum().backward()


@pytest.mark.parametrize("name", net.MODELS)
def test_parameter_groups_are_disjoint_complete_and_in_order(name):
    network = build(name)
    backbone, embedding = network.backbone_parameters(), list(network.model.embedding.parameters())
    assert [id(p) for p in backbone + embedding] == [id(p) for p in network.parameters()]
    assert [p.shape for p in embedding] == [(16, network.model.embedding.in_features), (16,)]


def test_batchnorm_affine_frozen_at_construction_and_trainable_after_the_warm_up():
    assert all(p.requires_grad for p in batchnorm_parameters(build(bn_freeze=False)))
    network = build("resnet50")
    assert len(batchnorm_parameters(network)) == 106
    assert not any(p.requires_grad for p in batchnorm_parameters(network))
    assert network.model.conv1.weight.requires_grad

    network.set_backbone_trainable(False)
    trainable = {key for key, p in network.named_parameters() if p.requires_grad}
    assert trainable == {"model.embedding.weight", "model.embedding.bias"}
    network.set_backbone_trainable(True)
    assert all(p.requires_grad for p in batchnorm_parameters(network))


@pytest.mark.parametrize("name", KINDS)
def test_exactly_the_trainable_parameters_get_a_gradient_and_statistics_move_unless_frozen(name):
    network = build(name, bn_freeze=False).train()
    statistics = {key: value.clone() for key, value in network.named_buffers() if "running" in key}
    network.set_backbone_trainable(True)
    network.freeze_batchnorm_statistics()
    network(images()).mul(torch.randn(16, generator=generator(1))).sum().backward()
    without = {key for key, p in network.named_parameters() if p.grad is None}
    frozen = {key for key, p in network.named_parameters() if not p.requires_grad}
    assert without == frozen
    assert {key.split(".")[1] for key in frozen} <= {"fc", "last_linear", "aux1", "aux2"}
    assert all(torch.equal(value, statistics[key]) for key, value in network.named_buffers() if key in statistics)

    network.train()(images())
    used = {key: value for key, value in network.named_buffers() if key in statistics and ".aux" not in key}
    assert not any(torch.equal(value, statistics[key]) for key, value in used.items())


def without(state, *parts):
    return {key: value for key, value in state.items() if not any(part in key for part in parts)}


def old_bn_inception():
    """Files of its time have no num_batches_tracked and hold BatchNorm's vectors as (1, C)."""
    state = without(build("bn_inception").model.state_dict(), "num_batches_tracked", "embedding")
    return {key: value[None] if "_bn." in key else value for key, value in state.items()}


@pytest.mark.parametrize(
    "name, make",
    [
        ("resnet18", lambda: models.resnet18(weights=None, num_classes=7).state_dict()),
        ("resnet18", lambda: without(models.resnet18(weights=None).state_dict(), "fc.")),
        ("googlenet", lambda: models.googlenet(weights=None, aux_logits=False, init_weights=True).state_dict()),
        ("bn_inception", old_bn_inception),
        ("resnet18", lambda: build(embedding_size=8).state_dict()),
    ],
)
def test_files_of_backbones_that_differ_a_little(tmp_path, name, make):
    state = make()
    torch.save(state, tmp_path / "weights.pth")
    network = build(name, weights=tmp_path / "weights.pth")
    assert same_backbone({key.removeprefix("model."): value for key, value in state.items()}, network)
    assert network.model.embedding.weight.shape[0] == 16


def unreachable(url, *arguments, **options):
    raise urllib.error.URLError("Name or service\nnot known")


def test_no_download_says_what_to_do_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    message = refused(net.build, "resnet50")
    assert "https://download.pytorch.org/models/resnet50-0676ba61.pth" in message
    assert str(Path(torch.hub.get_dir(), "checkpoints")) in message
    assert "--weights FILE" in message and "--weights none" in message
    assert "--weights FILE" in refused(net.build, "bn_inception")


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_imagenet_weights_are_the_first_version(name, monkeypatch):
    published = without(build(name).model.state_dict(), "embedding.")
    urls = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: urls.append(url) or published)
    assert same_backbone(published, net.build(name))
    assert urls == [models.get_model_weights(name).IMAGENET1K_V1.url]


def test_whole_networks_load_strictly_but_for_auxiliary_heads_and_counters():
    source, network = build("googlenet"), build("googlenet")
    state = without(source.state_dict(), ".aux", "num_batches_tracked")
    net.load_network_state(network, state, "best.pth")
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in state.items())

    network = build()
    own = network.state_dict()
    for dropped in ("model.fc.bias", "model.bn1.running_mean", "model.embedding.weight"):
        message = refused(net.load_network_state, network, without(own, dropped), "best.pth")
        assert "best.pth" in message and f'Missing key(s) in state_dict: "{dropped}"' in message
    for value, match in ((torch.zeros(1), "Unexpected key(s)"), (torch.zeros(2, 2), "size mismatch")):
        key = "model.extra" if len(value) == 1 else "model.fc.bias"
        message = refused(net.load_network_state, network, own | {key: value}, "best.pth")
        assert match in message and key in message


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "bn_inception"])
def test_another_network_or_embedding_size_is_refused(name, tmp_path):
    torch.save(build(name, embedding_size=8).state_dict(), tmp_path / "other.pth")
    state = torch.load(tmp_path / "other.pth", weights_only=True)
    message = refused(net.load_network_state, build(), state, "best.pth")
    assert "best.pth does not fit resnet18 with embedding size 16" in message and "--embedding-size" in message
    assert ("shape torch.Size([8, 512])" if name == "resnet18" else "key(s)") in message
    if name != "resnet18":
        message = refused(build, weights=tmp_path / "other.pth")
        assert "other.pth does not fit resnet18" in message and "--model" in message


def test_unknown_names_are_refused_with_the_choices(monkeypatch):
    message = refused(build, "resnet-50")
    assert "unknown model 'resnet-50'" in message and all(name in message for name in net.MODELS)
    assert "timm:resnet18z" in refused(build, "timm:resnet18z")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "import of timm halted" in refused(build, "timm:resnet18")


def test_a_name_that_begins_like_an_unused_one_is_used():
    network = build()
    network.unused = ("bn1.weight.", "conv1.we.")
    network.set_backbone_trainable(False)
    network.set_backbone_trainable(True)
    trainable = {name for name, parameter in network.model.named_parameters() if parameter.requires_grad}
    assert "conv1.weight" in trainable and "bn1.bias" in trainable and "bn1.weight" not in trainable


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_timm(name, tmp_path, monkeypatch):
    import timm

    network = build(f"timm:{name}")
    assert network.name == f"timm:{name}" and network.image_size == 224
    assert network.mean == ((0.5, 0.5, 0.5) if name.startswith("vit") else (0.485, 0.456, 0.406))
    network.set_backbone_trainable(True)
    embeddings = network(images(224, n=1))
    assert embeddings.shape == (1, 16)
    embeddings.mul(torch.randn(16, generator=generator(1))).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in network.parameters())

    reference = timm.create_model(name)  # with its classifier
    torch.save(reference.state_dict(), tmp_path / "timm.pth")
    assert same_backbone(reference.state_dict(), build(f"timm:{name}", weights=tmp_path / "timm.pth"))
    monkeypatch.setattr(timm, "create_model", unreachable)
    assert "--weights FILE" in refused(net.build, f"timm:{name}")
