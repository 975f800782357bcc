"""What can go wrong, as types: the command line prints each of these as one line, without a traceback."""


class FastPPOError(Exception):
    """The base of every error that is meant for the user; its text says what, why and what to do."""


class ConfigError(FastPPOError, ValueError):
    """A setting, or a combination of settings, that can't be used."""


class EnvError(FastPPOError):
    """An environment that can't be made, or that breaks what its spaces and its autoreset mode promise."""


class CheckpointError(FastPPOError):
    """A run folder or a saved model that can't be read, or can't be used here."""


class FinishedError(CheckpointError):
    """A run that is asked to go on has nothing left to do."""


class CaptureError(FastPPOError):
    """Work that can't be recorded as a graph; the text says why and what to change."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that is not blank, or the name of its class if it has no text."""
    try:
        lines = str(error).splitlines()
    except Exception:  # a class of the user's may fail to describe itself
        lines = []
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)
