"""Tests that need a GPU; `scripts/test-gpu` runs them."""

import numpy as np
import pytest
import torch

from fastppo import Trainer
from fastppo.envs.make_envs import TASKS, inspect_env, make_vec_env
from fastppo.envs.tensor.task import uniforms
from fastppo.envs.vec_env import Transitions, env_seeds
from fastppo.errors import CaptureError
from fastppo.functional.gae import choose_gae, gae_loop
from fastppo.runtime.graphs import capture
from tests.functional.test_gae import PATTERNS, as_tensors, make_case
from tests.worlds import short

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(("t", "n"), [(1, 1), (2, 37), (37, 2), (63, 31), (64, 32), (65, 33), (128, 4096), (2048, 5)])
def test_the_triton_kernel_matches_the_gae_recursion(t, n):
    kernel = choose_gae(t, n, CUDA)
    assert kernel.__name__ == "gae_triton"
    for pattern in PATTERNS:
        inputs = as_tensors(make_case(t, n, pattern))
        exact, _ = gae_loop(*(x.double() if x.is_floating_point() else x for x in inputs))
        advantages, returns = kernel(*(x.cuda() for x in inputs))
        torch.testing.assert_close(advantages.cpu().double(), exact, atol=5e-5, rtol=1e-5)
        assert torch.equal(returns.cpu(), advantages.cpu() + inputs[1])


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


def train(tmp_path, name, **settings):
    defaults = {"vectorization": "tensor", "n_envs": 8, "n_steps": 16, "total_timesteps": 8 * 16 * 6, "device": "cuda"}
    trainer = Trainer(short(tmp_path, run_dir=tmp_path / name, **(defaults | settings)))
    rows = [
        {k: v for k, v in s.scalars.items() if "time/" not in k and "sps" not in k.lower()}
        for s in trainer.iterations()
    ]
    return trainer, rows


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_kl": 1e-4, "kl_stop": "epoch", "update_epochs": 4, "learning_rate": 0.01},
        {"target_kl": 1e-4, "kl_stop": "minibatch", "update_epochs": 4, "learning_rate": 0.01},
        {
            "env_id": "Pendulum-v1",
            "env_kwargs": {"max_episode_steps": 5},
            "normalize_obs": True,
            "normalize_rewards": True,
        },
        {"env_id": "fastppo/Catch-v0", "n_envs": 4, "total_timesteps": 4 * 16 * 4},
        {"env_id": "Pendulum-v1", "action_distribution": "squashed", "state_dependent_std": True},
        {"env_id": "Pendulum-v1", "action_distribution": "beta"},
        {"vectorization": "sync", "act_device": "cuda"},
        {"vectorization": "native", "act_device": "cpu"},
        {"vectorization": "sync", "act_device": "cpu", "shared_trunk": True},
    ],
    ids=[
        "plain",
        "stop by epoch",
        "stop by minibatch",
        "normalised and truncated",
        "images",
        "squashed",
        "beta",
        "sync",
        "native",
        "compiled",
    ],
)
def test_cuda_graphs_train_like_eager_code(tmp_path, settings):
    eager, a = train(tmp_path, "eager", compile="off", **settings)
    graph, b = train(tmp_path, "graph", compile="graph", **settings)
    assert graph.config.compile == "graph"
    for one, two in zip(a[:2], b[:2], strict=True):
        assert one == pytest.approx(two, rel=2e-2, abs=2e-3, nan_ok=True)
    difference = (eager.update.parameters.vector - graph.update.parameters.vector).abs().max()
    assert difference < 5e-3, difference


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
        capture(lambda: x.mul_(x.sum().item()), keep=[x], fresh=[], device=CUDA)


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
