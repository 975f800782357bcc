"""A whole rollout of a tensor environment as one Triton kernel, and V of many rows as another.

A program of the first owns BLOCK environments and takes all T steps: actor, sampling from pre-drawn noise, physics,
autoreset, stores. The environments' state stays in registers. Weights are copied to shared memory again in each step.
Only rows of the rollout are written to memory.
`fastppo.envs.tensor.tensor_env`, `Policy.decide` and `fastppo.functional.distributions` define what it computes.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo.kernels import tasks
from fastppo.kernels.layers import Precision, activate, bound_log_std, clamp, dense, item, load_bias, load_weight, tanh

_BLOCK, _BLOCK_ROWS = 32, 64
# the weights of the next step are copied to shared memory ahead; copies further ahead spill registers
_OPTIONS = {"num_warps": 4, "num_stages": 2}
_COLUMNS = tl.constexpr(16)  # of tiles of observations, noise and parameters: the smallest that a product takes


@dataclasses.dataclass(frozen=True)
class Network:
    """A network for these kernels; `Linear` is `fastppo.policies.mlp_layout.Linear`.

    Attributes:
        layers: of a trunk, then its head.
        activation: a key of `fastppo.policies.mlp.ACTIVATIONS`.
        precision: of matrix products.
        clip: of normalised observations; None: they stay as they are.
    """

    layers: tuple[object, ...]
    activation: str
    precision: Precision
    clip: float | None


@dataclasses.dataclass(frozen=True)
class Actions:
    """Actions of the four tasks: one choice, or one number.

    Attributes:
        choices: of an action; 0: it is a number, sampled from a Gaussian.
        log_std: offset of a log standard deviation that is a parameter of its own; None: the network gives it.
        n_params: of the distribution.
        squash: k of the number tanh(k u) in [-1, 1]; None: it is u.
        centre: of the bounds that [-1, 1] is mapped to.
        half_width: of them; 0 and 1 for actions that are not mapped.
        low: lowest number.
        high: highest number.
    """

    choices: int
    log_std: int | None
    n_params: int
    squash: float | None = None
    centre: float = 0.0
    half_width: float = 1.0
    low: float = 0.0
    high: float = 0.0


@dataclasses.dataclass(frozen=True)
class Simulation:
    """A tensor environment.

    Attributes:
        task: name of the task's class.
        option: its only field, 0 without one.
        features: of an observation.
        max_steps: time limit; None: there is none.
        capacity: truncated episodes of an environment in a rollout that the final observations have room for.
    """

    task: str
    option: float
    features: int
    max_steps: int | None
    capacity: int


@triton.jit
def _encode(obs, mean, scale, NETWORK: tl.constexpr):
    """Normalise a tile of observations [B, 16] as `ObsNormalizer` does, in float64; padding stays 0."""
    x = obs
    if NETWORK.clip is not None:
        columns = tl.arange(0, _COLUMNS)
        real = columns < item(NETWORK.layers, 0).n_in
        centred = obs.to(tl.float64) - tl.load(mean + columns, mask=real, other=0.0)[None, :]
        x = (centred * tl.load(scale + columns, mask=real, other=0.0)[None, :]).to(tl.float32)
        # not tl.clamp: NaN stays NaN
        x = tl.where(x > NETWORK.clip, NETWORK.clip, tl.where(x < -NETWORK.clip, -NETWORK.clip, x))
    return x


@triton.jit
def _forward(parameters, x, NETWORK: tl.constexpr):
    """Return the head's outputs [B, 16] for a tile of encoded observations [B, 16]."""
    depth: tl.constexpr = len(NETWORK.layers) - 1
    activation: tl.constexpr = NETWORK.activation
    precision: tl.constexpr = NETWORK.precision
    for i in tl.static_range(depth):
        # read again in each step: those of two layers would fill the registers
        weight, bias = load_weight(parameters, item(NETWORK.layers, i)), load_bias(parameters, item(NETWORK.layers, i))
        x = activate(dense(x, weight, bias, precision), activation)
    head: tl.constexpr = item(NETWORK.layers, depth)
    return dense(x, load_weight(parameters, head), load_bias(parameters, head), precision)


@triton.jit
def _column(tile, i: tl.constexpr):
    """Return column i of a tile [B, 16]."""
    return tl.sum(tl.where(tl.arange(0, _COLUMNS)[None, :] == i, tile, 0.0), 1)


@triton.jit
def _sample(params, noise, ACTIONS: tl.constexpr):
    """Return an action [B] for each row of parameters and noise [B, 16]."""
    choices: tl.constexpr = ACTIONS.choices
    if choices > 0:
        scores = params + noise
        best, action = _column(scores, 0), tl.zeros([params.shape[0]], tl.int32)
        for i in tl.static_range(1, choices):
            score = _column(scores, i)
            action = tl.where(score > best, i, action)
            best = tl.where(score > best, score, best)
        return action
    else:
        log_std, _ = bound_log_std(_column(params, 1))
        return _column(params, 0) + tl.exp(log_std) * _column(noise, 0)


@triton.jit
def _to_env(action, ACTIONS: tl.constexpr):
    """Convert an action [B] as `ToEnv` does."""
    if ACTIONS.choices > 0:
        return action
    else:
        if ACTIONS.squash is not None:
            action = tanh(ACTIONS.squash * action)
        return clamp(ACTIONS.centre + ACTIONS.half_width * action, ACTIONS.low, ACTIONS.high)


@triton.jit(do_not_specialize=["n_steps", "n_envs"])
def _rollout(
    parameters,
    mean,
    scale,
    noise,
    obs,
    dist_params,
    actions,
    rewards,
    terminated,
    truncated,
    step,
    final_obs,
    end_steps,
    counts,
    seeds,
    episodes,
    ages,
    state0,
    state1,
    state2,
    state3,
    n_steps,
    n_envs,
    NETWORK: tl.constexpr,
    ACTIONS: tl.constexpr,
    SIMULATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    task: tl.constexpr = SIMULATION.task
    option: tl.constexpr = SIMULATION.option
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < n_envs
    columns = tl.arange(0, _COLUMNS)
    is_obs = inside[:, None] & (columns[None, :] < SIMULATION.features)
    is_param = inside[:, None] & (columns[None, :] < ACTIONS.n_params)
    n_noise: tl.constexpr = ACTIONS.choices if ACTIONS.choices > 0 else 1
    is_noise = inside[:, None] & (columns[None, :] < n_noise)

    log_std = 0.0
    if ACTIONS.log_std is not None:
        log_std = tl.load(parameters + ACTIONS.log_std)

    seed = tl.load(seeds + n, mask=inside, other=0)
    episode = tl.load(episodes + n, mask=inside, other=0)
    age = tl.load(ages + n, mask=inside, other=0).to(tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    s0 = tl.load(state0 + n, mask=inside, other=0.0)
    s1 = tl.load(state1 + n, mask=inside, other=0.0)
    s2, s3 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if task == "CartPole" or task == "Acrobot":
        s2 = tl.load(state2 + n, mask=inside, other=0.0)
        s3 = tl.load(state3 + n, mask=inside, other=0.0)
    seen = tl.load(obs + n[:, None] * SIMULATION.features + columns[None, :], mask=is_obs, other=0.0)
    draw = tl.load(noise + n[:, None] * n_noise + columns[None, :], mask=is_noise, other=0.0)

    at = n.to(tl.int64)  # t * N + n
    for t in range(n_steps):
        # the noise of the next step, so that no step waits for memory
        ahead = (at + n_envs)[:, None] * n_noise + columns[None, :]
        next_draw = tl.load(noise + ahead, mask=is_noise & (t + 1 < n_steps), other=0.0)

        param = _forward(parameters, _encode(seen, mean, scale, NETWORK), NETWORK)
        if ACTIONS.log_std is not None:  # in the column after the mean, where padding is 0
            param += tl.where(columns == 1, log_std, 0.0)[None, :]
        action = _sample(param, draw, ACTIONS)
        tl.store(dist_params + at[:, None] * ACTIONS.n_params + columns[None, :], param, mask=is_param)
        tl.store(actions + at, action, mask=inside)

        a0, a1, a2, a3, reward, ended = tasks.step(task, option, s0, s1, s2, s3, _to_env(action, ACTIONS))
        age += 1
        done, out_of_time = ended, tl.zeros([BLOCK], tl.int1)
        after = tasks.observe(task, a0, a1, a2, a3, columns)
        if SIMULATION.max_steps is not None:
            out_of_time = age >= SIMULATION.max_steps
            done = ended | out_of_time
            cut = out_of_time & (ended == 0) & inside & (count < SIMULATION.capacity)
            slot = count.to(tl.int64) * n_envs + n
            tl.store(end_steps + slot, t + tl.zeros([BLOCK], tl.int64), mask=cut)
            places = slot[:, None] * SIMULATION.features + columns[None, :]
            tl.store(final_obs + places, after, mask=cut[:, None] & is_obs)
            count += cut.to(tl.int32)
        episode += done.to(tl.int64)
        # computed after the step: beside it, the reset spills registers
        f0, f1, f2, f3 = tasks.reset(task, seed, episode)
        s0, s1 = tl.where(done, f0, a0), tl.where(done, f1, a1)
        s2, s3 = tl.where(done, f2, a2), tl.where(done, f3, a3)
        seen = tasks.observe(task, s0, s1, s2, s3, columns)
        age = tl.where(done, 0, age)
        draw = next_draw

        tl.store(obs + (at + n_envs)[:, None] * SIMULATION.features + columns[None, :], seen, mask=is_obs)
        tl.store(rewards + at, reward, mask=inside)
        tl.store(terminated + at, ended.to(tl.uint8), mask=inside)
        tl.store(truncated + at, out_of_time.to(tl.uint8), mask=inside)
        at += n_envs

    tl.store(counts + n, count, mask=inside)
    tl.store(episodes + n, episode, mask=inside)
    tl.store(ages + n, age, mask=inside)
    tl.store(state0 + n, s0, mask=inside)
    tl.store(state1 + n, s1, mask=inside)
    if task == "CartPole" or task == "Acrobot":
        tl.store(state2 + n, s2, mask=inside)
        tl.store(state3 + n, s3, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(step, n_steps)


@triton.jit(do_not_specialize=["n_rows"])
def _values(parameters, mean, scale, obs, values, n_rows, NETWORK: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, columns = rows < n_rows, tl.arange(0, _COLUMNS)
    n_features: tl.constexpr = item(NETWORK.layers, 0).n_in
    places = rows[:, None] * n_features + columns[None, :]
    seen = tl.load(obs + places, mask=inside[:, None] & (columns[None, :] < n_features), other=0.0)
    out = _forward(parameters, _encode(seen, mean, scale, NETWORK), NETWORK)
    tl.store(values + rows, _column(out, 0), mask=inside)


def rollout(
    parameters: Tensor,
    moments: tuple[Tensor, Tensor],
    storage: tuple[Tensor, ...],
    finals: tuple[Tensor, ...],
    columns: tuple[Tensor, ...],
    *,
    network: Network,
    actions: Actions,
    simulation: Simulation,
) -> None:
    """Take T steps of N environments in one kernel, in place; every tensor is contiguous.

    Args:
        parameters: where the offsets of the actor's layers count from, float32.
        moments: mean and 1 / standard deviation of observations, [features] float64 each; unread without a clip.
        storage: noise [T, N, Z], obs [T + 1, N, features], params [T, N, P], actions [T, N, ...], and rewards,
            terminated and truncated [T, N].
        finals: a cleared `FinalObsBuffer`.
        columns: seeds, episodes, steps and the task's state, [N] each.
        network: the actor.
        actions: what it decides.
        simulation: the environment.
    """
    noise, obs, params, taken, rewards, terminated, truncated = storage
    n_steps, n_envs = rewards.shape
    assert all(x.is_contiguous() for x in (*storage, *finals, *columns))
    columns = (*columns, *columns[-1:] * (7 - len(columns)))  # pointers that a task of two columns doesn't read
    _rollout[(triton.cdiv(n_envs, _BLOCK),)](
        parameters,
        *moments,
        noise,
        obs,
        params,
        taken,
        rewards,
        terminated.view(torch.uint8),
        truncated.view(torch.uint8),
        *finals,
        *columns,
        n_steps,
        n_envs,
        NETWORK=network,
        ACTIONS=actions,
        SIMULATION=simulation,
        BLOCK=_BLOCK,
        **_OPTIONS,
    )


def values(parameters: Tensor, moments: tuple[Tensor, Tensor], obs: Tensor, *, network: Network) -> Tensor:
    """Return V [R] of observations [R, features], contiguous; other arguments as of `rollout`, for the critic."""
    assert obs.is_contiguous()
    out = torch.empty(len(obs), device=obs.device)
    if len(obs):
        _values[(triton.cdiv(len(obs), _BLOCK_ROWS),)](
            parameters, *moments, obs, out, len(obs), NETWORK=network, BLOCK=_BLOCK_ROWS, **_OPTIONS
        )
    return out
