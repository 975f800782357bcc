"""An algorithm of stable-baselines3 as a thin layer over Config and Trainer."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, ClassVar, Self

import numpy as np
import torch

from fastppo.builders.parts import build_models
from fastppo.builders.resolve import resolve_config
from fastppo.compat.arguments import changed, config_of, read_arguments, signature_of
from fastppo.compat.callbacks import Logger, hooks_of
from fastppo.compat.envs import EnvSource, env_source, normalizer_of, register
from fastppo.compat.keywords import whole_number, without_functions
from fastppo.compat.model_file import Facts, Models, opened, read_models, write_model
from fastppo.compat.training import follow_steps, hand_over, run_folder, train
from fastppo.errors import CheckpointError, ConfigError
from fastppo.evaluation.saved_policy import SavedPolicy
from fastppo.policies.normalizers import RewardNormalizer
from fastppo.policies.policy import Policy
from fastppo.policies.policy_spec import PolicySpec
from fastppo.profiles import Profile
from fastppo.runs.inspect_env import inspect_configured
from fastppo.runs.result import Result
from fastppo.runs.state_files import StateSnapshot, snapshot
from fastppo.runtime.device import choose_device
from fastppo.runtime.distributed import World
from fastppo.trainer import Trainer

# Attributes of stable-baselines3's algorithms that are missing here, with the nearest replacement
_INSTEAD = {
    "set_random_seed": "give seed=... to the constructor",
    "get_parameters": "policy.state_dict() returns the weights",
    "set_parameters": "policy.load_state_dict(weights) sets them, load(path, env=env) reads a file",
    "set_logger": "give tensorboard_log=..., whose run folders hold metrics.jsonl too",
    "dump_logs": "every iteration is logged; give log_interval=... to learn",
    "rollout_buffer": "trainer.rollout holds the last rollout",
    "collect_rollouts": "write a loop over fastppo.Trainer",
    "train": "write a loop over fastppo.Trainer",
}


class Algorithm:
    """Base of the algorithms: a subclass names its profile, whose keywords are those of its constructor.

    Attributes:
        config: the settings that the keywords stand for.
        num_timesteps: environment steps so far.
        n_envs: environments.
        observation_space: of one environment; None without one.
        action_space: as observation_space.
        policy: encoder, network and distribution.
        logger: takes figures of callbacks.
        verbose: 0: nothing is printed in training.
        tensorboard_log: folder of the runs; None: temporary ones.
        trainer: of the last `learn`, or of the one that runs; None before.
    """

    profile: ClassVar[Profile]
    recurrent: ClassVar[bool] = False  # whether its policies must have memory
    legacy: ClassVar[bool] = False  # whether it is stable-baselines', on TensorFlow
    masks: ClassVar[bool] = False  # whether it uses masks of allowed actions
    _KEPT: ClassVar = frozenset({"verbose", "tensorboard_log"})  # keywords that are attributes too
    __signature__: ClassVar[inspect.Signature]
    _functions: tuple[str, ...]  # keywords whose value is a function

    def __init_subclass__(cls, **kwargs: Any) -> None:  # noqa: ANN401 - as in any class
        """Give the constructor the signature of the profile's keywords."""
        super().__init_subclass__(**kwargs)
        if "profile" in vars(cls):
            cls.__signature__ = signature_of(cls.profile)

    def __init__(self, *args: Any, **given: Any) -> None:  # noqa: ANN401 - see __signature__
        """Build the policy for an environment.

        Args:
            args: the program's arguments, from `policy` and `env` on; `inspect.signature` shows them.
            given: these by name; `normalize_obs` and `normalize_rewards`; and settings of fastppo that no keyword
                stands for, such as threads=1.

        Raises:
            TypeError: `policy` or `env` is missing, or there are too many arguments.
            ConfigError: a value that can't be honoured; the message names the nearest way.
            EnvError: the environment can't be used.
        """
        bound = self.__signature__.bind(*args, **given)
        arguments = read_arguments(self.profile, bound, legacy=self.legacy, recurrent=self.recurrent, masks=self.masks)
        self._begin(arguments.settings, arguments.verbose, arguments.tensorboard_log)
        self._functions = arguments.functions
        self._use(env_source(arguments.env))
        self._build()

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401 - any value
        """Set an attribute.

        Raises:
            ConfigError: it is a keyword, whose value training would not follow.
        """
        if name in self.__signature__.parameters and name not in self._KEPT:
            raise ConfigError(
                f"{type(self).__name__}.{name} can't be set: give {name}=... to the constructor, or save, then "
                f"load(path, env=env, {name}=...)."
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - never returns
        """Explain where to find what stable-baselines3's algorithms have.

        Raises:
            AttributeError: always.
        """
        way = _INSTEAD.get(name, "")
        if name in self.__signature__.parameters:
            way = "its config attribute holds the settings"
        raise AttributeError(f"{type(self).__name__} has no attribute {name} here{way and '; '}{way}.")

    def _begin(self, settings: dict[str, Any], verbose: int, log: Any) -> None:  # noqa: ANN401 - a path, or None
        self._settings, self._schedules = without_functions(settings)
        self.verbose, self.tensorboard_log = verbose, None if log is None else Path(log)
        self.num_timesteps, self._trainings = 0, 0
        self.observation_space: Any = None
        self.action_space: Any = None
        self.logger = Logger()
        self.trainer: Trainer | None = None
        self._source: EnvSource | None = None
        self._lost: tuple[str, ...] = ()  # keywords that followed a function, which a file couldn't hold
        self._loaded: StateSnapshot | None = None  # the optimiser's state, from a file
        self._spec: PolicySpec
        self._models: Models
        self._saved: SavedPolicy

    # Environments

    def _use(self, source: EnvSource, spec: PolicySpec | None = None) -> None:
        """Train on `source` from now on; its spaces must be those of `spec`, if there is a policy already.

        Raises:
            ConfigError: other spaces, or no masks where the algorithm needs them.
        """
        config = config_of(self._settings, source.n_envs, source.env_id)
        info = inspect_configured(config, source.make_env)
        if self.masks and not info.obs_spec.has_mask:
            needed = f"{type(self).__name__} needs masks of allowed actions"
            if not info.action_spec.nvec:
                raise ConfigError(f"{needed}, which {info.action_spec.kind} actions don't have here; use PPO.")
            raise ConfigError(
                f"{needed}, but {info.name} gives none: give it a method action_masks(), as sb3-contrib's ActionMasker "
                "does, or use PPO."
            )
        if spec is not None:
            found = dataclasses.replace(spec, obs=info.obs_spec, action=info.action_spec)
            if differing := found.differences(spec):
                raise ConfigError(f"set_env: the policy is for another environment: {'; '.join(differing)}.")
        self._source, self.n_envs, self.config, self._env_info = source, source.n_envs, config, info
        venv = source.venv
        self.observation_space, self.action_space = venv.observation_space, venv.action_space

    def get_env(self) -> Any:  # noqa: ANN401 - a VecEnv of either program
        """Return the environments as a VecEnv, whose step returns observations, rewards, dones and infos; or None."""
        register()  # a script may have imported stable-baselines3 since
        return None if self._source is None else self._source.venv

    @property
    def env(self) -> Any:  # noqa: ANN401 - a VecEnv of either program
        """The environments, as `get_env` returns them."""
        return self.get_env()

    def get_vec_normalize_env(self) -> Any:  # noqa: ANN401 - an object of stable-baselines3
        """Return the VecNormalize of stable-baselines3 around the environments; None if there is none."""
        return None if self._source is None else normalizer_of(self._source.venv)

    def set_env(self, env: Any, force_reset: bool = True) -> None:  # noqa: ANN401 - what a script gives
        """Train on `env` from now on; its spaces must be those of the policy.

        Raises:
            ConfigError: other spaces, or force_reset=False: training always begins with new episodes.
        """
        if not force_reset:
            raise ConfigError("force_reset=False can't be honoured: training begins with new episodes; leave it out.")
        self._use(env_source(env), self._spec)

    # The policy

    @property
    def policy(self) -> Policy:
        """Encoder, network and distribution."""
        return self._saved.policy

    @property
    def device(self) -> torch.device:
        """Device of the policy."""
        return self._saved.device

    def _build(self) -> None:
        """Build an untrained policy, with the weights that the first training begins with."""
        assert self._source is not None
        device = choose_device(self.config.device)
        resolved, _ = resolve_config(self.config, self._env_info, device)
        models = build_models(resolved, self._env_info, None, device, World())
        self._hold(models.spec, models.saved(), device)

    def _hold(self, spec: PolicySpec, models: Models, device: torch.device) -> None:
        policy = models["policy"]
        assert isinstance(policy, Policy)
        self._spec, self._models = spec, models
        self._saved = SavedPolicy(spec, policy, device, self.config.seed)

    def predict(
        self,
        observation: Any,  # noqa: ANN401 - array-like, or a tree of arrays
        state: Any = None,  # noqa: ANN401 - what the last call returned
        episode_start: Any = None,  # noqa: ANN401 - array-like
        deterministic: bool = False,
    ) -> tuple[np.ndarray[Any, Any], tuple[np.ndarray[Any, Any], ...] | None]:
        """Return the actions for an observation or a batch, and the policy's next state.

        Args:
            observation: raw observations, [*obs] or [B, *obs].
            state: the state that the last call returned; None: that of new episodes.
            episode_start: whether an episode starts here, a bool or [B].
            deterministic: take the most probable action; otherwise sample.

        Returns:
            The actions, [*action] or [B, *action], and the state as arrays; None without memory.

        Raises:
            ValueError: see `SavedPolicy.predict`.
        """
        return self._act(observation, state, episode_start, deterministic)

    def _act(
        self,
        observation: Any,  # noqa: ANN401 - as in predict
        state: Any,  # noqa: ANN401 - as in predict
        episode_start: Any,  # noqa: ANN401 - as in predict
        deterministic: bool,
        action_mask: Any = None,  # noqa: ANN401 - array-like
    ) -> tuple[np.ndarray[Any, Any], tuple[np.ndarray[Any, Any], ...] | None]:
        state = None if state is None or len(state) == 0 else state
        actions, after = self._saved.predict(observation, state, episode_start, deterministic, action_mask=action_mask)
        return actions, tuple(part.numpy(force=True) for part in after) or None

    # Training

    def learn(
        self,
        total_timesteps: int,
        callback: Any = None,  # noqa: ANN401 - see hooks_of
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Train for `total_timesteps` more environment steps, rounded up to whole rollouts; return self.

        Args:
            total_timesteps: environment steps, over all environments.
            callback: called after each iteration: a function of (locals, globals), an object with `on_step`, or a list
                of these; see docs/compat.md. False stops training.
            log_interval: iterations per line of the log.
            tb_log_name: name of the run's folder in tensorboard_log; None: that of the class.
            reset_num_timesteps: count steps and schedules from 0; False: go on where the last training ended.
            progress_bar: show the progress.

        Raises:
            ConfigError, EnvError: see their texts.
        """
        if self._source is None:
            raise ConfigError("learn needs an environment: call set_env(env), or load(path, env=env).")
        if self._lost:
            raise ConfigError(
                f"{', '.join(self._lost)} followed a function, which a file can't hold: give it again by "
                f"load(path, env=env, {self._lost[0]}=...)."
            )
        batch, hooks = self.config.batch_size, hooks_of(callback)
        total_timesteps = whole_number("total_timesteps", total_timesteps)
        if total_timesteps < 1:
            raise ConfigError(f"total_timesteps={total_timesteps} must be at least 1.")
        before, learned = 0 if reset_num_timesteps else self.num_timesteps, self._optimizer_state()
        with run_folder(self.tensorboard_log, tb_log_name or type(self).__name__) as run_dir:
            config = dataclasses.replace(
                self.config,
                total_timesteps=-(-total_timesteps // batch) * batch,
                log_every=whole_number("log_interval", log_interval),
                run_dir=run_dir,
                seed=self.config.seed + self._trainings,
            )
            trainer = Trainer(config, self._source.make_env, progress=bool(self.verbose or progress_bar))
            self.trainer = trainer
            self._hold(trainer.spec, hand_over(trainer, self._models, learned), trainer.device)
            self._trainings += 1
            planned = before + total_timesteps
            follow_steps(trainer, self._schedules, lambda i: before + self._steps_counted(i), planned)
            self.num_timesteps = before
            for hook in hooks:
                hook.start(self, planned)
            train(trainer, self, hooks)
        for hook in hooks:
            hook.end()
        return self

    @property
    def result(self) -> Result | None:
        """The result of the last `learn`; None before its end."""
        return None if self.trainer is None else self.trainer.result

    def _optimizer_state(self) -> StateSnapshot | None:
        """Return the state of the optimiser as it is now; None before any training."""
        return self._loaded if self.trainer is None else snapshot({"update": self.trainer.update})

    def _steps_counted(self, iteration: int) -> int:
        """Return the steps that the schedules of iteration 0, 1, ... count: those of its own rollout too."""
        return (iteration + 1) * self.config.batch_size

    # Files

    def save(self, path: str | Path | IO[bytes], exclude: Any = None, include: Any = None) -> None:  # noqa: ANN401
        """Save policy, normalisers, optimiser and settings into one zip; a name without an ending gets `.zip`.

        Raises:
            ConfigError: `exclude` or `include` is given, or the file can't be written.
        """
        if exclude is not None or include is not None:
            raise ConfigError("save: exclude and include can't be honoured: the file holds no Python objects.")
        facts = Facts(
            algorithm=type(self).__name__,
            settings={name: str(v) if isinstance(v, Path) else v for name, v in self._settings.items()},
            n_envs=self.n_envs,
            functions=self._functions,
            num_timesteps=self.num_timesteps,
            trainings=self._trainings,
            verbose=self.verbose,
            tensorboard_log=None if self.tensorboard_log is None else str(self.tensorboard_log),
        )
        write_model(path, facts, self._spec, self._models, self._optimizer_state())

    @classmethod
    def load(
        cls,
        path: str | Path | IO[bytes],
        env: Any = None,  # noqa: ANN401 - what a script gives
        device: Any = "auto",  # noqa: ANN401 - text or torch.device
        custom_objects: Mapping[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,  # noqa: ANN401 - values of keywords
    ) -> Self:
        """Load what `save` wrote.

        Args:
            path: the file; `.zip` may be left out.
            env: environment to go on training with; None: for predictions alone.
            device: device of the policy.
            custom_objects: new values of the constructor's keywords, such as a learning rate.
            print_system_info: False.
            force_reset: True: training begins with new episodes.
            kwargs: as custom_objects.

        Raises:
            CheckpointError: there is no such file, or it holds something else.
            ConfigError: an argument that can't be honoured.
        """
        if print_system_info:
            raise ConfigError("load: print_system_info=True can't be honoured; `fastppo doctor` prints the system.")
        if not force_reset:
            raise ConfigError("load: force_reset=False can't be honoured: training begins with new episodes.")
        model = cls.__new__(cls)
        with opened(path, cls.__name__) as (folder, about, optimizer):
            chosen = choose_device(str(device))
            try:
                model._restore(Facts.read(about), optimizer, {**(custom_objects or {}), **kwargs}, chosen)
            except (KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{path} can't be understood ({type(error).__name__}: {error}).") from None
            config = model.config
            rewards = RewardNormalizer(model.n_envs, config.reward_clip) if config.normalize_rewards else None
            model._hold(*read_models(folder, chosen, rewards), chosen)
        if env is not None:
            model.set_env(env)
        return model

    def _restore(
        self, facts: Facts, optimizer: StateSnapshot | None, changes: Mapping[str, Any], device: torch.device
    ) -> None:
        """Set everything but the models from the content of a file and new values of keywords."""
        settings = changed(self.profile, facts.settings | {"device": device.type}, changes)
        self._begin(settings, facts.verbose, facts.tensorboard_log)
        self._loaded = optimizer
        self.num_timesteps, self._trainings = facts.num_timesteps, facts.trainings
        self._lost = tuple(name for name in facts.functions if name not in changes)
        self._functions = (*self._lost, *(name for name, value in changes.items() if callable(value)))
        self.n_envs = facts.n_envs
        self.config = config_of(self._settings, self.n_envs)
