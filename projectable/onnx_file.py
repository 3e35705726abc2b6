"""A small model as one ONNX file: written by torch, run and sampled from with numpy and onnxruntime alone.

What is notable:

- It is the one Transformer that is traced; only its attention, hand-written for training on CPUs, is replaced by
  torch's own for the time of the export.
- The file also holds the codebook, and a seal: the SHA-256 of the file with the seal's own digits as zeros. A changed
  or cut file is refused.
- `sample_onnx` imports no torch. There is no cache in the graph: each token costs a pass over those before it.

Needs the extra: pip install 'projectable[onnx]'.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from pathlib import Path

import numpy as np

KEY, SEAL = "projectable", b"projectable-sha256:"
EXTRA = "needs onnx, onnxscript and onnxruntime: pip install 'projectable[onnx]'"


class OnnxError(RuntimeError):
    """A file is no ONNX model of ours, or what reads it is not installed; the message says which."""


def export_onnx(model, path: str | Path) -> Path:
    """Write a `SmallTransformer` as one file: tokens (batch, length) → logits (batch, length, codes); returns the path.

    Any batch, any length up to the model's own.
    """
    from unittest import mock

    import torch

    from . import transformer
    from .storage import draft_of

    try:
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise OnnxError(f"export to ONNX {EXTRA} ({error})") from None

    def attention(qkv, d_head, batch):  # (1, B·N, 3·d) → (1, B·N, d)
        q, k, v = qkv.view(batch, -1, 3, qkv.shape[-1] // (3 * d_head), d_head).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).reshape(1, -1, qkv.shape[-1] // 3)

    path, book = Path(path), model.codebook
    tokens = torch.zeros(2, min(3, model.shape.length), dtype=torch.int64)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=model.shape.length)}
    with mock.patch.object(transformer, "attention", attention), torch.no_grad():
        program = torch.onnx.export(
            model.eval(),
            (tokens,),
            input_names=["tokens"],
            output_names=["logits"],
            dynamic_shapes=(sizes,),
            dynamo=True,
            verbose=False,
        )
    about = dict(patch=book.patch, height=book.height, width=book.width, length=model.shape.length, task=model.task)
    codes = np.ascontiguousarray(book.codes, "<f4")
    about |= dict(codes=base64.b64encode(codes.tobytes()).decode(), n_codes=len(codes))
    for node in program.model.graph:
        node.metadata_props.clear()  # where each operation stands in the code, with the paths of this machine
    program.model.metadata_props[KEY] = json.dumps(about)
    program.model.metadata_props["seal"] = SEAL.decode() + "0" * 64
    with draft_of(path) as draft:
        program.save(str(draft), external_data=False)
        content = draft.read_bytes()
        draft.write_bytes(content.replace(SEAL + b"0" * 64, SEAL + hashlib.sha256(content).hexdigest().encode()))
    return path


def open_onnx(path: str | Path):
    """The onnxruntime session of a file written by `export_onnx`, and its description. Raises OnnxError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise OnnxError(f"reading ONNX {EXTRA} ({error})") from None
    path = Path(path)
    if not path.is_file():
        raise OnnxError(f"{path} is no file; allowed: one written by export_onnx")
    content = path.read_bytes()
    before, seal, after = content.partition(SEAL)
    if not seal:
        raise OnnxError(f"{path} was not written by export_onnx, or is damaged")
    if hashlib.sha256(before + seal + b"0" * 64 + after[64:]).hexdigest().encode() != after[:64]:
        raise OnnxError(f"{path} is damaged (its checksum differs): export it again")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session, json.loads(session.get_modelmeta().custom_metadata_map[KEY])


def sample_onnx(path: str | Path, n: int, temperature: float = 1.0, seed: int | None = None) -> np.ndarray:
    """n new images (n, H, W, C) in [0, 1] from an ONNX file, with numpy and onnxruntime only.

    The same seed gives the same images, though not those of `SmallTransformer.sample`. Raises OnnxError, ValueError.
    """
    if n < 1 or not 0 < temperature < math.inf:
        raise ValueError(f"n={n}, temperature={temperature}; allowed: 1 or more images, any temperature above 0")
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
