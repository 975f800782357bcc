"""Tests that need a GPU, most important first; `scripts/test-gpu` runs each in a process of its own.

Nothing here may touch CUDA while it is imported: the process of a test could not use a GPU then.
"""

import numpy as np
import pytest
import torch

from fastppo import Trainer
from fastppo.envs.make_envs import TASKS, inspect_env, make_vec_env
from fastppo.envs.tensor.task import uniforms
from fastppo.envs.vec_env import Transitions, env_seeds
from fastppo.errors import CaptureError
from fastppo.functional.gae import choose_gae, gae_loop
from fastppo.resume_run import resume
from fastppo.runtime.graphs import capture
from tests.envs.test_trees import HallTask
from tests.envs.trees import Scene
from tests.functional.cases import PATTERNS, as_tensors, make_case
from tests.worlds import ACTIONS, SumTask, short

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode")]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
HALL = {"env_id": "fastppo-tests/Hall-v0"}  # Dict observations with a mask of allowed actions
SCENE = {"vectorization": "sync", "env_id": "Scene"}  # the same on the host


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for name, task in {HALL["env_id"]: HallTask, **dict.fromkeys(ACTIONS, SumTask)}.items():
        monkeypatch.setitem(TASKS, name, task)


def train(tmp_path, name, **settings):
    """Train a short run on the GPU; return its trainer, and the scalars of each iteration without times."""
    defaults = {"vectorization": "tensor", "n_envs": 8, "n_steps": 16, "total_timesteps": 8 * 16 * 6, "device": "cuda"}
    make_env = Scene if settings.get("env_id") == SCENE["env_id"] else None
    trainer = Trainer(short(tmp_path, run_dir=tmp_path / name, **(defaults | settings)), make_env=make_env)
    rows = [
        {k: v for k, v in s.scalars.items() if "time/" not in k and "sps" not in k.lower()}
        for s in trainer.iterations()
    ]
    return trainer, rows


def vector(trainer):
    return trainer.update.parameters.vector


@pytest.mark.parametrize("compile", ["off", "auto"])
def test_a_run_starts_and_learns(tmp_path, record_property, compile):
    record_property("gpu", torch.cuda.get_device_name())
    record_property("torch", torch.__version__)
    trainer, rows = train(tmp_path, "run", compile=compile)
    record_property("notes", trainer.notes)
    assert trainer.config.compile == {"auto": "fused"}.get(compile, compile), trainer.notes
    assert len(rows) == 6
    assert vector(trainer).isfinite().all()
    assert not any("does not work here" in note or "can't be" in note for note in trainer.notes), trainer.notes


@pytest.mark.parametrize(("t", "n"), [(1, 1), (2, 37), (37, 2), (63, 31), (64, 32), (65, 33), (128, 4096), (2048, 5)])
def test_the_triton_kernel_matches_the_gae_recursion(t, n):
    kernel = choose_gae(t, n, CUDA)
    assert kernel.__name__ == "gae_triton"
    for pattern in PATTERNS:
        trajectory, *rates = as_tensors(make_case(t, n, pattern))
        exact, _ = gae_loop(*as_tensors(make_case(t, n, pattern), torch.float64))
        advantages, returns = kernel([x.cuda() for x in trajectory], *(x.cuda() for x in rates))
        torch.testing.assert_close(advantages.cpu().double(), exact, atol=5e-5, rtol=1e-5)
        assert torch.equal(returns.cpu(), advantages.cpu() + trajectory.values)


LIKE_EAGER = {
    "plain": {},
    "sync": {"vectorization": "sync", "act_device": "cuda"},
    "native": {"vectorization": "native", "act_device": "cpu"},
    "stop by epoch": {"target_kl": 1e-4, "kl_stop": "epoch", "update_epochs": 4, "learning_rate": 0.01},
    "stop by minibatch": {"target_kl": 1e-4, "kl_stop": "minibatch", "update_epochs": 4, "learning_rate": 0.01},
    "normalised and truncated": {
        "env_id": "Pendulum-v1",
        "env_kwargs": {"max_episode_steps": 5},
        "normalize_obs": True,
        "normalize_rewards": True,
    },
    "LSTM": {"memory": "lstm", "segment_length": 8},
    "minGRU": {"memory": "mingru", "segment_length": 8},
    "Dict and masks": HALL,
    "Dict and masks, host": SCENE | {"act_device": "cuda"},
    "RND": {"rnd": True},
    "penalty": {"objective": "clip_and_penalty"},
    "adaptive rate": {"learning_rate": "adaptive:3e-4:1e-5:1e-2"},
    "Muon": {"optimizer": "muon"},
    "squashed": {"env_id": "Pendulum-v1", "action_distribution": "squashed", "state_dependent_std": True},
    "beta": {"env_id": "Pendulum-v1", "action_distribution": "beta"},
    **{env_id.partition("/")[2]: {"env_id": env_id} for env_id in ACTIONS},
    "images": {"env_id": "fastppo/Catch-v0", "n_envs": 4, "total_timesteps": 4 * 16 * 4},
    "shared trunk": {"vectorization": "sync", "act_device": "cpu", "shared_trunk": True},
}


@pytest.mark.parametrize("settings", LIKE_EAGER.values(), ids=list(LIKE_EAGER))
def test_cuda_graphs_train_like_eager_code(tmp_path, settings):
    eager, a = train(tmp_path, "eager", compile="off", **settings)
    graph, b = train(tmp_path, "graph", compile="graph", **settings)
    assert graph.config.compile == "graph"
    for one, two in zip(a[:2], b[:2], strict=True):
        assert one == pytest.approx(two, rel=2e-2, abs=2e-3, nan_ok=True)
    difference = (vector(eager) - vector(graph)).abs().max()
    assert difference < 5e-3, difference


FUSED = ("plain", "sync", "native", "stop by minibatch", "penalty", "adaptive rate", "squashed", "shared trunk")


@pytest.mark.parametrize("settings", [LIKE_EAGER[name] for name in FUSED], ids=FUSED)
def test_triton_kernels_train_like_eager_code(tmp_path, settings):
    _, a = train(tmp_path, "eager", compile="off", **settings)
    fused, b = train(tmp_path, "fused", compile="fused", **settings)
    assert fused.config.compile == "fused", fused.notes
    assert not any("not fused" in note for note in fused.notes), fused.notes
    # TF32 may flip an action, after which rollouts differ
    assert a[0] == pytest.approx(b[0], rel=5e-2, abs=5e-3, nan_ok=True)
    assert vector(fused).isfinite().all()


@pytest.mark.parametrize("changes", [{}, {"memory": "lstm"}, {"rnd": True}], ids=["plain", "LSTM", "RND"])
def test_a_run_resumes(tmp_path, changes):
    trainer, _ = train(tmp_path, "run", compile="graph", **changes)
    again = resume(trainer.run_dir, total_timesteps=8 * 16 * 8)
    assert torch.equal(vector(again), vector(trainer))
    assert again.run().global_step == 8 * 16 * 8


def test_rollout_and_update_never_synchronise_with_the_gpu(tmp_path):
    trainer, _ = train(tmp_path, "run", compile="graph", target_kl=0.01)
    trainer.learner.anneal(0.0)
    trainer.collect()
    trainer.learner()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.collect()
        trainer.learner(watch=False)  # without the read between epochs, of which an early stop needs one each
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_eager_update_never_synchronises_with_the_gpu(tmp_path):
    trainer, _ = train(tmp_path, "run", compile="off")
    trainer.learner.anneal(0.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.update.run(trainer.rollout.batch(), trainer.learner.coefs, watch=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_host_read_in_a_capture_raises_capture_error():
    x = torch.ones(2, device=CUDA)
    with pytest.raises(CaptureError, match="must not look at values on the host"):
        capture(lambda: x.mul_(x.sum().item()), keep=[x], fresh=[], device=torch.device("cuda:0"))


def test_torch_works_after_a_failed_capture(monkeypatch):
    """Without the warm-up that finds a host read beforehand: the capture itself fails, at its end."""
    monkeypatch.setattr("fastppo.runtime.graphs._WARM_UP", 0)
    x, device = torch.ones(2, device=CUDA), torch.device("cuda:0")
    with pytest.raises(CaptureError):
        capture(lambda: x.mul_(x.sum().item()), keep=[x], fresh=[], device=device)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.randn(8, device=CUDA)  # by the default generator
    torch.cuda.empty_cache()  # which fails while the allocator counts a capture as under way
    replay = capture(lambda: x.add_(1), keep=[x], fresh=[], device=device)
    replay()
    assert x.tolist() == [2, 2]


@pytest.mark.parametrize("act", ["cpu", "cuda"])
def test_truncated_host_episodes_bootstrap_from_their_final_observation_on_the_gpu(tmp_path, act):
    settings = {"vectorization": "sync", "env_kwargs": {"max_episode_steps": 7}, "act_device": act}
    on_gpu, _ = train(tmp_path, "gpu", compile="off", total_timesteps=8 * 16, **settings)
    r = on_gpu.rollout
    assert r.truncated.any()
    assert r.obs.device.type == "cuda"
    cut = r.truncated & ~r.terminated
    values = on_gpu.policy.value(r.obs[1:].flatten(0, 1)).view(r.values.shape)
    assert not torch.allclose(r.next_values[cut], values[cut]), (
        "bootstrap from the final observation, not from the first one of the next episode"
    )


def test_the_ratio_is_1_in_bf16_before_any_update(tmp_path):
    for how in ("off", "graph"):
        _, rows = train(tmp_path, how, compile=how, precision="bf16", learning_rate=0.0, hidden_sizes=(256, 256))
        assert max(abs(row["losses/approx_kl"]) for row in rows) < 1e-4


@pytest.mark.parametrize("compile", ["off", "graph"])
def test_the_memory_plan_covers_what_the_gpu_holds(tmp_path, record_property, compile):
    """The plan leaves out the environments, and what libraries take: cuBLAS's workspaces are 32 MiB and more."""
    torch.cuda.reset_peak_memory_stats()
    trainer, _ = train(tmp_path, "run", compile=compile, n_envs=16384, n_steps=64, total_timesteps=16384 * 64 * 2)
    taken, planned = torch.cuda.max_memory_allocated(), trainer.memory.total
    record_property("taken / planned", taken / planned)
    assert 0.5 * planned < taken < 1.1 * planned + 2**28


@pytest.mark.parametrize("env_id", list(TASKS))
def test_a_tensor_environment_gives_the_same_rollout_on_cpu_and_gpu(env_id):
    runs = []
    for device in (CPU, CUDA):
        env = make_vec_env(inspect_env(env_id, {}), 5, "tensor", device=device)
        to = Transitions.allocate(30, env, device)
        env.attach(to)
        to.obs[0].copy_(env.reset(env_seeds(np.random.SeedSequence(0), 5)))
        env.final_obs_buffer.clear(30)
        for t in range(30):
            env.send(t, 0)
        runs.append([x.cpu() for x in (to.obs.float(), to.rewards, to.terminated, env.capturable_state["episode"])])
    # not bit-identical: sine and cosine differ by a rounding between the devices
    torch.testing.assert_close(runs[0][0][0], runs[1][0][0], atol=1e-6, rtol=1e-6)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_random_numbers_of_tensor_environments_are_bit_identical_on_cpu_and_gpu(dtype):
    seeds = torch.arange(-50, 50) * 7_919_000_003
    drawn = [uniforms(seeds.to(device), seeds.to(device) % 13, 4, dtype).cpu() for device in (CPU, CUDA)]
    assert torch.equal(*drawn)
