"""Run a function in a forked process of its own, so that a crash, a hang or a spoilt GPU ends with it.

A fork has what its parent has imported, so the seconds of importing torch are spent once. The parent must not
initialise CUDA, not even by torch.cuda.is_available(): its children could not use a GPU then.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

_SHOWN = 4000  # characters of what a process printed


class ForkedProcess:
    """A function that runs in a forked process, with a time limit.

    Attributes:
        ended: whether the process has ended; `poll` finds out.
        failure: why it ended early; None: it did not, or it runs.
        seconds: it took.
    """

    def __init__(self, work: Callable[[Callable[[Any], None]], None], limit: float) -> None:
        """Fork, and call `work(send)` there; `send` takes JSON values for `messages`.

        Args:
            work: may raise, crash, or never end.
            limit: seconds until the process is killed, with all that it started.
        """
        self.ended, self.failure, self.seconds = False, None, 0.0
        self._limit, self._begun, self._read = limit, time.monotonic(), 0
        # files, not pipes: nothing blocks. Opened to append, as both processes share the position
        self._messages, self._printed = (tempfile.TemporaryFile("a+b") for _ in range(2))  # noqa: SIM115
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():  # libraries have threads; they take care of a fork themselves
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            self._run(work)

    def _run(self, work: Callable[[Callable[[Any], None]], None]) -> None:
        """Run the work in the child process, then exit."""
        status = 1
        try:
            os.setsid()
            for stream in (1, 2):
                os.dup2(self._printed.fileno(), stream)
            sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
            work(lambda message: os.write(self._messages.fileno(), json.dumps(message, default=str).encode() + b"\n"))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def poll(self) -> bool:
        """Return whether the process has ended; kill it if its time is over."""
        if self.ended:
            return True
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        self.seconds = time.monotonic() - self._begun
        if pid == 0 and self.seconds <= self._limit:
            return False
        if pid == 0:
            self.kill()
            self.failure = f"killed after {self._limit:.0f} s"
            return True
        code = os.waitstatus_to_exitcode(status)
        if code:
            self.failure = f"died by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        self._kill_group()
        self.ended = True
        return True

    def kill(self) -> None:
        """End the process, and all that it started."""
        if not self.ended:
            self._kill_group()
            with contextlib.suppress(ProcessLookupError):  # it had no group of its own yet
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self.ended = True

    def messages(self) -> list[Any]:
        """Return what the process has sent since the last call."""
        size = os.fstat(self._messages.fileno()).st_size
        lines, mark, _ = os.pread(self._messages.fileno(), size - self._read, self._read).rpartition(b"\n")
        self._read += len(lines) + len(mark)
        return [json.loads(line) for line in lines.splitlines()]

    @property
    def printed(self) -> str:
        """The end of what the process has printed."""
        size = os.fstat(self._printed.fileno()).st_size
        text = os.pread(self._printed.fileno(), _SHOWN, max(0, size - _SHOWN)).decode(errors="replace")
        return text.strip()

    def close(self) -> None:
        """End the process, and forget what it has sent and printed."""
        self.kill()
        self._messages.close()
        self._printed.close()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
