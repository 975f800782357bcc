"""Environments as stable-baselines3's scripts see them, and those of stable-baselines3 as fastppo trains on them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

from fastppo.compat.keywords import whole_number
from fastppo.envs.factory import EnvFactory, build
from fastppo.envs.make_envs import Maker
from fastppo.errors import ConfigError, kind_of
from fastppo.spaces.packing import MASK_KEY

_Array = np.ndarray[Any, Any]
_Indices = int | Iterable[int] | None


class VecEnv:
    """Environments in this process, with the interface of stable-baselines3's VecEnv.

    `step` returns four arrays or lists: observations, rewards, dones, infos. An environment whose episode ends is reset
    in the same step; its last observation is then `infos[i]["terminal_observation"]`, and
    `infos[i]["TimeLimit.truncated"]` says whether the episode was only cut.

    Attributes:
        envs: the environments.
        maker: makes another one; None: these are all there are.
    """

    def __init__(self, envs: Sequence[gym.Env[Any, Any]], maker: Maker | None = None) -> None:
        """Step `envs` together."""
        self.envs, self.maker = list(envs), maker
        self.num_envs = len(self.envs)
        self.observation_space, self.action_space = self.envs[0].observation_space, self.envs[0].action_space
        self.render_mode, self.metadata = self.envs[0].render_mode, self.envs[0].metadata
        self.reset_infos: list[dict[str, Any]] = [{} for _ in self.envs]
        self._seeds: list[int | None] = [None] * self.num_envs
        self._actions: Any = None
        register()

    @property
    def unwrapped(self) -> VecEnv:
        """Itself; it wraps no other."""
        return self

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed environment i by seed + i at the next reset."""
        self._seeds = [None if seed is None else seed + i for i in range(self.num_envs)]
        return self._seeds

    def reset(self) -> Any:  # noqa: ANN401 - a tree of arrays
        """Reset every environment and return the observations [N, ...]."""
        found = [env.reset(seed=seed) for env, seed in zip(self.envs, self._seeds, strict=True)]
        self._seeds = [None] * self.num_envs
        self.reset_infos = [info for _, info in found]
        return self._stack([obs for obs, _ in found])

    def step_async(self, actions: Any) -> None:  # noqa: ANN401 - array-like
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Any, _Array, _Array, list[dict[str, Any]]]:
        """Step every environment; see the class."""
        observations, infos = [], []
        rewards, dones = np.zeros(self.num_envs, np.float32), np.zeros(self.num_envs, bool)
        for i, (env, action) in enumerate(zip(self.envs, self._actions, strict=True)):
            obs, reward, terminated, truncated, info = env.step(action)
            rewards[i], dones[i] = reward, terminated or truncated
            info = {**info, "TimeLimit.truncated": bool(truncated and not terminated)}
            if dones[i]:
                info["terminal_observation"] = obs
                obs, self.reset_infos[i] = env.reset()
            observations.append(obs)
            infos.append(info)
        return self._stack(observations), rewards, dones, infos

    def step(self, actions: Any) -> tuple[Any, _Array, _Array, list[dict[str, Any]]]:  # noqa: ANN401 - array-like
        """Step every environment; see the class."""
        self.step_async(actions)
        return self.step_wait()

    def has_attr(self, name: str) -> bool:
        """Whether every environment, or a wrapper of it, has the attribute."""
        return all(env.has_wrapper_attr(name) for env in self.envs)

    def get_attr(self, name: str, indices: _Indices = None) -> list[Any]:
        """Return the attribute of each environment."""
        return [env.get_wrapper_attr(name) for env in self._chosen(indices)]

    def set_attr(self, name: str, value: Any, indices: _Indices = None) -> None:  # noqa: ANN401 - any value
        """Set the attribute in each environment."""
        for env in self._chosen(indices):
            env.set_wrapper_attr(name, value)

    def env_method(self, name: str, *args: Any, indices: _Indices = None, **kwargs: Any) -> list[Any]:  # noqa: ANN401
        """Call the method of each environment and return the results."""
        return [env.get_wrapper_attr(name)(*args, **kwargs) for env in self._chosen(indices)]

    def env_is_wrapped(self, wrapper_class: type[Any], indices: _Indices = None) -> list[bool]:
        """Whether each environment is wrapped by a wrapper of this class."""
        return [any(isinstance(layer, wrapper_class) for layer in _layers(env)) for env in self._chosen(indices)]

    def get_images(self) -> list[Any]:
        """Render every environment."""
        return [env.render() for env in self.envs]

    def render(self, mode: str | None = None) -> Any:  # noqa: ANN401 - an image or nothing
        """Render the first environment, in the mode that it was made with."""
        return self.envs[0].render()

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs:
            env.close()

    def _chosen(self, indices: _Indices) -> list[gym.Env[Any, Any]]:
        chosen = range(self.num_envs) if indices is None else [indices] if isinstance(indices, int) else indices
        return [self.envs[i] for i in chosen]

    def _stack(self, observations: list[Any]) -> Any:  # noqa: ANN401 - a tree of arrays
        out: Any = create_empty_array(self.observation_space, self.num_envs)
        return concatenate(self.observation_space, observations, out)


class TrainingEnv(VectorEnv[Any, Any, Any]):
    """A VecEnv, ours or stable-baselines3's, as a Gymnasium vector environment that fastppo trains on.

    It leaves the VecEnv open when training ends, because that belongs to the script.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 - as in Gymnasium

    def __init__(self, venv: Any) -> None:  # noqa: ANN401 - a VecEnv of either program
        """Train on `venv`."""
        self.venv, self.num_envs = venv, venv.num_envs
        self.single_observation_space, self.single_action_space = venv.observation_space, venv.action_space
        self.observation_space = batch_space(venv.observation_space, self.num_envs)
        self.action_space = batch_space(venv.action_space, self.num_envs)
        with contextlib.suppress(AttributeError):
            spec = venv.get_attr("spec")[0]
            self.spec = spec if isinstance(spec, EnvSpec) else None
        self._masked = venv.has_attr("action_masks")

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:  # noqa: ANN401
        """Reset all; `seed` is one for all, or the first of a list."""
        if seed is not None:
            self.venv.seed(int(np.asarray(seed).reshape(-1)[0]))
        return self.venv.reset(), self._masks()

    def step(self, actions: Any) -> tuple[Any, _Array, _Array, _Array, dict[str, Any]]:  # noqa: ANN401 - an array
        """Step all, as same-step autoreset does."""
        obs, rewards, dones, infos = self.venv.step(actions)
        dones = np.asarray(dones, bool)
        cut = np.array([bool(info.get("TimeLimit.truncated", False)) for info in infos]) & dones
        info = self._masks()
        if dones.any():
            final = np.full(self.num_envs, None, object)
            for i in np.flatnonzero(dones):
                final[i] = infos[i]["terminal_observation"]
            info |= {"final_obs": final, "_final_obs": dones}
        return obs, np.asarray(rewards, np.float64), dones & ~cut, cut, info

    def close(self, **_: Any) -> None:  # noqa: ANN401 - as VectorEnv's
        """Do nothing."""

    def _masks(self) -> dict[str, Any]:
        if not self._masked:
            return {}
        return {MASK_KEY: np.stack(self.venv.env_method("action_masks")), f"_{MASK_KEY}": np.ones(self.num_envs, bool)}


@dataclasses.dataclass
class EnvSource:
    """The environments of a script, as a trainer makes them and as the script sees them.

    Attributes:
        n_envs: how many.
        make_env: for `Trainer`; None: by env_id.
        open: returns the VecEnv for the script.
        env_id: id, where the script gave one.
    """

    n_envs: int
    make_env: Maker | None
    open: Callable[[], Any]
    env_id: str | None = None

    @functools.cached_property
    def venv(self) -> Any:  # noqa: ANN401 - a VecEnv of either program
        """The VecEnv for the script."""
        return self.open()


def env_source(env: Any) -> EnvSource:  # noqa: ANN401 - what a script gives
    """Return the environments that a constructor or `set_env` was given.

    Args:
        env: an id, a Gymnasium environment, or a VecEnv of fastppo.compat or stable-baselines3.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(env, str):
        make = functools.partial(build, EnvFactory(env, {}))
        return EnvSource(1, None, lambda: VecEnv([make()], make), env)
    if isinstance(env, gym.Env):
        env = VecEnv([env])
    if isinstance(env, VecEnv) and env.maker is not None:  # fastppo makes its own, and steps them faster
        return EnvSource(env.num_envs, env.maker, lambda: env)
    if isinstance(env, VecEnv) or _is_sb3_vec_env(env):
        return EnvSource(env.num_envs, lambda: TrainingEnv(env), lambda: env)
    raise ConfigError(
        f"env is {kind_of(env)}; give an id, a Gymnasium environment or a VecEnv, or train on it by "
        "fastppo.Trainer(config, make_env)."
    )


def make_vec_env(
    env_id: str | Callable[..., gym.Env[Any, Any]],
    n_envs: int = 1,
    seed: int | None = None,
    start_index: int = 0,
    monitor_dir: str | None = None,
    wrapper_class: Callable[..., gym.Env[Any, Any]] | None = None,
    env_kwargs: dict[str, Any] | None = None,
    vec_env_cls: Any = None,  # noqa: ANN401 - a class of stable-baselines3
    vec_env_kwargs: dict[str, Any] | None = None,
    monitor_kwargs: dict[str, Any] | None = None,
    wrapper_kwargs: dict[str, Any] | None = None,
) -> VecEnv:
    """Make several environments, with stable-baselines3's arguments.

    Args:
        env_id: an id, or a function that makes an environment.
        n_envs: how many.
        seed: seed + i is that of environment i at its first reset; training takes its seeds from the algorithm's.
        start_index: added to `seed`.
        monitor_dir: None.
        wrapper_class: wraps each environment.
        env_kwargs: arguments of `env_id`.
        vec_env_cls: None.
        vec_env_kwargs: None.
        monitor_kwargs: None.
        wrapper_kwargs: arguments of `wrapper_class`.

    Raises:
        ConfigError: an argument that fastppo has no use for is given.
    """
    for name, value, way in (
        ("monitor_dir", monitor_dir, "episodes are logged in the folder tensorboard_log of the algorithm"),
        ("monitor_kwargs", monitor_kwargs, "episodes are logged without a Monitor"),
        ("vec_env_cls", vec_env_cls, 'give the algorithm vectorization="pool" for worker processes'),
        ("vec_env_kwargs", vec_env_kwargs, 'give the algorithm vectorization="pool", workers=4'),
    ):
        if value is not None:
            raise ConfigError(f"{name}={value!r} can't be used here: {way}.")
    n_envs = whole_number("n_envs", n_envs)
    if n_envs < 1:
        raise ConfigError(f"n_envs={n_envs} must be at least 1; nearest valid value: 1.")
    make = functools.partial(_make, env_id, env_kwargs or {}, wrapper_class, wrapper_kwargs or {})
    venv = VecEnv([make() for _ in range(n_envs)], make)
    if seed is not None:
        venv.seed(seed + start_index)
    return venv


def _make(
    env_id: str | Callable[..., gym.Env[Any, Any]],
    env_kwargs: dict[str, Any],
    wrapper: Callable[..., gym.Env[Any, Any]] | None,
    wrapper_kwargs: dict[str, Any],
) -> gym.Env[Any, Any]:
    env = build(EnvFactory(env_id, env_kwargs)) if isinstance(env_id, str) else env_id(**env_kwargs)
    return env if wrapper is None else wrapper(env, **wrapper_kwargs)


def normalizer_of(venv: Any) -> Any:  # noqa: ANN401 - objects of stable-baselines3
    """Return the VecNormalize of stable-baselines3 around a VecEnv; None if there is none."""
    module = _sb3_vec_env()
    return None if module is None else module.unwrap_vec_normalize(venv)


def _is_sb3_vec_env(env: object) -> bool:
    module = _sb3_vec_env()
    return module is not None and isinstance(env, module.VecEnv)


def register() -> None:
    """Let stable-baselines3's functions, such as evaluate_policy, take a VecEnv of ours, if it has been imported."""
    if module := _sb3_vec_env():
        module.VecEnv.register(VecEnv)


def _sb3_vec_env() -> Any:  # noqa: ANN401 - a module
    """Return stable-baselines3's module of VecEnvs if it has been imported, as where one is given; else None."""
    return sys.modules.get("stable_baselines3.common.vec_env")


def _layers(env: Any) -> Iterable[Any]:  # noqa: ANN401 - an environment and its wrappers
    while env is not None:
        yield env
        env = env.env if isinstance(env, gym.Wrapper) else None
