"""The errors meant for users. The command line prints each of these as one line, without a traceback."""

import traceback
from pathlib import Path


class FastPPOError(Exception):
    """Base of the errors meant for users; the text says what was given, why it can't be used and what would work."""


class ConfigError(FastPPOError, ValueError):
    """A setting or combination of settings that can't be used."""


class EnvError(FastPPOError):
    """An environment that can't be made, fails, or contradicts its spaces or its autoreset mode."""


class EnvStartError(EnvError):
    """An environment that can't be made or fails in its first reset or step.

    The command line shows one line, as nothing is lost yet; `--debug` shows the traceback.
    """


class CheckpointError(FastPPOError):
    """A run folder or a saved model that can't be read, or can't be used here."""


class FinishedError(CheckpointError):
    """A run that is to be resumed is complete."""


class CaptureError(FastPPOError):
    """Work that can't be captured as a graph; the text says why and what to change."""


# What an environment's code may raise: sys.exit() in it is an error of its own and must not end the program silently
ENV_ERRORS = (Exception, SystemExit)


def cause_line(error: BaseException) -> str:
    """Return an error's class, the first line of its text, and the place in the code that raised it."""
    name, text = type(error).__name__, first_line(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{name if text == name else f'{name}: {text}'}{place}"


def kind_of(value: object) -> str:
    """Return what `value` is, with its article: "an int", "the class Network", "None"."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return with_article(type(value).__name__)


def with_article(name: str) -> str:
    """Return a noun with "a" or "an"."""
    return f"{'an' if name[:1] in 'aeioAEIO' else 'a'} {name}"


def innermost(error: BaseException) -> BaseException:
    """Return the error that a chain of errors began with, such as the one that a failed clean-up replaced."""
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = cause
    return error


def first_line(error: BaseException) -> str:
    """Return the first non-blank line of an error's text, or the name of its class if it has no text."""
    try:
        lines = str(error).splitlines()
    except Exception:  # a user's class whose __str__ fails
        lines = []
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)
