"""One-shot generation of small specialised Transformers from a large one."""

_PLACES = {
    "load": "standalone",
    "SmallTransformer": "standalone",
    "export_onnx": "onnx_file",
    "sample_onnx": "onnx_file",
}


def __getattr__(name: str):
    """`projectable.load` and its kin, imported where they are first used: importing the package stays light."""
    if name not in _PLACES:
        raise AttributeError(f"module 'projectable' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"projectable.{_PLACES[name]}"), name)
