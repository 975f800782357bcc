"""Callbacks of stable-baselines3's scripts, called after each iteration of a trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from fastppo.errors import ConfigError, kind_of


class IterationLocals(dict[str, Any]):
    """The `locals` of a callback; a name that only a step of stable-baselines3 has is an error, also for `in`."""

    _OF_A_STEP = frozenset(
        {"dones", "infos", "rewards", "actions", "new_obs", "values", "log_probs", "clipped_actions"}
    )

    def __contains__(self, name: object) -> bool:
        """Return whether there is such a name.

        Raises:
            ConfigError: it belongs to a step.
        """
        if name in self._OF_A_STEP:
            self.__missing__(str(name))
        return super().__contains__(name)

    def __missing__(self, name: str) -> Any:  # noqa: ANN401 - never returns
        """Refuse a name that is missing.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"a callback reads locals[{name!r}]: callbacks are called after an iteration, when its steps are over, and "
            "locals hold self and total_timesteps; use the loop of fastppo.Trainer (docs/recipes.md)."
        )


class Hooks(Protocol):
    """A callback as `learn` calls it."""

    def start(self, model: Any, total_timesteps: int) -> None:  # noqa: ANN401 - an algorithm
        """Training begins, until the model has taken `total_timesteps`."""

    def rollout_start(self) -> None:
        """An iteration begins."""

    def step(self) -> bool:
        """One step of all environments was taken; False stops training after this iteration."""

    def rollout_end(self) -> bool:
        """An iteration is complete; False stops training."""

    def end(self) -> None:
        """Training has ended."""


class FunctionHooks:
    """A function of (locals, globals), called once per iteration; training stops where it returns False."""

    def __init__(self, function: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
        """Call `function`."""
        self._function, self._locals = function, dict[str, Any]()

    def start(self, model: Any, total_timesteps: int) -> None:  # noqa: ANN401 - an algorithm
        """Keep what the function finds in its locals."""
        self._locals = IterationLocals({"self": model, "total_timesteps": total_timesteps})

    def rollout_start(self) -> None:
        """Do nothing."""

    def step(self) -> bool:
        """Do nothing."""
        return True

    def rollout_end(self) -> bool:
        """Call the function."""
        return self._function(self._locals, {}) is not False

    def end(self) -> None:
        """Do nothing."""


class ObjectHooks:
    """An object with the methods of stable-baselines3's BaseCallback; those that it lacks aren't called.

    Its `locals` hold the model, as "self", and "total_timesteps": an iteration's steps are over when it is called.
    """

    def __init__(self, callback: Any) -> None:  # noqa: ANN401 - an object with on_step
        """Call the methods of `callback`."""
        self._callback = callback

    def start(self, model: Any, total_timesteps: int) -> None:  # noqa: ANN401 - an algorithm
        """Call `init_callback` and `on_training_start`."""
        self._call("init_callback", model)
        self._call("on_training_start", IterationLocals({"self": model, "total_timesteps": total_timesteps}), {})

    def rollout_start(self) -> None:
        """Call `on_rollout_start`."""
        self._call("on_rollout_start")

    def step(self) -> bool:
        """Call `on_step`."""
        return self._call("on_step") is not False

    def rollout_end(self) -> bool:
        """Call `on_rollout_end`, whose answer doesn't count."""
        self._call("on_rollout_end")
        return True

    def end(self) -> None:
        """Call `on_training_end`."""
        self._call("on_training_end")

    def _call(self, name: str, *arguments: Any) -> Any:  # noqa: ANN401 - whatever the method takes and returns
        method = getattr(self._callback, name, None)
        return None if method is None else method(*arguments)


def hooks_of(callback: Any) -> list[Hooks]:  # noqa: ANN401 - what a script gives
    """Return the hooks of a callback: None, a function, an object with `on_step`, or a list of these.

    Raises:
        ConfigError: it is something else.
    """
    if callback is None:
        return []
    if isinstance(callback, (list, tuple)):
        return [hooks for each in callback for hooks in hooks_of(each)]
    if isinstance(callback, type):
        raise ConfigError(f"callback is the class {callback.__name__}; give an object of it: {callback.__name__}(...).")
    if hasattr(callback, "on_step"):
        return [ObjectHooks(callback)]
    if callable(callback):
        return [FunctionHooks(callback)]
    raise ConfigError(
        f"callback is {kind_of(callback)}; give a function of (locals, globals), an object with on_step, or a "
        "list of these."
    )


class Logger:
    """The `logger` of an algorithm: figures that callbacks record go to the run's TensorBoard files.

    Attributes:
        name_to_value: the last value of each tag.
    """

    def __init__(self) -> None:
        """Start with no figures."""
        self.name_to_value: dict[str, float] = {}
        self._pending: dict[str, float] = {}

    def record(self, key: str, value: Any, exclude: str | tuple[str, ...] | None = None) -> None:  # noqa: ANN401
        """Record a number, which is written at the end of the iteration.

        Raises:
            ConfigError: the value is no number.
        """
        try:
            self.name_to_value[key] = number = float(value)
        except (TypeError, ValueError):
            raise ConfigError(
                f"logger.record({key!r}): fastppo logs numbers, not {kind_of(value)}; write it by "
                "torch.utils.tensorboard yourself."
            ) from None
        if exclude is None or "tensorboard" not in exclude:
            self._pending[key] = number

    def dump(self, step: int = 0) -> None:
        """Do nothing: figures are written at the end of each iteration."""

    def write(self, log: Callable[[str, float], None]) -> None:
        """Pass what was recorded since the last call to `log`; as callback/KEY where fastppo has the group."""
        for key, number in self._pending.items():
            try:
                log(key, number)
            except ValueError:
                log(f"callback/{key}", number)
        self._pending = {}
