"""One-shot generation of small specialised Transformers from a large one.

The front door for who has a small model and nothing else: `load` for its folder (with torch), `sample_onnx` for its
ONNX file (with numpy and onnxruntime alone).
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ONNX_KEY, ONNX_SEAL = "projectable", b"projectable-sha256:"
ONNX_EXTRA = "needs onnx, onnxscript and onnxruntime: pip install 'projectable[onnx]'"


def __getattr__(name: str):
    """`projectable.load` and its kin, imported where they are first used: importing the package stays light."""
    if name not in ("load", "SmallTransformer", "export_onnx"):
        raise AttributeError(f"module 'projectable' has no attribute {name!r}")
    from . import export

    return getattr(export, name)


class OnnxError(RuntimeError):
    """A file is no ONNX model of ours, or what reads it is not installed; the message says which."""


def open_onnx(path: str | Path):
    """The onnxruntime session of a file written by `export_onnx`, and its description. Raises OnnxError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise OnnxError(f"reading ONNX {ONNX_EXTRA} ({error})") from None
    path = Path(path)
    if not path.is_file():
        raise OnnxError(f"{path} is no file; allowed: one written by export_onnx")
    content = path.read_bytes()
    before, seal, after = content.partition(ONNX_SEAL)
    if not seal:
        raise OnnxError(f"{path} was not written by export_onnx, or is damaged")
    if hashlib.sha256(before + seal + b"0" * 64 + after[64:]).hexdigest().encode() != after[:64]:
        raise OnnxError(f"{path} is damaged (its checksum differs): export it again")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session, json.loads(session.get_modelmeta().custom_metadata_map[ONNX_KEY])


def sample_onnx(path: str | Path, n: int, temperature: float = 1.0, seed: int | None = None) -> np.ndarray:
    """n new images (n, H, W, C) in [0, 1] from an ONNX file, with numpy and onnxruntime only.

    The same seed gives the same images, though not those of `SmallTransformer.sample`. Raises OnnxError, ValueError.
    """
    if n < 1 or not 1e-6 <= temperature < math.inf:
        raise ValueError(f"n={n}, temperature={temperature}; allowed: 1 or more images, a temperature of 1e-6 or more")
    import numpy as np

    session, about = open_onnx(path)
    rng = np.random.default_rng(seed)
    tokens = np.zeros((n, about["length"]), np.int64)
    for i in range(about["length"]):
        logits = session.run(["logits"], {"tokens": tokens[:, : i + 1]})[0][:, i] / temperature
        total = np.exp(logits - logits.max(-1, keepdims=True)).cumsum(-1, dtype=np.float64)
        tokens[:, i] = (total <= rng.random((n, 1)) * total[:, -1:]).sum(-1)
    patch, rows, cols = about["patch"], about["height"] // about["patch"], about["width"] // about["patch"]
    codes = np.frombuffer(base64.b64decode(about["codes"]), "<f4").reshape(about["n_codes"], -1)
    x = codes[tokens].reshape(n, rows, cols, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, rows * patch, cols * patch, -1)
