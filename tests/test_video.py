"""Videos of episodes, in files and in TensorBoard."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from fastppo import Config, Trainer
from fastppo.errors import ConfigError
from fastppo.evaluation.video import Video


def frames_of(gif):
    image = Image.open(io.BytesIO(gif))
    return image.size, image.n_frames


def colored(n, height=40, width=60):
    frames = [np.zeros((height, width, 3), np.uint8) for _ in range(n)]
    for k, frame in enumerate(frames):
        frame[:, : k % width + 1] = 255
    return frames


def test_a_gif_holds_every_frame_of_a_short_episode():
    assert frames_of(Video(colored(12), 30.0, 1.0).gif()) == ((60, 40), 12)


def test_a_gif_of_a_long_episode_is_thinned_and_small():
    size, n = frames_of(Video(colored(1000, 400, 600), 50.0, 1.0).gif())
    assert size == (300, 200)
    assert n <= 200


def test_a_video_file_is_a_gif_without_ffmpeg(tmp_path, monkeypatch):
    import imageio.v3

    video = Video(colored(20, 41, 61), 20.0, 1.0)
    path = video.write(tmp_path / "a" / "video.mp4")
    assert path == tmp_path / "a" / "video.mp4"
    metadata = imageio.v3.immeta(path, plugin="FFMPEG")
    assert (metadata["size"], metadata["fps"], round(metadata["duration"], 1)) == ((60, 40), 20.0, 1.0)
    monkeypatch.setattr("fastppo.evaluation.video._has_ffmpeg", lambda: False)
    path = video.write(tmp_path / "video.mp4")
    assert path == tmp_path / "video.gif"
    assert frames_of(path.read_bytes()) == ((61, 41), 20)
    with pytest.raises(ConfigError, match="must end in"):
        video.write(tmp_path / "video.avi")


def test_recording_during_training_changes_no_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    small = Config(n_envs=2, n_steps=32, total_timesteps=64 * 6, compile="off", threads=1)
    lines = []
    for every in (None, 128):
        Trainer(dataclasses.replace(small, run_dir=tmp_path / str(every), video_every=every)).run()
        rows = (tmp_path / str(every) / "metrics.jsonl").read_text().splitlines()
        assert [every is not None and json.loads(row).get("time/video", 0) > 0 for row in rows] == [
            every is not None and 64 * i % every == 0 for i in range(1, 7)
        ]
        lines.append([{k: v for k, v in json.loads(row).items() if "losses" in k} for row in rows])
    assert lines[0] == lines[1]
    found = EventAccumulator(str(tmp_path / "128"), size_guidance={"images": 0})
    found.Reload()
    images = found.Images("video/episode")
    assert [image.step for image in images] == [128, 256, 384]
    (width, height), n = frames_of(images[0].encoded_image_string)
    assert (width, height) == (images[0].width, images[0].height) == (300, 200)
    assert n > 5


def test_a_recording_that_fails_does_not_stop_training(tmp_path):
    import gymnasium as gym
    from rich.console import Console

    class Fades(gym.Wrapper):
        pictures = 0

        def render(self):
            Fades.pictures += 1
            if Fades.pictures > 40:
                raise RuntimeError("no light")
            return super().render()

    config = Config(
        n_envs=2, n_steps=32, total_timesteps=64 * 8, video_every=64, run_dir=tmp_path / "run", compile="off"
    )
    with open(tmp_path / "out", "w") as out:
        console = Console(file=out, width=200)
        trainer = Trainer(config, lambda: Fades(gym.make("CartPole-v1", render_mode="rgb_array")), console=console)
        assert trainer.run().ended == "finished"
    assert (tmp_path / "out").read_text().count("RuntimeError: no light. Video recording is off from here on.") == 1


def test_long_episodes_keep_at_most_1000_frames():
    import gymnasium as gym

    from fastppo.envs.make_envs import inspect_env
    from fastppo.evaluation.video import VideoRecorder

    def make():
        env = gym.make("CartPole-v1", render_mode="rgb_array", max_episode_steps=3000)
        env.unwrapped.theta_threshold_radians = env.unwrapped.x_threshold = 1e9
        env.unwrapped.screen_width, env.unwrapped.screen_height = 30, 20
        return env

    recorder = VideoRecorder(inspect_env("", {}, make), lambda: lambda obs: np.int64(0))
    video = recorder.record_episode(0)
    recorder.close()
    assert video.episode_return == 3000
    assert (len(video.frames), video.fps) == (751, 12.5)  # every fourth frame, at a quarter of the rate


def test_an_environment_that_cant_be_rendered_is_refused_before_the_run_starts(tmp_path):
    import gymnasium as gym

    config = Config(n_envs=2, n_steps=32, total_timesteps=64, video_every=64, run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="make it with render_mode=rgb_array"):
        Trainer(config, make_env=lambda: gym.make("CartPole-v1"))
    assert not (tmp_path / "run").exists()
