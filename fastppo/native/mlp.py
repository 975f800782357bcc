"""Updating and acting in C (`mlp.c`), for policies of fully connected layers on a CPU.

Everything here is addresses and sizes: tensors stay those of the caller, who keeps them alive during a call.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastppo.native.library import NativeError, load

MOST_LAYERS = 8  # hidden layers of a trunk, as in mlp.c
ACTIVATIONS = ("tanh", "relu", "elu", "silu", "gelu")
DISTRIBUTIONS = ("categorical", "bernoulli", "gaussian", "squashed")
VALUE_CLIPS = ("off", "max", "clipped_only")

_long, _float_at = ctypes.c_long, ctypes.c_void_p


class _Linear(ctypes.Structure):
    _fields_ = (("weight", _long), ("bias", _long))


class _Distribution(ctypes.Structure):
    _fields_ = (("kind", _long), ("n", _long), ("nvec", ctypes.POINTER(_long)))


class Network(ctypes.Structure):
    """Two trunks of hidden layers, or a shared one, with a head each; made by `network`."""

    _fields_ = (
        ("features", _long),
        ("actor_features", _long),
        ("n_layers", _long),
        ("widths", _long * MOST_LAYERS),
        ("activation", _long),
        ("shared", _long),
        ("outputs", _long),
        ("critic", _Linear * (MOST_LAYERS + 1)),
        ("actor", _Linear * (MOST_LAYERS + 1)),
        ("free_std", _long),
        ("log_std", _long),
        ("size", _long),
        ("distribution", _Distribution),
        ("params", _long),
    )


class Rows(ctypes.Structure):
    """Where the columns of packed rows begin; features come first, and -1 stands for a column that is missing."""

    _fields_ = (
        ("at", _float_at),
        ("width", _long),
        ("mask", _long),
        ("old", _long),
        ("action", _long),
        ("logprob", _long),
        ("advantage", _long),
        ("target", _long),
        ("value", _long),
        ("valid", _long),
    )


class Loss(ctypes.Structure):
    """Whether the surrogate is clipped, whether the KL is penalised, and the index of the value clip."""

    _fields_ = (("clips", _long), ("penalizes", _long), ("value_clip", _long))


class Coefficients(ctypes.Structure):
    """Addresses of the coefficients, float32 each."""

    _fields_ = tuple(
        (name, _float_at) for name in ("learning_rate", "clip", "value_clip", "value", "entropy", "max_norm", "kl")
    )


class State(ctypes.Structure):
    """Addresses of the tensors that an update changes; see `ppo.update_step.UpdateState` and `ppo.update.PPOUpdate`."""

    _fields_ = (
        *((name, _float_at) for name in ("params", "mean", "square", "left1", "left2")),
        *((name, _float_at) for name in ("sums", "kl_limit", "stop_kl", "skipped", "epoch_limit", "last_kl")),
        ("exact_kl", _long),
        ("stops_epochs", _long),
        ("adam_eps", ctypes.c_float),
    )


class Input(ctypes.Structure):
    """How observations become features: by float64 moments and a clip, or divided where `mean` is None."""

    _fields_ = (("mean", _float_at), ("scale", _float_at), ("clip", ctypes.c_float), ("divisor", ctypes.c_float))


class Group(ctypes.Structure):
    """Environments that act together: addresses of step 0, bytes from step to step, and how many they are."""

    _fields_ = (
        ("net", ctypes.POINTER(Network)),
        ("params", _float_at),
        ("input", ctypes.POINTER(Input)),
        *((name, _float_at) for name in ("obs", "noise", "outputs", "actions")),
        *((name, _long) for name in ("obs_step", "noise_step", "outputs_step", "actions_step", "n")),
        ("workspace", _float_at),
        ("parts", ctypes.c_int),
    )


class Layers(NamedTuple):
    """Weights [out, in] and biases [out] of hidden layers, then of the head, as offsets in a vector of parameters."""

    weights: Sequence[int]
    biases: Sequence[int]


@functools.cache
def unavailable() -> str | None:
    """Return why updates in C can't be used on this machine, or None."""
    try:
        load("mlp")
        for name in ("gae", "metrics"):  # which always go with it
            load(name)
    except NativeError as error:
        return str(error)
    return None


def network(
    *,
    features: int,
    actor_features: int,
    widths: Sequence[int],
    activation: str,
    critic: Layers,
    actor: Layers,
    outputs: int,
    log_std: int | None,
    size: int,
    distribution: Literal["categorical", "bernoulli", "gaussian", "squashed"],
    nvec: Sequence[int],
    components: int,
    params: int,
) -> Network:
    """Describe a network to C.

    Args:
        features: of an observation.
        actor_features: how many of them, the first, the actor reads.
        widths: of the hidden layers of a trunk, at most MOST_LAYERS.
        activation: one of ACTIVATIONS.
        critic: layers of the critic.
        actor: layers of the actor; the head alone, if the two share the critic's hidden layers.
        outputs: of the actor's head.
        log_std: offset of the log standard deviations that are parameters of their own.
        size: of the vector of parameters.
        distribution: of actions.
        nvec: choices of each component of a categorical distribution.
        components: of an action.
        params: of the distribution.
    """
    net = Network(
        features=features,
        actor_features=actor_features,
        n_layers=len(widths),
        activation=ACTIVATIONS.index(activation),
        shared=len(actor.weights) == 1,
        outputs=outputs,
        free_std=log_std is not None,
        log_std=log_std or 0,
        size=size,
        params=params,
    )
    net.widths[: len(widths)] = list(widths)
    for to, layers in ((net.critic, critic), (net.actor, actor)):
        first = len(widths) + 1 - len(layers.weights)
        for i, (weight, bias) in enumerate(zip(layers.weights, layers.biases, strict=True)):
            to[first + i] = _Linear(weight, bias)
    kind = DISTRIBUTIONS.index(distribution)
    net.choices = (_long * max(1, len(nvec)))(*nvec)  # kept alive: C reads it
    net.distribution = _Distribution(kind, components, net.choices)
    return net


def address(x: Tensor) -> int:
    """Return the address of a contiguous tensor's data."""
    assert x.is_contiguous(), x.stride()
    return x.data_ptr()


def new_workspace(net: Network, threads: int) -> Tensor:
    """Return the memory, float32 zeros, that `threads` threads need to update or run `net`."""
    size = load("mlp").mlp_workspace
    size.restype = _long
    return torch.zeros(size(ctypes.byref(net), ctypes.c_int(threads)))


def gradient(
    net: Network,
    rows: Rows,
    loss: Loss,
    coefs: Coefficients,
    params: Tensor,
    order: Tensor,
    scale: Tensor,
    threads: int,
    workspace: Tensor,
    n_diagnostics: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient [P] of the mean loss of the rows `order` [B], int64, diagnostics, and the rows that count."""
    flat, diagnostics, n_valid = params.new_empty(params.shape), params.new_empty(n_diagnostics), params.new_empty(())
    load("mlp").mlp_gradient(
        *map(ctypes.byref, (net, rows, loss, coefs)),
        *map(_pointer, (params, order, scale)),
        _long(len(order)),
        ctypes.c_int(threads),
        *map(_pointer, (workspace, flat, diagnostics, n_valid)),
    )
    return flat, diagnostics, n_valid


def epochs(
    net: Network,
    rows: Rows,
    loss: Loss,
    coefs: Coefficients,
    state: State,
    orders: Tensor,
    scales: Tensor,
    threads: int,
    workspace: Tensor,
) -> None:
    """Take a step on each minibatch: orders [E, M, B] int64, scales [E, M, 2]; changes what `state` points to."""
    load("mlp").mlp_epochs(
        *map(ctypes.byref, (net, rows, loss, coefs, state)),
        *map(_pointer, (orders, scales)),
        *map(_long, orders.shape),
        ctypes.c_int(threads),
        _pointer(workspace),
    )


def pack(net: Network, vector: Tensor, workspace: Tensor) -> None:
    """Lay out the parameters in `workspace`, for `Actor` and `values`."""
    load("mlp").mlp_pack(ctypes.byref(net), ctypes.c_void_p(vector.data_ptr()), _pointer(workspace))


def act_function() -> Any:  # noqa: ANN401 - a function of ctypes
    """Return mlp_act of mlp.c, which takes the address of a `Group` and the step."""
    act = load("mlp").mlp_act
    act.argtypes, act.restype = (ctypes.c_void_p, _long), None
    return act


def values(
    net: Network, vector: Tensor, read: Input, obs: Tensor, threads: int, workspace: Tensor, result: Tensor
) -> None:
    """Write V of obs [n, features] into `result` [n]."""
    load("mlp").mlp_values(
        ctypes.byref(net),
        ctypes.c_void_p(vector.data_ptr()),
        ctypes.byref(read),
        _pointer(obs),
        _long(result.numel()),
        ctypes.c_int(threads),
        *map(_pointer, (workspace, result)),
    )


def logprobs(net: Network, params: Tensor, actions: Tensor, threads: int, workspace: Tensor, result: Tensor) -> None:
    """Write the log-probabilities of n actions under distribution parameters [n, P] into `result` [n]."""
    load("mlp").mlp_logprobs(
        ctypes.byref(net),
        *map(_pointer, (params, actions)),
        _long(result.numel()),
        ctypes.c_int(threads),
        *map(_pointer, (workspace, result)),
    )


def _pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(address(x))
