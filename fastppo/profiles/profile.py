"""What a profile is: the keywords of another program, each with its translation, and parts that several share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

Kind = Literal["discrete", "image", "continuous"]
ProfileName = Literal["cleanrl", "tuned", "tuned_penalty", "sb3", "ppo1", "ppo2", "rsl_rl"]

NO_LIMIT = 1e9  # of the gradient's norm, for programs that don't clip it


@dataclasses.dataclass(frozen=True)
class Keyword:
    """A keyword of another program, or a fact of its code.

    Attributes:
        name: its name there.
        default: its value there.
        text: its meaning, and where that differs from the setting's.
        translate: a value there -> settings here; None: no setting of a run stands for it. `minibatch_size`, the rows
            of a minibatch, is no setting, but determines n_minibatches.
    """

    name: str
    default: Any
    text: str
    translate: Callable[[Any], dict[str, Any]] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that stand for the default."""
        return {} if self.translate is None else self.translate(self.default)


@dataclasses.dataclass(frozen=True)
class Profile:
    """The defaults of another program, as settings.

    Attributes:
        program: name and version.
        source: file that holds the keywords and their defaults.
        keywords: the keywords of its constructor or script.
        facts: what its code does without a keyword for it.
        facts_source: file that holds the facts.
        differs: what no setting reproduces.
    """

    program: str
    source: str
    keywords: tuple[Keyword, ...]
    facts: tuple[Keyword, ...] = ()
    facts_source: str = ""
    differs: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting of the profile, and `minibatch_size` if it counts rows."""
        return {name: value for entry in (*self.facts, *self.keywords) for name, value in entry.settings.items()}

    def translate(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings for some of the program's keywords, over the profile's own.

        Raises:
            KeyError: there is no such keyword, or it stands for no setting.
        """
        settings = self.settings
        functions = {keyword.name: keyword.translate for keyword in self.keywords if keyword.translate is not None}
        for name, value in given.items():
            settings |= functions[name](value)
        return settings


def same(name: str, default: Any, text: str, setting: str = "") -> Keyword:  # noqa: ANN401 - any value
    """Return a keyword that means what a setting does."""
    return Keyword(name, default, text, lambda value: {setting or name: value})


def fact(name: str, value: Any, text: str, **settings: Any) -> Keyword:  # noqa: ANN401 - any value
    """Return what the code does without a keyword for it, as settings."""
    return Keyword(name, value, text, lambda _: settings)


def doubled(value: Any) -> Any:  # noqa: ANN401 - a number; text is refused by the setting
    """Return the weight of a value loss 0.5 x MSE that equals this weight of a value loss MSE."""
    return 2 * value if isinstance(value, (int, float)) else value


def learning_rate(value: Any) -> dict[str, Any]:  # noqa: ANN401 - number or function
    """Return the settings of a learning rate that nothing else anneals."""
    return {"learning_rate": value, "anneal_lr": False}


def clip_range(value: Any) -> dict[str, Any]:  # noqa: ANN401 - number or function
    """Return the settings of a clip range that nothing else anneals."""
    return {"clip_coef": value, "anneal_clip": False}


NETWORK: dict[str, Any] = {
    "hidden_sizes": (64, 64),
    "activation": "tanh",
    "shared_trunk": False,
    "action_distribution": "gaussian",
    "state_dependent_std": False,
    "memory": "none",
}
NO_NORMALISATION = fact(
    "normalisation",
    "none",
    "Observations and rewards are used as the environment gives them; VecNormalize is a wrapper of its own.",
    normalize_obs=False,
    normalize_rewards=False,
)
TIME_LIMIT = "At a time limit it counts the episode as ended; fastppo adds V of the last observation."
RUN = (
    Keyword("policy", "required", "Class or name of the policy; here network, hidden_sizes, activation and memory."),
    Keyword("env", "required", "Environment or its id; here env_id, or make_env in Python."),
)
