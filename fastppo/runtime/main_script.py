"""Worker processes import the script that starts them, as multiprocessing demands: what goes wrong, and its message."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Iterator

REIMPORTED = 86  # exit status of a worker that starts a trainer while it imports the script
REIMPORTED_TEXT = (
    "worker processes import your script, which starts a trainer as it is imported; "
    "put that part under `if __name__ == '__main__':`, or use vectorization=sync."
)


def exit_if_reimported() -> None:
    """End this process if it is a worker that is still importing the main script; the trainer prints the reason."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(REIMPORTED)


@contextlib.contextmanager
def importable_main() -> Iterator[None]:
    """Hide the main script from processes started within if there is no such file (`python - < train.py`).

    Workers would fail to import it. They can do without: cloudpickle sends functions and classes of it by value.
    """
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path is None or os.path.exists(path):
        yield
        return
    del main.__file__
    try:
        yield
    finally:
        main.__file__ = path
