"""An episode as pictures: a video where ffmpeg is found, an animated GIF anywhere."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from fastppo.envs import factory as single
from fastppo.envs.registry import EnvInfo
from fastppo.errors import ConfigError, EnvError

_Array = np.ndarray[Any, Any]

_MOST_STEPS = 20_000  # of an episode that has no end
_MOST_FRAMES = 1000  # some 700 MB of them
_GIF_FRAMES, _GIF_WIDTH = 200, 300  # what a log should hold
_GIF_FPS = 50


@dataclasses.dataclass(frozen=True)
class Video:
    """One episode.

    Attributes:
        frames: [H, W, 3] uint8 each, the first before the first step; of a long episode every second, fourth, ... one.
        fps: of them, in the environment's own time.
        episode_return: undiscounted, raw.
        whole: whether the episode came to its end within 20,000 steps.
    """

    frames: list[_Array]
    fps: float
    episode_return: float
    whole: bool = True

    def gif(self) -> bytes:
        """A small animated GIF of the whole episode."""
        skip = max(-(-len(self.frames) // _GIF_FRAMES), math.ceil(self.fps / _GIF_FPS))
        coarse = -(-self.frames[0].shape[1] // _GIF_WIDTH)
        return _encode([frame[::coarse, ::coarse] for frame in self.frames[::skip]], ".gif", self.fps / skip)

    def write(self, path: Path) -> Path:
        """Write the video, or a GIF beside it where there is no ffmpeg; returns what was written.

        Raises:
            ConfigError: the file can't be written, or its name ends in no kind of video.
        """
        check_video_name(path)
        if path.suffix != ".gif" and not _ffmpeg():
            path = path.with_suffix(".gif")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_encode(self.frames, path.suffix, self.fps))
        except OSError as error:
            raise ConfigError(f"video {path} can't be written ({error.strerror or error}).") from None
        return path


def check_video_name(path: Path) -> None:
    """Refuse a name that is no video's.

    Raises:
        ConfigError: its ending.
    """
    if path.suffix not in (".mp4", ".webm", ".gif"):
        raise ConfigError(f"video {path}: its name must end in .mp4, .webm or .gif.")


class VideoRecorder:
    """Films episodes in an environment of its own."""

    def __init__(self, found: EnvInfo, act: Callable[[_Array], _Array]) -> None:
        """Make the environment, rendered to arrays.

        Args:
            found: what `probe` said of it.
            act: from one observation to the environment's action.

        Raises:
            ConfigError: it can't be filmed, or a library is missing.
        """
        _imageio()
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pictures, no window, and no complaint that there is none
        if found.factory is None:
            raise ConfigError("video: a vector environment of your own can't be filmed; give a make_env of one.")
        kwargs = found.factory.env_kwargs | {"render_mode": "rgb_array"}
        self._act = act
        self._env: gym.Env[Any, Any] = single.build(dataclasses.replace(found.factory, env_kwargs=kwargs))
        if self._env.render_mode != "rgb_array":
            self._env.close()
            raise ConfigError(
                f"video: {found.name} has render_mode {self._env.render_mode}; make it with render_mode=rgb_array."
            )
        self._fps = float(self._env.metadata.get("render_fps") or 30)
        try:  # what can't be rendered is known before hours of training
            self._env.reset(seed=0)
            self._picture()
        except Exception as error:
            self._env.close()
            why = str(error).removeprefix("video: ")
            raise ConfigError(f"video: {found.name} can't be rendered: {why}") from None

    def episode(self, seed: int) -> Video:
        """Video one episode from a seed.

        Raises:
            ConfigError, EnvError: it can't be rendered, or fails.
        """
        try:
            obs, _ = self._env.reset(seed=seed)
            frames, total, stride, whole = [self._picture()], 0.0, 1, False
            for step in range(1, _MOST_STEPS + 1):
                obs, reward, terminated, truncated, _ = self._env.step(self._act(np.asarray(obs)))
                total += float(reward)
                if step % stride == 0:
                    frames.append(self._picture())
                if len(frames) > _MOST_FRAMES:  # a long one keeps every second picture, and its own time
                    frames, stride = frames[::2], 2 * stride
                if terminated or truncated:
                    whole = True
                    break
        except ConfigError:
            raise
        except Exception as error:
            raise EnvError(f"video: the environment failed: {type(error).__name__}: {error}") from error
        return Video(frames, self._fps / stride, total, whole)

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def _picture(self) -> _Array:
        frame = self._env.render()
        if not isinstance(frame, np.ndarray) or frame.ndim != 3:
            raise ConfigError(f"video: render() gave {type(frame).__name__}, not a picture [H, W, 3].")
        return frame.astype(np.uint8)[..., :3]


def _imageio() -> Any:  # noqa: ANN401 - the module
    try:
        import imageio.v3
    except ImportError:
        raise ConfigError("video needs imageio: pip install 'fastppo[video]'.") from None
    return imageio.v3


def _ffmpeg() -> bool:
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return False
    return True


def _encode(frames: list[_Array], suffix: str, fps: float) -> bytes:
    stack = np.stack(frames)
    if suffix == ".gif":
        duration = round(100 / min(fps, _GIF_FPS)) * 10  # whole hundredths, of which browsers want two at least
        return bytes(_imageio().imwrite("<bytes>", stack, extension=".gif", duration=duration, loop=0))
    # sides must be even for the codec
    even = stack[:, : stack.shape[1] // 2 * 2, : stack.shape[2] // 2 * 2]
    return bytes(_imageio().imwrite("<bytes>", even, extension=suffix, plugin="FFMPEG", fps=fps, macro_block_size=2))
