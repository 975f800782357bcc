"""The choice of a training device, on a machine whose GPUs are mocked; and what config and resume keep of it."""

import json

import pytest
import torch

from fastppo import Config
from fastppo.builders.resolve import resolve_config
from fastppo.envs.make_envs import inspect_env
from fastppo.errors import ConfigError
from fastppo.resume_run import resume
from fastppo.runs.checkpoint import newest_checkpoint
from fastppo.runs.restore import _compare
from fastppo.runs.state_files import read_state
from fastppo.runtime.device import choose_device
from fastppo.runtime.seeding import generator, restore_generator
from fastppo.trainer import Trainer
from tests.envs.worlds import Counter
from tests.worlds import short


@pytest.fixture
def gpus(monkeypatch):
    """Return a function that gives this machine so many GPUs, and this process a local rank among `size`."""

    def give(count, local_rank=0, size=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))

    return give


@pytest.fixture
def current(monkeypatch):
    """Return the list of devices given to `torch.cuda.set_device`, which like the real one wants an index."""
    devices = []

    def set_device(device):
        if torch.device(device).index is None:
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
        devices.append(torch.device(device))

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    return devices


@pytest.mark.parametrize(
    ("name", "count", "local_rank", "size", "device"),
    [
        ("auto", 0, 0, 1, "cpu"),
        ("cpu", 1, 0, 1, "cpu"),
        ("auto", 1, 0, 1, "cuda:0"),
        ("cuda", 1, 0, 1, "cuda:0"),
        ("cuda", 2, 0, 2, "cuda:0"),
        ("cuda", 2, 1, 2, "cuda:1"),
        ("auto", 2, 1, 2, "cuda:1"),
        ("cuda:0", 1, 0, 1, "cuda:0"),
        ("cuda:1", 2, 0, 1, "cuda:1"),
    ],
)
def test_a_cuda_device_has_an_index(gpus, current, name, count, local_rank, size, device):
    gpus(count, local_rank, size)
    chosen = choose_device(name)
    assert chosen == torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        assert current == [chosen]


@pytest.mark.parametrize(
    ("name", "count", "local_rank", "size", "message"),
    [
        ("cuda", 0, 0, 1, r"device=cuda: this torch \(.*\) sees no CUDA device; use device=cpu"),
        (
            "cuda:2",
            2,
            0,
            1,
            "this machine has no cuda:2, only devices up to cuda:1; use device=cuda:1 or lower",
        ),
        ("cuda", 1, 1, 2, "this machine has no cuda:1, only devices up to cuda:0; start one process per GPU"),
        ("cuda:1", 2, 0, 2, "device=cuda:1 under torchrun: each process takes a GPU of its own; use device=cuda"),
    ],
)
def test_a_missing_or_shared_device_is_refused(gpus, name, count, local_rank, size, message):
    gpus(count, local_rank, size)
    with pytest.raises(ConfigError, match=message):
        choose_device(name)


@pytest.mark.parametrize(("typed", "kept"), [("auto", "cuda"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_the_config_keeps_the_typed_device_and_the_type_of_auto(gpus, typed, kept):
    gpus(2)
    config = Config(device=typed, vectorization="sync")
    resolved, _ = resolve_config(config, inspect_env("CartPole-v1", {}), choose_device(typed))
    assert resolved.device == kept


def test_a_trainer_sets_the_current_device(gpus, current, monkeypatch, tmp_path):
    gpus(1)

    def stop(device):
        raise ConfigError(f"stopped on {device}")

    monkeypatch.setattr("fastppo.builders.run.join_world", stop)
    with pytest.raises(ConfigError, match="stopped on cuda:0"):
        Trainer(short(tmp_path, device="auto"), make_env=Counter)
    assert current == [torch.device("cuda:0")]


def test_a_finished_run_on_the_cpu_resumes(tmp_path):
    trainer = Trainer(short(tmp_path), make_env=Counter)
    trainer.run()
    saved = json.loads((trainer.run_dir / "config.json").read_text())
    assert saved["device"] == trainer.config.device == "cpu"
    more = 2 * trainer.result.global_step
    assert resume(trainer.run_dir, total_timesteps=more, make_env=Counter).run().global_step == more


def test_a_resume_compares_the_type_of_the_device(tmp_path):
    trainer = Trainer(short(tmp_path), make_env=Counter)
    trainer.run()
    path, _ = newest_checkpoint(trainer.run_dir)
    _, about = read_state(path, 0)

    def compare(before, now):
        saved, ours = (about | {"config": about["config"] | {"device": device}} for device in (before, now))
        return _compare(path, saved, ours, trainer.spec)

    assert compare("cuda", "cuda:1") == compare("cuda:0", "cuda") == compare("cpu", "cpu") == []
    for before, now in (("cpu", "cuda"), ("cuda:1", "cpu")):
        (note,) = compare(before, now)
        assert f"device was {before}, is {now}" in note


def test_a_generator_on_another_kind_of_device_goes_on_with_a_stream_of_its_own():
    """A state of a GPU's generator is 16 bytes, and one of the CPU's some 5,000."""
    saved = torch.arange(16, dtype=torch.uint8)
    ours, same, other = (generator(1, "shuffle", torch.device("cpu")) for _ in range(3))
    restore_generator(ours, saved)
    restore_generator(same, saved)
    restore_generator(other, saved + 1)
    draws = [torch.rand(4, generator=x) for x in (ours, same, other, generator(1, "shuffle", torch.device("cpu")))]
    assert torch.equal(draws[0], draws[1])
    assert not any(torch.equal(draws[0], x) for x in draws[2:])
    state = ours.get_state()
    restore_generator(same, state)
    assert torch.equal(torch.rand(4, generator=ours), torch.rand(4, generator=same))


def test_an_update_loads_the_state_of_another_kind_of_device(tmp_path):
    update = Trainer(short(tmp_path)).update
    state = update.state_dict()
    update.load_state_dict(state | {"shuffles": state["shuffles"][:16]})
    assert not torch.equal(update.shuffle.generator.get_state(), state["shuffles"])
