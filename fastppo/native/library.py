"""Compile C sources with the machine's compiler and load them.

A library is compiled once for each source, compiler and processor, and kept in the user's cache folder under a hash of
these. A file there that was cut short or changed is found by its own hash and compiled again. Where there is no
compiler, or it fails, `load` says why, and callers go on without.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

_SOURCES = Path(__file__).parent
# products and sums may be fused, but NaN and infinity keep their meaning
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_MOST_KEPT = 20
_TIME_LIMIT = 60.0  # seconds
_ABANDONED = 600.0  # seconds after which the unfinished file of a compiler that was killed is deleted


class NativeError(Exception):
    """C that can't be compiled or loaded here; the text says why."""


def cache_folder() -> Path | None:
    """Return the folder of compiled libraries; None where there is no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastppo" / "native"
    except RuntimeError:  # a user without a home, in a container
        return None


def kept_libraries() -> list[Path]:
    """Return the compiled libraries in the cache folder, the latest used first."""
    folder, used = cache_folder(), dict[Path, float]()
    with contextlib.suppress(OSError):
        for path in [] if folder is None else folder.glob("*.so"):
            with contextlib.suppress(OSError):  # a link to nowhere, or deleted by another process
                used[path] = path.stat().st_mtime
    return sorted(used, key=used.__getitem__, reverse=True)


def clear_cache() -> int:
    """Delete the compiled libraries in the cache folder, and return how many there were."""
    libraries = kept_libraries()
    for path in libraries:
        path.unlink(missing_ok=True)
    return len(libraries)


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """Return the library of `name`.c, compiled if need be.

    Raises:
        NativeError: no compiler, one that fails or takes over a minute, or no folder to write to.
    """
    command = _compiler()
    source = _SOURCES / f"{name}.c"
    key = hashlib.sha256()
    for part in (source, *sorted(_SOURCES.glob("*.h"))):
        key.update(part.read_bytes())
    programs = [_version(found) for word in command if (found := shutil.which(word))]  # ccache, and what it calls
    key.update("\0".join((*command, *_FLAGS, *programs, platform.machine(), _processor())).encode())
    try:
        folder = cache_folder()
        if folder is not None:
            with contextlib.suppress(OSError):  # a home that can't be written
                folder.mkdir(parents=True, exist_ok=True)
                return _load_from(folder, source, key.hexdigest()[:16], command)
        with tempfile.TemporaryDirectory(prefix="fastppo-") as temporary:
            return _load_from(Path(temporary), source, key.hexdigest()[:16], command)
    except OSError as error:
        raise NativeError(f"{name}.c could not be compiled or loaded ({error.strerror or error})") from None


def sources_hash() -> str:
    """Return 8 hexadecimal digits of the hash of all sources: other code may round differently."""
    sources = sorted((*_SOURCES.glob("*.c"), *_SOURCES.glob("*.h")))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]


def _compiler() -> list[str]:
    """Return the compiler and its options, as CC names them.

    Raises:
        NativeError: there is no such program.
    """
    given = os.environ.get("CC", "")
    try:
        words = shlex.split(given) or ["cc"]
    except ValueError as error:
        raise NativeError(f"CC={given} can't be read ({error}); name a compiler, such as gcc") from None
    found = shutil.which(words[0])
    if found is None:
        raise NativeError(f"there is no C compiler ({words[0]}); install gcc or clang, or set CC")
    return [found, *words[1:]]


def _load_from(folder: Path, source: Path, key: str, command: list[str]) -> ctypes.CDLL:
    """Load the library of `source` from `folder`, where it is built if it is missing or damaged."""
    # the hash of the content is in the file's name: loading a file that was cut short would end the program
    for path in folder.glob(f"{source.stem}-{key}-*.so"):
        if path.stem.rpartition("-")[2] == _content_hash(path):
            with contextlib.suppress(OSError):
                os.utime(path)  # the latest used are kept
            return ctypes.CDLL(str(path))
        path.unlink(missing_ok=True)
    return ctypes.CDLL(str(_build(command, source, folder, key)))


def _build(compiler: list[str], source: Path, folder: Path, key: str) -> Path:
    """Compile `source` into a temporary file of `folder`, and rename it."""
    handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=folder)
    os.close(handle)
    built = Path(temporary)
    try:
        command = [*compiler, *_FLAGS, "-shared", "-fPIC", "-o", temporary, str(source), "-lpthread", "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIME_LIMIT, check=False)
        if done.returncode:
            why = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
            raise NativeError(f"{compiler[0]} could not compile {source.name}: {why}")
        path = folder / f"{source.stem}-{key}-{_content_hash(built)}.so"
        built.replace(path)
    except subprocess.TimeoutExpired:
        raise NativeError(f"{compiler[0]} took over {_TIME_LIMIT:.0f} s to compile {source.name}") from None
    finally:
        built.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        for old in (*kept_libraries()[_MOST_KEPT:], *_abandoned(folder)):
            old.unlink()
    return path


def _abandoned(folder: Path) -> list[Path]:
    """Return the unfinished files of compilers that were killed."""
    return [path for path in folder.glob("*.tmp") if time.time() - path.stat().st_mtime > _ABANDONED]


def _content_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _version(compiler: str) -> str:
    """Return what identifies a compiler: its real path, size and time of change."""
    real = Path(compiler).resolve()
    status = real.stat()
    return f"{real} {status.st_size} {status.st_mtime_ns}"


def _processor() -> str:
    """Return the features of the processor, which -march=native compiles for."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()
