"""Runs the export of a version as a child process, so that this one never holds torch.

The child attaches model.onnx and its parity to the version; its exit status says whether the model may be
trusted, may not, or could not be judged now; the last line of its stderr says why. It runs at low priority, with
few threads, and dies with us, however we die.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from services.core.errors import ExportError
from services.core.logs import logger

DEFAULT_COMMAND = (sys.executable, "-m", "trainer.export")
NICENESS = 10
_PR_SET_PDEATHSIG = 1
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_KEPT_LINES = 20


class ExportDelayedError(ExportError):
    """The child could not judge the model now, or not in time: another try may."""


class ExportKilledError(ExportDelayedError):
    """The child was ended by a signal from outside, which says nothing about the model."""


class Exporter:
    """Exports versions of one model, one at a time."""

    def __init__(
        self,
        command: Sequence[str] = DEFAULT_COMMAND,
        *,
        registry_dir: Path,
        name: str,
        store_dir: Path,
        timeout_s: float,
        threads: int,
        int8: bool = True,
    ) -> None:
        self._command = tuple(command)
        self._registry_dir = registry_dir
        self._name = name
        self._store_dir = store_dir
        self._timeout_s = timeout_s
        self._options = () if int8 else ("--no-int8",)
        self._environment = os.environ | dict.fromkeys(_THREAD_VARIABLES, str(threads))

    async def export(self, version: int) -> None:
        """Export one version; cancelled, it kills the child.

        Raises ExportError with the child's last words if the model is bad; ExportDelayedError if that is unknown
        for now: exit status 75 (EX_TEMPFAIL of sysexits.h), or too long a time; ExportKilledError.
        """
        child = await asyncio.create_subprocess_exec(
            *self._command,
            *("--registry-dir", str(self._registry_dir)),
            *("--name", self._name),
            *("--version", str(version)),
            *("--store-dir", str(self._store_dir)),
            *self._options,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment,
            start_new_session=True,  # a Ctrl-C is for us; we end the child ourselves
            preexec_fn=_die_with_parent(),
        )
        _yield_to_others(child.pid)
        lines: deque[str] = deque(maxlen=_KEPT_LINES)
        try:
            async with asyncio.timeout(self._timeout_s):
                assert child.stderr is not None
                await _read_lines(child.stderr, lines)
                status = await child.wait()
        except TimeoutError:
            raise ExportDelayedError(
                f"export of version {version} took longer than {self._timeout_s:g} s",
                remedy="raise ECHOSIGHT_EXPORT_TIMEOUT_S",
            ) from None
        finally:
            await _kill(child)
        if status < 0:
            name = signal.Signals(-status).name
            raise ExportKilledError(
                f"export of version {version} was ended by {name}", remedy="look for who did it"
            )
        if status > 0:
            logger("api").warning("export failed", version=version, status=status, stderr="\n".join(lines))
            last = lines[-1] if lines else f"exit status {status} and no word"
            raise (ExportDelayedError if status == os.EX_TEMPFAIL else ExportError)(last[:500])


def _yield_to_others(pid: int) -> None:
    """Low priority, and the same for its session: Linux's autogroup lets nice count within a session only."""
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, pid, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(NICENESS))


def _die_with_parent() -> Callable[[], None]:
    """Ask the kernel to SIGKILL the child when we are killed: nobody else would end it."""
    libc = ctypes.CDLL(None)

    def in_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return in_child


async def _read_lines(stream: asyncio.StreamReader, lines: deque[str]) -> None:
    """All lines that hold something, until the child closes its end. Its longest are cut."""
    rest = b""
    while chunk := await stream.read(8192):
        *whole, rest = (rest + chunk).split(b"\n")
        lines.extend(text for line in whole if (text := line.decode(errors="replace").strip()))
        rest = rest[-8192:]
    if rest.strip():
        lines.append(rest.decode(errors="replace").strip())


async def _kill(child: asyncio.subprocess.Process) -> None:
    """End the child and all that it started, and collect it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    await child.wait()
