"""Images ↔ tokens: patches, a k-means codebook, raster order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def to_patches(images: np.ndarray, patch: int) -> np.ndarray:
    """Images (n, H, W, C) in [0, 1] → patches (n, N, patch·patch·C), N = (H/patch)·(W/patch), in raster order.

    Raises ValueError where patch does not divide H and W.
    """
    n, height, width, channels = images.shape
    if height % patch or width % patch:
        raise ValueError(f"patch={patch} does not divide images of {height}×{width} pixels")
    rows, cols = height // patch, width // patch
    x = images.reshape(n, rows, patch, cols, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, rows * cols, patch * patch * channels)


def from_patches(patches: np.ndarray, patch: int, height: int, width: int) -> np.ndarray:
    """The inverse of `to_patches`: (n, N, patch·patch·C) → (n, H, W, C)."""
    rows, cols = height // patch, width // patch
    x = patches.reshape(len(patches), rows, cols, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(len(patches), height, width, -1)


@dataclass(frozen=True)
class Codebook:
    """Patch vectors `codes` (V, patch·patch·C) in [0, 1] for images of height × width pixels."""

    codes: np.ndarray
    patch: int
    height: int
    width: int

    @classmethod
    def fit(cls, images: np.ndarray, patch: int, size: int, seed: int = 0, max_patches: int = 50_000) -> Codebook:
        """k-means on patches of `images` (n, H, W, C): training images only. Codes are sorted by brightness."""
        from sklearn.cluster import KMeans

        patches = to_patches(images, patch).reshape(-1, patch * patch * images.shape[-1])
        rng = np.random.default_rng(seed)
        if len(patches) > max_patches:
            patches = patches[rng.choice(len(patches), max_patches, replace=False)]
        if len(patches) < size:
            raise ValueError(f"a codebook of {size} codes needs as many patches; these images have {len(patches)}")
        fit = KMeans(size, n_init=1, max_iter=20, random_state=seed).fit(patches)
        codes = np.clip(fit.cluster_centers_, 0, 1).astype(np.float32)
        return cls(codes[np.argsort(codes.mean(1), kind="stable")], patch, images.shape[1], images.shape[2])

    @property
    def length(self) -> int:
        """Tokens of an image."""
        return (self.height // self.patch) * (self.width // self.patch)

    def encode(self, images: np.ndarray, block: int = 4096) -> np.ndarray:
        """Images (n, H, W, C) in [0, 1] → tokens (n, N) int64: the nearest code of every patch."""
        tokens = np.empty((len(images), self.length), np.int64)
        norms = 0.5 * (self.codes**2).sum(1)
        for i in range(0, len(images), block):
            patches = to_patches(images[i : i + block], self.patch)
            tokens[i : i + block] = (patches @ self.codes.T - norms).argmax(-1)
        return tokens

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens (n, N) → images (n, H, W, C) in [0, 1]."""
        return from_patches(self.codes[np.asarray(tokens)], self.patch, self.height, self.width)

    def psnr(self, images: np.ndarray) -> float:
        """Peak signal-to-noise ratio of decode(encode(images)), in dB."""
        error = np.mean((self.decode(self.encode(images)) - images) ** 2, dtype=np.float64)
        return float(-10 * np.log10(error))
