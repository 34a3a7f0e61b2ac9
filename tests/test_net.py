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
from torch import nn
from torchvision import models

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_NETWORKS = ("resnet50", "bn_inception", "googlenet")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def golden_keys(name):
    return json.loads((GOLDEN / f"{name}_state_dict_keys.json").read_text())


def golden_images():
    noise = torch.randn(2, 3, 9, 9, generator=generator(123))
    return nn.functional.interpolate(noise, size=224, mode="bilinear", align_corners=False)


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


def golden_state(name):
    keys = golden_keys(name)
    return {key: golden_value(key, keys[key], seed) for seed, key in enumerate(sorted(keys))}


def build(name="resnet18", **options):
    return net.build(name, **{"embedding_size": 16, "weights": "none", **options})


def images(size=64, n=2):
    return torch.randn(n, 3, size, size, generator=generator(0))


def batchnorms(network):
    return [module for module in network.model.modules() if isinstance(module, nn.BatchNorm2d)]


def batchnorm_parameters(network):
    return [parameter for module in batchnorms(network) for parameter in module.parameters()]


def statistics(network):
    return torch.cat([torch.cat([module.running_mean, module.running_var]) for module in batchnorms(network)])


def same_backbone(state, network):
    """Whether the network holds the backbone `state` (names without 'model.'), classifier aside."""
    own = network.model.state_dict()
    return all(
        torch.equal(own[key], value.reshape(own[key].shape))
        for key, value in state.items()
        if not key.startswith(network.optional)
    )


def error_line(kind, function, *arguments, **options):
    """The message of the error that the call raises, which must be one line."""
    with pytest.raises(kind) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ---- the published networks ----


@pytest.mark.parametrize("name", GOLDEN_NETWORKS)
def test_names_and_shapes_of_the_published_state_dict(name):
    shapes = {key: list(value.shape) for key, value in net.build(name, weights="none").state_dict().items()}
    assert shapes == golden_keys(name)


@pytest.mark.parametrize("name", GOLDEN_NETWORKS)
def test_golden_embeddings(name):
    network = net.build(name, weights="none").eval()
    net.load_network_state(network, golden_state(name), "golden")
    with torch.no_grad():
        embeddings = network(golden_images()).numpy()
    np.testing.assert_allclose(embeddings, np.load(GOLDEN / "backbones.npz")[name], atol=1e-4, rtol=0)


def test_preprocessing():
    network = build()
    assert (network.mean, network.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (network.bgr, network.scale, network.image_size) == (False, 1.0, 224)
    network = build("bn_inception")
    assert (network.mean, network.std) == ((104, 117, 128), (1, 1, 1))
    assert (network.bgr, network.scale, network.image_size) == (True, 255.0, 224)


# ---- head ----


def test_embedding_layer_starts_with_kaiming_fan_out_and_no_bias():
    torch.manual_seed(0)
    layer = build("resnet18", embedding_size=128).model.embedding
    assert layer.weight.shape == (128, 512)
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.02)
    assert layer.weight.mean().item() == pytest.approx(0, abs=2e-3)
    assert not layer.bias.any()


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


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "bn_inception"])
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


# ---- what trains ----


@pytest.mark.parametrize("name", net.MODELS)
def test_parameter_groups_are_disjoint_complete_and_in_order(name):
    network = build(name)
    backbone, embedding = network.backbone_parameters(), network.embedding_parameters()
    assert [id(p) for p in backbone + embedding] == [id(p) for p in network.parameters()]
    assert [p.shape for p in embedding] == [(16, network.model.embedding.in_features), (16,)]


def test_batchnorm_affine_frozen_at_construction_and_trainable_after_the_warm_up():
    network = build("resnet50")
    assert len(batchnorm_parameters(network)) == 106
    assert not any(p.requires_grad for p in batchnorm_parameters(network))
    assert network.model.conv1.weight.requires_grad

    network.set_backbone_trainable(False)
    trainable = {key for key, p in network.named_parameters() if p.requires_grad}
    assert trainable == {"model.embedding.weight", "model.embedding.bias"}
    network.set_backbone_trainable(True)
    assert all(p.requires_grad for p in batchnorm_parameters(network))


def test_batchnorm_affine_trains_from_the_start_without_bn_freeze():
    assert all(p.requires_grad for p in batchnorm_parameters(build(bn_freeze=False)))


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "bn_inception"])
def test_exactly_the_trainable_parameters_get_a_gradient(name):
    network = build(name, bn_freeze=False)
    network.set_backbone_trainable(True)
    network(images()).mul(torch.randn(16, generator=generator(1))).sum().backward()
    without = {key for key, p in network.named_parameters() if p.grad is None}
    frozen = {key for key, p in network.named_parameters() if not p.requires_grad}
    assert without == frozen
    assert {key.split(".")[1] for key in frozen} <= {"fc", "last_linear", "aux1", "aux2"}


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "bn_inception"])
def test_batchnorm_statistics_move_in_training_unless_frozen(name):
    network = build(name).train()
    before = statistics(network)
    network.freeze_batchnorm_statistics()
    network(images())
    assert torch.equal(statistics(network), before)

    network.train()
    network(images())
    assert not torch.equal(statistics(network), before)


# ---- weights from a file ----


def test_torchvision_file_gives_the_same_backbone(tmp_path):
    reference = models.resnet18(weights=None)
    for buffer in reference.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    torch.save(reference.state_dict(), tmp_path / "resnet18.pth")
    network = build(weights=str(tmp_path / "resnet18.pth"), layer_norm=False, add_gmp=False).eval()
    assert same_backbone(reference.state_dict(), network)

    reference.fc = nn.Identity()
    with torch.no_grad():
        expected = network.model.embedding(reference.eval()(images()))
        torch.testing.assert_close(network(images()), expected)


def test_classifier_of_another_task_or_none_is_accepted(tmp_path):
    state = models.resnet18(weights=None, num_classes=7).state_dict()
    torch.save(state, tmp_path / "seven.pth")
    assert same_backbone(state, build(weights=tmp_path / "seven.pth"))
    del state["fc.weight"], state["fc.bias"]
    torch.save(state, tmp_path / "none.pth")
    assert same_backbone(state, build(weights=tmp_path / "none.pth"))


def test_googlenet_file_without_auxiliary_heads(tmp_path):
    state = models.googlenet(weights=None, aux_logits=False, init_weights=True).state_dict()
    torch.save(state, tmp_path / "googlenet.pth")
    assert same_backbone(state, build("googlenet", weights=tmp_path / "googlenet.pth"))


def test_old_bn_inception_file(tmp_path):
    """Files of its time have no num_batches_tracked and hold BatchNorm's vectors as (1, C)."""
    state = {
        key.removeprefix("model."): value
        for key, value in build("bn_inception").state_dict().items()
        if not key.endswith("num_batches_tracked") and "embedding" not in key
    }
    old = {key: value[None] if "_bn." in key else value for key, value in state.items()}
    torch.save(old, tmp_path / "bn_inception.pth")
    assert same_backbone(state, build("bn_inception", weights=tmp_path / "bn_inception.pth"))


def test_embedding_layer_comes_from_a_checkpoint_only_if_its_size_fits(tmp_path):
    source = build()
    torch.save({"model_state_dict": source.state_dict()}, tmp_path / "best.pth")
    network = build(weights=tmp_path / "best.pth")
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in source.state_dict().items())
    network = build(weights=tmp_path / "best.pth", embedding_size=8)
    assert same_backbone(source.model.state_dict(), network)
    assert network.model.embedding.weight.shape == (8, 512)


def test_unusable_files_say_why_in_one_line(tmp_path):
    assert "nowhere.pth" in error_line(ValueError, build, weights=tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("<html>404</html>")
    assert "text.pth" in error_line(ValueError, build, weights=tmp_path / "text.pth")
    torch.save([1, 2, 3], tmp_path / "list.pth")
    assert "no state dict" in error_line(ValueError, build, weights=tmp_path / "list.pth")

    torch.save(models.resnet34(weights=None).state_dict(), tmp_path / "other.pth")
    message = error_line(ValueError, build, weights=tmp_path / "other.pth")
    assert "other.pth" in message and "does not fit resnet18" in message and "0 keys missing" in message
    assert "96 unexpected" in message and "layer1.2.conv1.weight" in message and "--model resnet34" in message


@pytest.mark.parametrize("prefix", ["module.", "module.model.", "model."])
def test_weights_saved_from_data_parallel_training_load(tmp_path, prefix):
    state = models.resnet18(weights=None).state_dict()
    torch.save({"state_dict": {prefix + key: value for key, value in state.items()}}, tmp_path / "parallel.pth")
    assert same_backbone(state, build(weights=tmp_path / "parallel.pth"))


# ---- weights from the network ----


def refuse(url, *arguments, **options):
    raise urllib.error.URLError("Name or service\nnot known")


def test_no_download_says_what_to_do_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    message = error_line(ValueError, net.build, "resnet50")
    assert "https://download.pytorch.org/models/resnet50-0676ba61.pth" in message
    assert str(Path(torch.hub.get_dir(), "checkpoints")) in message
    assert "--weights FILE" in message and "--weights none" in message


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_imagenet_weights_are_the_first_version(name, monkeypatch):
    state = build(name).model.state_dict()
    published = {key: value for key, value in state.items() if not key.startswith("embedding.")}
    urls = []

    def download(url, **options):
        urls.append(url)
        return published

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    assert same_backbone(published, net.build(name))
    assert urls == [models.get_model_weights(name).IMAGENET1K_V1.url]


def test_bn_inception_has_no_download():
    assert "--weights FILE" in error_line(ValueError, net.build, "bn_inception")


# ---- state dicts of whole networks ----


def test_googlenet_checkpoint_without_auxiliary_heads():
    source, network = build("googlenet"), build("googlenet")
    state = {key: value for key, value in source.state_dict().items() if ".aux" not in key}
    net.load_network_state(network, state, "best.pth")
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize("dropped", ["model.fc.bias", "model.bn1.running_mean", "model.embedding.weight"])
def test_whole_networks_load_strictly(dropped):
    network = build()
    state = network.state_dict()
    del state[dropped]
    message = error_line(ValueError, net.load_network_state, network, state, "best.pth")
    assert "best.pth" in message and "1 keys missing" in message and dropped in message
    assert "1 unexpected" in error_line(
        ValueError, net.load_network_state, network, {**network.state_dict(), "model.extra": torch.zeros(1)}, "best.pth"
    )


def test_another_embedding_size_names_the_flag():
    state = build(embedding_size=8).state_dict()
    message = error_line(ValueError, net.load_network_state, build(), state, "best.pth")
    assert "2 of another shape" in message and "its embedding size is 8, not 16" in message
    assert "--embedding-size 8" in message and "--model" not in message


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet101", "googlenet", "bn_inception"])
def test_another_network_names_the_flag(name):
    state = build(name, embedding_size=8).state_dict()
    message = error_line(ValueError, net.load_network_state, build(), state, "best.pth")
    assert f"--model {name} --embedding-size 8" in message


# ---- names ----


def test_unknown_name_lists_the_choices_and_the_nearest():
    message = error_line(ValueError, build, "resnet-50")
    assert "did you mean 'resnet50'" in message and all(name in message for name in net.MODELS)


def test_timm_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in error_line(ValueError, build, "timm:resnet18")


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

    assert "resnet18" in error_line(ValueError, build, "timm:resnet18z")
    monkeypatch.setattr(timm, "create_model", refuse)
    assert "--weights FILE" in error_line(ValueError, net.build, f"timm:{name}")
