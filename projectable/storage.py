"""Where we are, what is kept, and under which key: files that are whole or not there, locks, a fingerprint of code.

- Files: atomic writes, checksums (safetensors), no pickles.
- The fingerprint is one of functions and classes, and of all that they refer to or were given: code of this package or
  of modules of one's own (neither the standard library nor an installed package), plain values, arrays.
- Comments, docstrings, annotations and the file that a thing stands in do not count; nor does what is `LEFT_OUT`:
  this module, and how processes share a training, which carry numbers but do not make them.
- A registry (a dict of functions or classes by name, as `FAMILIES`) counts with the entries that are named: by `words`,
  the strings of a config, or by a string in code that counts. A new entry, or an edit of another, changes nothing.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import inspect
import json
import linecache
import os
import secrets
import signal
import subprocess
import symtable
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from fractions import Fraction
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor


class DamagedFile(RuntimeError):
    """A file of ours is not what was written; the message names it and says what to do."""


class WriteError(OSError):
    """A folder can't be written to; the message names it and says what to do."""


def root() -> Path:
    """The project's folder: PROJECTABLE_ROOT, or the folder that holds the package."""
    return Path(os.environ.get("PROJECTABLE_ROOT") or Path(__file__).resolve().parent.parent).expanduser()


def device() -> str:
    """What computes here, in words."""
    import torch

    cuda = torch.cuda.is_available()
    return f"cuda: {torch.cuda.get_device_name()}" if cuda else f"cpu: {os.cpu_count()} cores"


def end_with_parent() -> None:
    """On Linux, have this process told to end (SIGTERM) where the one that started it is no more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def current_commit() -> str:
    """The commit of the working tree, with a `+` where package or notebooks differ from it."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=root(), capture_output=True, text=True, check=True).stdout.strip()

    ours = ("--", "projectable", "notebooks")
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if git("ls-files", *ours):  # installed, the package may lie within another's repository
            return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", *ours) else "")
    return "unknown"


def _touch(path: Path) -> None:
    """Make an empty file, and the folder it lies in. Raises WriteError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except FileExistsError:
        raise WriteError(f"{path.parent} is a file; allowed: a folder") from None
    except OSError as error:
        advice = "choose another folder (for runs: PROJECTABLE_RUNS), or make it writable"
        raise WriteError(f"{path.parent} can't be written to ({error.strerror}): {advice}") from None


@contextlib.contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A file to write to beside `path`; it takes the place of `path` at the end, or goes where writing fails.

    Raises WriteError, naming `path`, where it cannot be written or the folder is full.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")  # two machines may share the id of a process
    try:
        _touch(draft)
        mode = draft.stat().st_mode  # the umask's: safetensors would leave files that only their owner reads
        yield draft
        draft.chmod(mode)
        draft.replace(path)
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        if "No space left" in str(error):
            raise WriteError(f"{path.parent} is full: make room and run again (what was there is kept)") from None
        raise WriteError(f"{path} can't be written ({getattr(error, 'strerror', '') or error})") from None
    finally:
        with contextlib.suppress(OSError):  # where it could not even be made
            draft.unlink()


def write_atomically(path: Path, content: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part. Raises WriteError."""
    with draft_of(path) as draft:
        draft.write_bytes(content.encode())


def _digest(tensors: dict[str, Tensor], about: str) -> str:
    import torch

    sha = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        sha.update(t.view(-1).view(torch.uint8).numpy().data if t.numel() else b"")
    return sha.hexdigest()


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """Write tensors and a JSON-able description as one checksummed safetensors file, atomically. Raises WriteError."""
    import torch
    from safetensors.torch import save_file

    # copies: safetensors refuses tensors that share memory
    tensors = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    words = json.dumps(about, sort_keys=True)
    with draft_of(path) as draft:
        save_file(tensors, draft, {"about": words, "sha256": _digest(tensors, words)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """What `save_tensors` wrote; raises DamagedFile where a bit of it has changed or a part is missing."""
    from safetensors.torch import load_file, safe_open

    advice = "delete it and run again"
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        tensors = load_file(path)
        words, expected = about["about"], about["sha256"]
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, OSError, ValueError) as error:
        raise DamagedFile(f"{path} is damaged ({type(error).__name__}: {error}): {advice}") from None
    if _digest(tensors, words) != expected:
        raise DamagedFile(f"{path} is damaged (its checksum differs): {advice}")
    return tensors, json.loads(words)


def checksum(value: dict) -> str:
    """SHA-256 of what a JSON object says, however it is laid out."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: dict) -> None:
    """Write a JSON object with its checksum in the field `sha256`, atomically."""
    write_atomically(path, json.dumps(value | {"sha256": checksum(value)}, indent=1) + "\n")


def read_json(path: Path) -> dict:
    """What `write_json` wrote; raises DamagedFile where it says anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise DamagedFile(f"{path} is damaged ({error}): delete it and run again") from None
    if not isinstance(value, dict) or value.pop("sha256", None) != checksum(value):
        raise DamagedFile(f"{path} is damaged (its checksum differs): delete it and run again")
    return value


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock file; wait for whoever holds it (calling `waiting` once). Freed when the process ends."""
    _touch(path)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if waiting:
                waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -------------------------------------------------------------------------------------------- a fingerprint of code

PACKAGE = __name__.partition(".")[0]
BESIDE = ("Team", "Torchrun", "team", "Stop", "Jobs")  # of `training`: these carry its numbers, too
LEFT_OUT = {f"{PACKAGE}.storage", *(f"{PACKAGE}.training.{name}" for name in BESIDE)}  # modules, and parts of them
PLAIN = (bool, int, float, complex, str, bytes, type(None))
VERSIONS = {"numpy": 1, "torch": 2, "scikit-learn": 2}  # how many numbers of a version count


def fingerprint(things: Iterable[Any], words: Iterable[str] = (), given: Iterable[str] = ()) -> str:
    """A hash of the code behind these functions and classes, and of the versions of what computes.

    `words` choose from registries; the defaults of parameters in `given` choose nothing: the config gives them a value.
    """
    asked = (tuple(things), frozenset(words), frozenset(given))
    if asked in _known:  # and no entry was registered anew since, nor has what code from outside refers to changed
        found, chosen, named, outside, _ = _known[asked]
        same = all(_entries(registry, named) == entries for registry, entries in chosen)
        if same and all(_state(thing) == state for thing, state in outside):
            return found
    code, registries, named, things = code_behind(*asked)
    versions = [f"{name} {'.'.join(version(name).split('.')[:n])}" for name, n in VERSIONS.items()]
    found = hashlib.sha256("\n".join([*sorted(code), *versions]).encode()).hexdigest()
    chosen = [(registry, _entries(registry, named)) for registry in registries]
    outside = [(t, _state(t)) for t in things if str(_bare(t).__module__).partition(".")[0] != PACKAGE]
    _known[asked] = found, chosen, named, outside, things  # which live on: no other gets the id of one
    return found


_known: dict[tuple, tuple[str, list[tuple[dict, dict]], set[str], list[tuple[Any, list]], set]] = {}


def code_behind(
    things: Iterable[Any], words: Iterable[str] = (), given: Iterable[str] = ()
) -> tuple[set[str], list[dict], set[str], set[Any]]:
    """The code of these functions and classes and of all that they refer to, piece by piece.

    Beside it the registries that were met, all words that choose from them, and the functions and classes.
    """
    named, left_out = {form for word in words for form in _forms(word)}, frozenset(given)
    pieces: set[str] = set()
    todo, seen, registries = list(things), set(), {}
    while todo:
        thing = todo.pop()
        if thing in seen:
            continue
        seen.add(thing)
        code, said = _read(_bare(thing)), []
        named |= {word for word, parameter in code.strings if parameter not in left_out}
        for name, value in code.references(thing):
            if isinstance(value, dict) and any(map(_is_code, value.values())) and not _code_in(value):
                registries[id(value)] = value
            elif _is_code(value) and _counts(value, thing):
                todo.append(value)
            elif said_of := in_words(value):
                said.append(f"{name} = {said_of}")
                todo += [part for part in (type(value), *_code_in(value)) if _counts(part, thing)]
                if isinstance(value, str) and name:  # a default has no name
                    named.add(value)
        pieces.add("\n".join([code.text, *said]))
        for name, entry in (item for registry in registries.values() for item in _named(registry, named).items()):
            pieces.add(f"{name}: {in_words(entry)}")
            todo.append(entry if _is_code(entry) else type(entry))
    return pieces, list(registries.values()), named, seen


def _named(registry: dict, words: set[str]) -> dict:
    return {name: entry for name, entry in registry.items() if name in words}


def _entries(registry: dict, words: set[str]) -> dict[str, tuple[int, str]]:
    """Those that are named, as they are now."""
    return {name: (id(entry), in_words(entry)) for name, entry in _named(registry, words).items()}


def _forms(word: str) -> set[str]:
    """A word of a config as registries may know it: clusters64 → clusters, folder:pets → folder."""
    return {word, word.partition(":")[0], word.rstrip("0123456789")}


def _bare(value: Any) -> Any:
    """A function without decorators and given arguments; anything else as it is."""
    while isinstance(value, partial | MethodType):
        value = value.func if isinstance(value, partial) else value.__func__
    return inspect.unwrap(value) if callable(value) else value


def _is_code(value: Any) -> bool:
    return isinstance(_bare(value), type | FunctionType)


def _code_in(value: Any) -> list[Any]:
    """Functions and classes in a list, tuple or set, or in a dict whose keys are no names."""
    if isinstance(value, dict):
        value = [] if all(isinstance(key, str) for key in value) else [*value.values()]
    parts = value if isinstance(value, list | tuple | set | frozenset) else []
    return [found for part in parts for found in ([part] if _is_code(part) else _code_in(part))]


def in_words(value: Any) -> str:
    """A value in words that are the same in every process, arrays by their bytes; empty where there are none."""
    import numpy
    import torch

    if isinstance(value, (*PLAIN, range, slice, Fraction, torch.dtype)):
        return repr(value)
    if isinstance(value, Enum):
        return f"{value} {in_words(value.value)}"
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta:
        return _digest({"": value.resolve_conj().resolve_neg()}, "")
    if isinstance(value, numpy.ndarray | numpy.generic) and not value.dtype.hasobject:
        return hashlib.sha256(f"{value.dtype}{value.shape}".encode() + value.tobytes()).hexdigest()
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name, None) for field in fields(value)}
    if isinstance(value, tuple | list | dict | set | frozenset):
        parts = [in_words(part) for part in (value.items() if isinstance(value, dict) else value)]
        return f"{type(value).__name__}({', '.join(sorted(parts) if isinstance(value, set | frozenset) else parts)})"
    return str(getattr(value, "__qualname__", ""))


def _functions(thing: Any) -> list[FunctionType]:
    """A function itself; those of a class, methods of all kinds, without what is wrapped around them."""
    parts = vars(thing).values() if isinstance(thing, type) else [thing]
    bare = [inspect.unwrap(getattr(part, "fget", part)) for part in parts]
    return [part for part in bare if isinstance(part, FunctionType) and _counts(part, thing)]


def _given(thing: Any) -> Iterator[tuple[Any, Any]]:
    """What it was given when it was made: arguments, defaults, what closures hold; a class its bases and attributes."""
    while isinstance(thing, partial):
        yield from [*enumerate(thing.args, 1), *thing.keywords.items()]
        thing = thing.func
    if isinstance(thing, type):
        yield from ((base.__name__, base) for base in thing.__bases__)
        yield from ((n, v) for n, v in vars(thing).items() if not (n.startswith("__") or hasattr(v, "__get__")))
    for part in _functions(thing):
        yield from ((0, default) for default in (*(part.__defaults__ or ()), *(part.__kwdefaults__ or {}).values()))
        for name, cell in zip(part.__code__.co_freevars, part.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # it holds nothing yet
                yield name, cell.cell_contents


def _state(thing: Any) -> list[tuple[Any, int, str]]:
    """What it refers to and was given, as it is now."""
    return [(name, id(value), in_words(value)) for name, value in _read(_bare(thing)).references(thing)]


def own_modules(*registries: dict) -> tuple[str, ...]:
    """Modules of one's own, scripts and notebooks apart, that entries of these registries come from."""
    found = {str(_bare(entry).__module__) for registry in registries for entry in registry.values()}
    return tuple(
        sorted(m for m in found if _is_own(m) and m.partition(".")[0] not in (PACKAGE, "__main__", "__mp_main__"))
    )


@cache
def _is_own(module: str | None) -> bool:
    """Whether a module is of this package or one's own: neither of the standard library nor of an installed package."""
    top = str(module).partition(".")[0]
    if top in (PACKAGE, "__main__", "__mp_main__"):
        return True
    with contextlib.suppress(ValueError):  # it came from no file
        where = str(importlib.util.find_spec(top))
        installed = top in sys.stdlib_module_names or "site-packages/" in where or "dist-packages/" in where
        return "/" in where and not installed
    return False


def _counts(value: Any, beside: Any) -> bool:
    """Whether it is code of one's own, or of the module from which it is referred to, and not left out."""
    code = _bare(value)
    ours = code.__module__ == _bare(beside).__module__ or _is_own(code.__module__)
    return ours and LEFT_OUT.isdisjoint((code.__module__, f"{code.__module__}.{code.__qualname__}"))


def source_of(module: str) -> str:
    """The source of a module that is imported, as it was when this was first asked: a file may change meanwhile."""
    loaded = sys.modules[module]
    how = getattr(loaded, "__spec__", None)  # another one where it was loaded anew
    found, its, source = _sources.get(module, (None, None, ""))
    if found is not loaded or its is not how:
        source = inspect.getsource(loaded)
        _sources[module] = loaded, how, source
    return source


_sources: dict[str, tuple[ModuleType, Any, str]] = {}


def keep_sources() -> None:
    """Read the sources of this package's modules now, before somebody changes a file of what has been imported."""
    for module in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        with contextlib.suppress(OSError, TypeError):
            source_of(module)


@dataclass(frozen=True)
class _Code:
    """What one function or class says."""

    text: str
    strings: tuple[tuple[str, str | None], ...]  # and the parameter that one is the default of
    names: tuple[tuple[str, ...], ...]  # ("a", "b") where it says a.b
    imports: tuple[tuple[str, str, str], ...]  # (as, module, name): those within the function
    module: str

    def references(self, thing: Any) -> Iterator[tuple[Any, Any]]:
        """What its names stand for now (globals, parts of modules of one's own, its imports), and what it was given."""
        space = dict(vars(sys.modules[self.module])) if self.module in sys.modules else {}
        for name, origin, part in self.imports:
            with contextlib.suppress(ImportError):  # tried within the function
                module = __import__(origin, fromlist=[part])
                whole = sys.modules[name] if name == origin.partition(".")[0] else module
                space[name] = getattr(module, part, None) if part else whole
        for first, *rest in self.names:
            value = space.get(first)
            for name in rest:
                if not isinstance(value, ModuleType) or not _is_own(value.__name__):
                    break
                first, value = name, getattr(value, name, None)
            if value is not None:
                yield first, value
        yield from _given(thing)


@cache
def _read(thing: Any) -> _Code:
    """The code of a function or class; of one whose source nobody has (typed in, say) its name alone."""
    tree = _tree_of(thing)
    default_of: dict[int, str] = {}
    compared, strings, names, imports = set(), [], set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            last = (node.posonlyargs + node.args)[-len(node.defaults) :] if node.defaults else []
            pairs = [*zip(last, node.defaults, strict=True), *zip(node.kwonlyargs, node.kw_defaults, strict=True)]
            default_of |= {id(default): argument.arg for argument, default in pairs}
        elif isinstance(node, ast.Compare):  # chooses nothing
            compared |= {id(part) for part in ast.walk(node)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.append(node)
        elif isinstance(node, ast.ImportFrom) and (node.level or _is_own(node.module)):
            package = getattr(sys.modules.get(thing.__module__), "__package__", None) or PACKAGE
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            imports += [(alias.asname or alias.name, origin, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in (alias for alias in node.names if _is_own(alias.name)):
                imports.append((alias.asname or alias.name.partition(".")[0], alias.name, ""))
        elif isinstance(node, ast.Name | ast.Attribute):
            names.add(_dotted(node))
    said = ast.unparse(tree)
    outer = _outer_names(symtable.symtable(said, "code", "exec")) | {name for name, *_ in imports}
    found: Any = tuple((node.value, default_of.get(id(node))) for node in strings if id(node) not in compared)
    return _Code(
        f"{thing.__qualname__}: {said}",
        found,
        tuple(sorted(n for n in names if n and n[0] in outer and not n[0].startswith("__"))),
        tuple(imports),
        thing.__module__,
    )


def _outer_names(table: symtable.SymbolTable) -> set[str]:
    """Names that code takes from its module: not those of its own variables and parameters."""
    top = table.get_type() == "module"
    found = {symbol.get_name() for symbol in table.get_symbols() if top or symbol.is_global()}
    return found.union(*map(_outer_names, table.get_children()))


def _dotted(node: Any) -> tuple[str, ...]:
    if isinstance(node, ast.Name):
        return (node.id,)
    before = _dotted(node.value) if isinstance(node, ast.Attribute) else ()
    return (*before, node.attr) if before else ()


@cache
def _definitions(source: str) -> dict[str, ast.AST]:
    """Functions and classes of a module by qualified name, bare."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.AST]]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield prefix + node.name, node
                yield from walk(node.body, f"{prefix}{node.name}.")

    return dict(walk(_Bare().visit(ast.parse(source)).body, ""))


def _tree_of(thing: Any) -> Any:
    with contextlib.suppress(OSError, TypeError, KeyError):
        return _definitions(source_of(thing.__module__))[thing.__qualname__]
    if getattr(thing, "__name__", "") == "<lambda>" and (found := _lambdas(thing)):
        return ast.Module([_Bare().visit(ast.Expr(node)) for node in found], [])
    with contextlib.suppress(OSError, TypeError, SyntaxError, tokenize.TokenError):
        return _Bare().visit(ast.parse(textwrap.dedent(inspect.getsource(thing))))
    if isinstance(thing, type):  # of a notebook, which keeps the sources of functions only
        parts, name = _functions(thing), thing.__qualname__
        for part in (part for part in parts if part.__qualname__.startswith(f"{name}.")):
            with contextlib.suppress(KeyError, SyntaxError):
                cell = "".join(linecache.getlines(part.__code__.co_filename))
                return _definitions(cell)[name.replace(".<locals>", "")]
        return ast.Module([_tree_of(part) for part in parts], [])
    return ast.parse("")


def _lambdas(thing: FunctionType) -> list[ast.Lambda]:
    """The lambdas that begin in the line where this one does."""
    code, source = thing.__code__, ""
    if code.co_filename == getattr(sys.modules.get(thing.__module__), "__file__", None):
        with contextlib.suppress(OSError, TypeError):
            source = source_of(thing.__module__)
    with contextlib.suppress(SyntaxError):
        nodes = ast.walk(ast.parse(source or "".join(linecache.getlines(code.co_filename))))
        return [node for node in nodes if isinstance(node, ast.Lambda) and node.lineno == code.co_firstlineno]
    return []


class _Bare(ast.NodeTransformer):
    """Code without docstrings and annotations."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        return self.visit_ClassDef(node)

    def visit_ClassDef(self, node):
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        if node.value is not None:
            return self.visit(ast.copy_location(ast.Assign([node.target], node.value), node))
        node.annotation = ast.Constant(None)
        return node
