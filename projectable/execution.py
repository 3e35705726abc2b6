"""One notebook: read it, check its parameters, run it in a fresh kernel.

Notable: papermill only warns about an unknown parameter, here it is an error; the kernel is that of this very
Python, reached over IPC; what the notebook prints is passed on, progress bars a state now and then.
"""

import ast
import os
import re
import sys
import tempfile
import time
from pathlib import Path


class ReportError(Exception):
    """A mistake that one line explains: an unknown name, a notebook that can't be run, a folder in use."""


def read_notebook(path: Path):
    """The notebook as nbformat's object."""
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises many kinds
        raise ReportError(f"{path.name} is not readable as a notebook: {error}") from error


def notebook_title(path: Path) -> str:
    """The first heading, or the file's name."""
    for cell in read_notebook(path).cells:
        heading = re.search(r"^# +(.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else None
        if heading:
            return heading[1].strip()
    return path.stem


def check_parameters(path: Path, parameters: dict) -> None:
    """An error for a parameter that the notebook does not have: papermill would only warn."""
    cells = [c for c in read_notebook(path).cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ReportError(f"{path.name}: needs exactly one cell tagged `parameters`, has {len(cells)}")
    assigned = []
    for node in ast.parse(cells[0].source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        assigned += [target.id for target in targets if isinstance(target, ast.Name)]
    unknown = [name for name in parameters if name not in assigned]
    if unknown:
        raise ReportError(f"{path.name}: unknown parameter {', '.join(unknown)}; allowed: {', '.join(assigned)}")


class _Echo:
    """A notebook's output on the terminal: whole lines as they come, a progress bar's states now and then."""

    def __init__(self, every: float = 15.0):
        self.every, self.last = every, time.monotonic()

    def write(self, text: str) -> None:
        for piece in re.split(r"(?<=\n)|(?=\r)", text):
            line, whole = piece.strip(), piece.endswith("\n")
            if not line:
                continue
            if sys.stdout.isatty():
                print(f"\r\033[K      {line[:110]}", end="\n" if whole else "", flush=True)
            elif whole or time.monotonic() - self.last > self.every:
                self.last = time.monotonic()
                print(f"      {line}", flush=True)

    def flush(self) -> None:
        pass


def execute(path: Path, executed: Path, parameters: dict) -> None:
    """Run a notebook and write it to `executed`, with its outputs; raises what the notebook raised."""
    import papermill
    from traitlets.config import Config

    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a debugger's warning on every start
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the kernel computes little itself: runs go side by side in workers
    executed.parent.mkdir(parents=True, exist_ok=True)
    echo = _Echo()
    with tempfile.TemporaryDirectory(prefix="kernel-") as sockets:
        papermill.execute_notebook(
            path,
            executed,
            parameters,
            kernel_name="python3",
            language="python",
            cwd=path.parent,
            progress_bar=False,
            stdout_file=echo,
            stderr_file=echo,
            start_timeout=180,
            config=Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/k"}),
        )


def error_message(error: Exception) -> str:
    """`name: message` of what went wrong in the notebook, without colours."""
    name, message = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
    return re.sub(r"\x1b\[[0-9;]*m", "", f"{name}: {message}")
