"""Environments of other packages, each trained for a few thousand steps by the command that a user types.

    scripts/third-party

makes the virtual environments that they need, and runs this module. It reports each run's return and steps per second,
and its start-up: seconds from the first line of the trainer to the first step, without compilation. Importing torch
and the package comes on top, in `seconds in all`.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from benchmarks import report

ROOT = Path(__file__).parents[1]


class Case(NamedTuple):
    """A package's environment, and the words that a user types after `fastppo train`."""

    venv: str
    env_id: str
    arguments: tuple[str, ...] = ()


# the Dict observation as it is, without its third key, the mission as text
_MINIGRID_KEYS = ("--obs-keys", "image", "direction")
CASES = (
    Case(".venv-third-party", "minigrid:MiniGrid-Empty-5x5-v0", ("--wrappers", "minigrid.wrappers:ImgObsWrapper")),
    Case(".venv-third-party", "minigrid:MiniGrid-DoorKey-5x5-v0", ("--wrappers", "minigrid.wrappers:FlatObsWrapper")),
    Case(".venv-third-party", "minigrid:MiniGrid-Empty-5x5-v0", _MINIGRID_KEYS),
    Case(".venv-third-party", "minigrid:MiniGrid-DoorKey-5x5-v0", _MINIGRID_KEYS),
    Case(".venv-third-party", "highway_env:highway-fast-v0"),
    Case(".venv-third-party", "flappy_bird_gymnasium:FlappyBird-v0", ("--env-kwargs", '{"use_lidar": false}')),
    Case(".venv-third-party", "gym_anytrading:stocks-v0"),
    Case(".venv-robotics", "gymnasium_robotics:AdroitHandDoor-v1", ("--normalize-obs", "--normalize-rewards")),
    Case(".venv-robotics", "gymnasium_robotics:FetchReach-v4"),
    Case(".venv-robotics", "gymnasium_robotics:FetchReachDense-v4"),
    Case(".venv", "ALE/Pong-v5", ("--n-envs", "8")),
)


def run(case: Case, steps: int) -> dict[str, Any]:
    """Train one case; return a row of results."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["fastppo", "train", "--env-id", case.env_id, *case.arguments, "--total-timesteps", str(steps)]
        program, path = ROOT / case.venv / "bin", os.environ["PATH"]
        begin = time.perf_counter()
        done = subprocess.run(
            [program / command[0], *command[1:], "--run-dir", f"{folder}/run"],
            cwd=ROOT,
            env=os.environ | {"PATH": f"{program}:{path}"},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - begin
        if done.returncode != 0:
            return {"env": case.env_id, "ended": done.stderr.strip().splitlines()[-1]} | dict.fromkeys(_FIGURES, "-")
        result = json.loads(Path(folder, "run", "result.json").read_text())
    training = result["seconds"] + result["compile_seconds"]
    figures = {
        "steps": result["global_step"],
        "episodes": result["episodes"],
        "mean return": result["mean_return"],
        "steps/s": result["sps_steady"],
        "start-up s": result["global_step"] / result["sps_total"] - training,
        "seconds in all": seconds,
    }
    return {"env": case.env_id, "ended": result["ended"]} | figures


_FIGURES = ("steps", "episodes", "mean return", "steps/s", "start-up s", "seconds in all")


def main(steps: int = 5_000, only: str = "", output: Path | None = None) -> None:
    """Train each case.

    Args:
        steps: environment steps of each.
        only: part of an env_id; others are left out.
        output: JSON file for the results.
    """
    report([run(case, steps) for case in CASES if only in case.env_id], output)


if __name__ == "__main__":
    tyro.cli(main)
