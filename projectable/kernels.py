"""Kernels of notebooks as forks of this process, which has imported what each would need seconds for.

A kernel that starts anew imports torch, pandas, scikit-learn and others for seconds; a fork has them. The package
itself is left out: a kernel imports it as it lies on the disk when the notebook begins, like one that starts anew.

Where a process can't part so (elsewhere than on Linux; where there is a GPU, whose driver does not survive it) kernels
start anew.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import importlib
import os
import signal
import sys
import threading
from functools import cache
from importlib.metadata import EntryPoint
from typing import Any

from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

from .storage import end_with_parent

SHARED = ("pandas", "seaborn", "sklearn.cluster", "scipy.stats", "PIL.Image", "ipykernel.kernelapp")
INLINE = "module://matplotlib_inline.backend_inline"  # figures become output, as in any kernel


@cache
def share() -> bool:
    """Import what kernels need, and have them be forks from now on; says whether this process may part so.

    Only one may that has a single thread yet: of others, locks and pools of threads would stay behind.
    """
    if sys.platform != "linux" or len(os.listdir("/proc/self/task")) > 1:
        return False
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there; kernels that start anew have it, too
    import torch

    if torch.cuda.is_available():
        return False
    for name in SHARED:
        importlib.import_module(name)
    factory = KernelProvisionerFactory.instance()
    factory.default_provisioner_name = "fork"
    factory.provisioners["fork"] = EntryPoint("fork", f"{__name__}:{Forked.__name__}", factory.GROUP_NAME)
    return True


class Forked(LocalProvisioner):
    """Launches a kernel by a fork."""

    process: Any

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        """Start it; `cmd` as for a new Python: `python … ipykernel_launcher` and words for the kernel."""
        words = cmd[cmd.index("ipykernel_launcher") + 1 :]
        self.process = _Child(words, kwargs["env"], kwargs.get("cwd") or os.getcwd())
        self.pid = self.pgid = self.process.pid
        return self.connection_info


class _Child:
    """A forked process, seen as a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, words: list[str], env: dict[str, str], cwd: str):
        self.returncode: int | None = None
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                code = _be_a_kernel(words, env | {"JPY_PARENT_PID": str(parent)}, cwd)
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        return self._ended(os.WNOHANG)

    def wait(self) -> int | None:
        return self._ended(0)

    def _ended(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _be_a_kernel(words: list[str], env: dict[str, str], cwd: str) -> int:
    """In the child: put away what is the parent's, then be a kernel until it is told to end; its exit status."""
    end_with_parent()
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # what the parent left behind is never put away here
    nowhere = os.open(os.devnull, os.O_RDWR)
    for inherited in os.listdir("/proc/self/fd"):  # its pipes and sockets: else nobody hears that it has gone
        if inherited not in ("1", "2", str(nowhere)):
            os.dup2(nowhere, int(inherited))  # not closed: whoever still holds that number may close it
    asyncio._set_running_loop(None)
    asyncio.set_event_loop(asyncio.new_event_loop())
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for name in [name for name in sys.modules if name.partition(".")[0] == "projectable"]:
        del sys.modules[name]
    sys.argv = ["ipykernel_launcher", *words]
    sys.modules["matplotlib"].rcParams["backend"] = env.get("MPLBACKEND", INLINE)
    from ipykernel.kernelapp import launch_new_instance

    try:
        launch_new_instance(words)
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # as at an interpreter's end: pools of workers are ended by this
        atexit._run_exitfuncs()
