"""Settings that contradict each other or the environment: one line, exit status 2, and no folder."""

import json
import re
import subprocess
import sys

import pytest

from fastppo.cli import main
from tests import PATIENCE

SCENE = "--env-id tests.envs.trees:fastppo-tests/Scene-v0"
SIZES = "--n-envs 2 --n-steps 8 --n-minibatches 2 --total-timesteps 32 --hidden-sizes 8 --compile off"


def wrong_mask(source):
    return "--env-id tests.envs.trees:fastppo-tests/WrongMask-v0 --env-kwargs " + json.dumps({"masks": source}).replace(
        " ", ""
    )


REFUSED = {
    "a mask under a key of another size": (
        wrong_mask("key"),
        "observation key action_mask is MultiBinary(3); the action",
    ),
    "a mask in info of another size": (wrong_mask("info"), "an action mask has shape (3,) and dtype int8; .* needs 4"),
    "an unknown key": (f"{SCENE} --obs-keys plase", "obs_keys: observations have no 'plase'; did you mean place?"),
    "an unknown key of the critic": (f"{SCENE} --critic-obs-keys pair/2", "no 'pair/2'; did you mean pair/"),
    "keys of a Box": ("--obs-keys x", "obs_keys need observations with keys, but these are one Box."),
    "keys of the critic of a Box": ("--critic-obs-keys x", "critic_obs_keys need observations with keys"),
    "a key in both lists": (
        f"{SCENE} --obs-keys place --critic-obs-keys place",
        "obs_keys and critic_obs_keys both name 'place'; the critic reads both lists.",
    ),
    "nothing left for the policy": (
        f"{SCENE} --obs-keys place --critic-obs-keys place camera direction pair",
        "both name 'place'",
    ),
    "everything for the critic": (
        f"{SCENE} --critic-obs-keys place camera direction pair",
        "critic_obs_keys place camera direction pair leave the policy no observation; leave one out.",
    ),
    "a shared trunk": (f"{SCENE} --critic-obs-keys place --shared-trunk", "critic_obs_keys with shared_trunk"),
    "sequences that minibatches can't share": (
        "--memory lstm --n-minibatches 4",
        "n_minibatches=4 does not divide the 2 sequences of 8 steps .* nearest that do: 2; or choose another --segment",
    ),
    "segments that don't fill the rollout": (
        "--memory gru --segment-length 3",
        "segment_length=3 does not divide n_steps=8",
    ),
    "segments without memory": ("--segment-length 4", "segment_length needs a memory"),
    "a memory of size 0": ("--memory lstm --memory-size 0", "memory_size=0 must be at least 1"),
    "a memory with a typo": (
        "--memory lsmt",
        "memory='lsmt' must be none or lstm or gru or mingru; did you mean lstm?",
    ),
    "masks with a typo": ("--action-masks of", "action_masks='of' must be auto or off; did you mean off?"),
    "a CNN without images": (
        f"{SCENE} --obs-keys place --network cnn",
        "network=cnn needs images, but observations are",
    ),
    "normalisation without a vector": (
        f"{SCENE} --obs-keys direction --normalize-obs",
        "normalize_obs needs vector observations, not direction: discrete .*: switch it off.",
    ),
    "an unsupported key": (
        "--env-id tests.envs.trees:fastppo-tests/Told-v0",
        "observation key mission is Text, which is not supported; leave it out with --obs-keys",
    ),
    "an unsupported key of the critic": (
        "--env-id tests.envs.trees:fastppo-tests/Told-v0 --critic-obs-keys mission",
        "observation key mission is Text",
    ),
    "an empty Dict": ("--env-id tests.envs.trees:fastppo-tests/Nothing-v0", "the observation space is empty"),
    "wrappers around a native version": (
        f"{SCENE} --obs-keys place --vectorization native --wrappers gymnasium.wrappers:FlattenObservation",
        "wrappers need Gymnasium environments, but vectorization=native",
    ),
    "a tensor version that doesn't exist": (f"{SCENE} --vectorization tensor", "vectorization=tensor knows"),
    "rescaled choices": (f"{SCENE} --rescale-actions", "rescale_actions needs Box actions"),
    "a Beta of choices": ("--action-distribution beta", "action_distribution=beta needs Box actions, but .* discrete"),
    "a typo of a distribution": (
        "--action-distribution bta",
        "'bta' must be gaussian or squashed or beta; did you mean",
    ),
    "the standard deviation of choices": ("--state-dependent-std", "state_dependent_std needs Box actions"),
    "the standard deviation of a Beta": (
        "--env-id Pendulum-v1 --action-distribution beta --state-dependent-std",
        "state_dependent_std with action_distribution=beta, whose parameters all depend on the state already",
    ),
    "bounded actions rescaled": (
        "--env-id Pendulum-v1 --action-distribution squashed --rescale-actions",
        "rescale_actions with action_distribution=squashed, whose actions are scaled to the bounds anyway",
    ),
}


def refusal(tmp_path, monkeypatch, capsys, command):
    """Run a command in an empty folder and return its only line."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert main(command.split()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert not list(folder.iterdir()), "no folder is made"
    return said.err


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("where", ["--run-dir run", ""])
def test_wrong_combinations_are_one_line_and_leave_no_folder(tmp_path, monkeypatch, capsys, name, where):
    flags, message = REFUSED[name]
    given = [flag for flag in SIZES.split(" --") if f"--{flag.removeprefix('--').split()[0]}" not in flags.split()]
    sizes = " ".join(f"--{flag.removeprefix('--')}" for flag in given)
    err = refusal(tmp_path, monkeypatch, capsys, f"train {sizes} {flags} {where}")
    pattern = ".*".join(map(re.escape, message.split(".*")))
    assert re.search(pattern, err), err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a policy with memory that reads two keys."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    command = f"train {SIZES} {SCENE} --obs-keys place direction --memory gru --run-dir {folder}"
    assert main(command.split()) == 0
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--obs-keys place direction --memory lstm", "memory gru there, lstm here"),
        ("--obs-keys place direction", "memory gru there, none here"),
        ("--obs-keys place direction --memory gru --memory-size 32", "memory_size 64 there, 32 here"),
        ("--obs-keys place --memory gru", "observations .*direction: discrete"),
        ("--obs-keys place direction --critic-obs-keys pair --memory gru", "for the critic"),
        ('--obs-keys place direction --memory gru --env-kwargs {"masks":"none"}', "mask (4,) there, .* here"),
    ],
)
def test_a_policy_of_another_kind_starts_no_run(tmp_path, monkeypatch, capsys, run, flags, message):
    err = refusal(tmp_path, monkeypatch, capsys, f"train {SIZES} {SCENE} {flags} --init-from {run}")
    pattern = ".*".join(map(re.escape, f"init_from: .* holds another policy: .*{message}".split(".*")))
    assert re.search(pattern, err), err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--memory lstm", "memory gru there, lstm here"),
        ("--obs-keys place", "direction: discrete (4,) + place: vector (3,) + action_mask: mask (4,) there, place"),
        ("--critic-obs-keys pair", "for the critic"),
    ],
)
def test_a_resume_keeps_keys_and_memory(run, capsys, flags, message):
    given = {"--obs-keys": "place direction", "--memory": "gru"}
    name, _, value = flags.partition(" ")
    settings = " ".join(f"{key} {text}" for key, text in (given | {name: value}).items())
    assert main(f"train {SIZES} {SCENE} {settings} --run-dir {run} --resume auto".split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert message in err


def test_keys_are_checked_without_torch(tmp_path):
    code = (
        "import sys; from fastppo.cli import main; "
        f"status = main('train {SCENE} --obs-keys plase'.split()); print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout == "2 False\n", done.stderr
