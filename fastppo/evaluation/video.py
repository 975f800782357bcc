"""Videos of episodes: any format if ffmpeg is installed, animated GIFs without it."""

from __future__ import annotations

import ctypes.util
import dataclasses
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from fastppo.envs import factory
from fastppo.envs.factory import close_env
from fastppo.envs.make_envs import EnvInfo
from fastppo.errors import ENV_ERRORS, ConfigError, EnvError, first_line

_Array = np.ndarray[Any, Any]

_MAX_STEPS = 20_000  # per episode
_MAX_FRAMES = 1000  # in memory; about 700 MB
_GIF_FRAMES, _GIF_WIDTH = 200, 300  # limits for a log
_GIF_FPS = 50
_OFFSCREEN = {"egl": "EGL", "osmesa": "OSMesa"}  # values of MUJOCO_GL, and the library that each needs


@dataclasses.dataclass(frozen=True)
class Video:
    """The frames of one episode.

    Attributes:
        frames: [H, W, 3] uint8 each, starting before the first step; of a long episode every second, fourth, ... one.
        fps: frames per second in the environment's own time.
        episode_return: undiscounted return, from unnormalised rewards.
        whole: whether the episode ended within 20,000 steps.
    """

    frames: list[_Array]
    fps: float
    episode_return: float
    whole: bool = True

    def gif(self) -> bytes:
        """Return the episode as a small animated GIF of at most 200 frames."""
        skip = max(-(-len(self.frames) // _GIF_FRAMES), math.ceil(self.fps / _GIF_FPS))
        coarse = -(-self.frames[0].shape[1] // _GIF_WIDTH)
        return _encode([frame[::coarse, ::coarse] for frame in self.frames[::skip]], ".gif", self.fps / skip)

    def write(self, path: Path) -> Path:
        """Write the video to `path`, or to a .gif beside it without ffmpeg; return the path that was written.

        Raises:
            ConfigError: the file can't be written, or its suffix is not that of a video.
        """
        check_video_name(path)
        if path.suffix != ".gif" and not _has_ffmpeg():
            path = path.with_suffix(".gif")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_encode(self.frames, path.suffix, self.fps))
        except OSError as error:
            raise ConfigError(f"video {path} can't be written ({error.strerror or error}).") from None
        return path


def check_video_name(path: Path) -> None:
    """Check that `path` has the suffix of a video.

    Raises:
        ConfigError: it has another suffix.
    """
    if path.suffix not in (".mp4", ".webm", ".gif"):
        raise ConfigError(f"video {path}: its name must end in .mp4, .webm or .gif.")


def choose_renderers() -> None:
    """Choose renderers that need no display where there is none; the user's own choice wins.

    MuJoCo may read its variable when it is imported: call this before an environment is made.
    """
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame needs no display, and doesn't warn that there is none
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        found = [name for name, library in _OFFSCREEN.items() if ctypes.util.find_library(library)]
        if found:
            os.environ.setdefault("MUJOCO_GL", found[0])


class VideoRecorder:
    """Records episodes in an environment of its own."""

    def __init__(self, env_info: EnvInfo, begin: Callable[[], Callable[[_Array], _Array]]) -> None:
        """Make the environment with `render_mode="rgb_array"`.

        Args:
            env_info: of the environment, as `inspect_env` returns it.
            begin: called at the start of an episode; returns a function from each observation to the environment's
                action.

        Raises:
            ConfigError: the environment can't be rendered, or a library is missing.
        """
        _imageio()
        choose_renderers()
        if env_info.factory is None:
            raise ConfigError("video: your own VectorEnv can't be recorded; give a make_env that returns one Env.")
        kwargs = env_info.factory.env_kwargs | {"render_mode": "rgb_array"}
        self._begin = begin
        self._env: gym.Env[Any, Any] = factory.build(dataclasses.replace(env_info.factory, env_kwargs=kwargs))
        if self._env.render_mode != "rgb_array":
            close_env(self._env)
            raise ConfigError(
                f"video: {env_info.name} has render_mode {self._env.render_mode}; make it with render_mode=rgb_array."
            )
        self._fps = float(self._env.metadata.get("render_fps") or 30)
        try:  # so that a failure shows now and not after hours of training
            self._env.reset(seed=0)
            self._render()
        except ENV_ERRORS as error:
            close_env(self._env)
            reason = first_line(error).removeprefix("video: ").rstrip(".")
            gl = os.environ.get("MUJOCO_GL")
            hint = f" (MUJOCO_GL is {gl}; egl needs libEGL, osmesa libOSMesa)" if "mujoco" in sys.modules else ""
            raise ConfigError(f"video: {env_info.name} can't be rendered: {reason}{hint}.") from None

    def record_episode(self, seed: int) -> Video:
        """Record one episode that starts from `seed`.

        Raises:
            ConfigError: a frame can't be rendered.
            EnvError: the environment fails.
        """
        try:
            obs, _ = self._env.reset(seed=seed)
            act = self._begin()
            frames, total, stride, whole = [self._render()], 0.0, 1, False
            for step in range(1, _MAX_STEPS + 1):
                obs, reward, terminated, truncated, _ = self._env.step(act(np.asarray(obs)))
                total += float(reward)
                if step % stride == 0:
                    frames.append(self._render())
                if len(frames) > _MAX_FRAMES:  # drop every second frame; fps makes up for it
                    frames, stride = frames[::2], 2 * stride
                if terminated or truncated:
                    whole = True
                    break
        except ConfigError:
            raise
        except ENV_ERRORS as error:
            raise EnvError(f"video: the environment failed: {type(error).__name__}: {error}") from error
        return Video(frames, self._fps / stride, total, whole)

    def close(self) -> None:
        """Close the environment."""
        close_env(self._env)

    def _render(self) -> _Array:
        frame = self._env.render()
        if not isinstance(frame, np.ndarray) or frame.ndim != 3:
            raise ConfigError(f"video: render() returned {type(frame).__name__}; an array [H, W, 3] is needed.")
        return frame.astype(np.uint8)[..., :3]


def _imageio() -> Any:  # noqa: ANN401 - the module
    try:
        import imageio.v3
    except ImportError:
        raise ConfigError("video needs imageio: pip install 'fastppo[video]'.") from None
    return imageio.v3


def _has_ffmpeg() -> bool:
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return False
    return True


def _encode(frames: list[_Array], suffix: str, fps: float) -> bytes:
    stack = np.stack(frames)
    if suffix == ".gif":
        duration = round(100 / min(fps, _GIF_FPS)) * 10  # ms; GIFs count hundredths of a second, browsers need two
        return bytes(_imageio().imwrite("<bytes>", stack, extension=".gif", duration=duration, loop=0))
    # the codec needs even sides
    even = stack[:, : stack.shape[1] // 2 * 2, : stack.shape[2] // 2 * 2]
    return bytes(_imageio().imwrite("<bytes>", even, extension=suffix, plugin="FFMPEG", fps=fps, macro_block_size=2))
