"""Updates by the kernels in Triton's interpreter and by torch, compared; run with TRITON_INTERPRET=1."""

import functools
import json
import math
import sys

import numpy as np
import pytest
import torch
from gymnasium import spaces

from fastppo.functional.distributions import Categorical, Gaussian, MultiCategorical
from fastppo.functional.losses import Batch, PPOLoss
from fastppo.kernels import update as kernels
from fastppo.policies.encoder import Encoder
from fastppo.policies.flat_parameters import FlatParameters
from fastppo.policies.mlp import MLP
from fastppo.policies.policy import Policy
from fastppo.ppo import fused_gradient, kernel_gradient
from fastppo.ppo.kernel_gradient import KernelGradient
from fastppo.ppo.minibatches import Minibatch
from fastppo.ppo.update_step import LossGradient
from fastppo.runtime.compile import CompileError
from fastppo.spaces.observations import ObsSpec
from fastppo.spaces.packing import leaves_of, mask_leaf
from tests.test_fused import DISTRIBUTIONS, OPTIONS, make_batch, make_policy, pairwise, update_of_case
from tests.test_update import coefficients, learn, named

ROWS = 86  # in two minibatches of 43: a block and a part of one


def make_update(policy, case, kernel):
    """Return an update of `case`, by kernels or by torch."""
    update = update_of_case(policy, case, update_epochs=2, n_minibatches=2)
    update._on_gpu = kernel
    return update


def run(case, kernel, *, change=None, compares=False, **shape):
    """Return parameters, report and state after an update, which starts with a comparison if it `compares`."""
    policy = make_policy(DISTRIBUTIONS[case["distribution"]], **shape)
    batch = make_batch(policy, ROWS, valid=torch.arange(ROWS) % 5 != 0 if case["fillers"] else None)
    if change is not None:
        change(batch)
    update = make_update(policy, case, kernel)
    coefs = coefficients(learning_rate=2e-2, kl_coef=0.5)._replace(**update.adapted)
    if kernel:
        before = [x.clone() for x in update.kept()]
        with pytest.MonkeyPatch.context() as patch:
            if not compares:  # it takes as long as the update, and `wrong` tests it
                patch.setattr(kernel_gradient, "in_each_precision", lambda _: None)
            update.fuse(batch, 2)
        assert all(map(torch.equal, before, update.kept())), "it changes no state"
        assert isinstance(update._step.gradient, KernelGradient)
    report = learn(update, batch, coefs, case["limit"])
    return update.state.params.clone(), report, update.state_dict()


def worst(x, y, relative=0.0):
    """Return the largest difference, which counts the less the larger the number; NaN equals NaN."""
    error = (x.double() - y.double()).abs() / (1 + relative * y.double().abs())
    return float(torch.where(x.isnan() & y.isnan() | (x == y), 0.0, error).nan_to_num(math.inf).max())


def compare(case, *, compares):
    """Return how far the kernels' update is from torch's."""
    (params, report, state), (ours, our_report, our_state) = (run(case, x, compares=compares) for x in (False, True))
    names = [name for name in state if name != "shuffles"]
    return {
        "params": worst(ours, params),
        "report": worst(our_report, report, relative=1.0),
        "state": max(worst(our_state[name], state[name], relative=10.0) for name in names),
        "stopped": named(report[:14])["stopped"],
        "same": named(our_report[:14])["minibatches_run"] == named(report[:14])["minibatches_run"],
    }


PLAIN = {name: values[0] for name, values in OPTIONS.items()}


def gradients(policy, batch, loss, **coefs):
    """Return the largest differences of a gradient and its diagnostics."""
    flat = FlatParameters(policy.network)
    order = torch.randperm(len(batch.logprobs), generator=torch.Generator().manual_seed(3))
    found = []
    for kind in (LossGradient, functools.partial(KernelGradient, programs=2)):
        gradient = kind(policy, flat, loss, scale_advantages=True)
        minibatch = Minibatch(torch.tensor([0.1, 1.5]), order, gradient.pack(batch))
        values = coefficients(kl_coef=0.5, **coefs)
        found.append(gradient(flat.vector.clone(), minibatch, values, gradient.constants))
    torchs, ours = found
    return {
        "flat": worst(ours.flat, torchs.flat) / float(torchs.flat.abs().max()),
        "diagnostics": worst(ours.diagnostics, torchs.diagnostics, relative=1.0),
        "n_rows": worst(ours.n_rows, torchs.n_rows),
    }


def shapes():
    """Compare gradients of networks of odd shapes, and at the ends of ranges."""
    gaussian = Gaussian(3)
    cases = {
        "one unit": (make_policy(Categorical(2), obs=1, widths=(1,)), {}),
        "three layers": (make_policy(gaussian, obs=17, widths=(64, 33, 16), activation="silu"), {}),
        "wide": (make_policy(Categorical(16), obs=31, widths=(64, 64), activation="relu"), {}),
        "shared": (make_policy(gaussian, widths=(20, 7), shared=True, activation="gelu"), {}),
        "deviations of the network": (make_policy(gaussian, free_std=False, activation="elu"), {}),
        "features of the critic": (make_policy(gaussian, obs=20, critic=13), {}),
        "all values clipped": (make_policy(gaussian), {"value_clip_coef": 0.0}),
        "no values clipped": (make_policy(gaussian), {"value_clip_coef": -1.0}),
    }
    found = {}
    for name, (policy, coefs) in cases.items():
        loss = PPOLoss("max", "clip_and_penalty")
        found[name] = gradients(policy, make_batch(policy, 37), loss, **coefs)
    policy = make_policy(Gaussian(2))
    with torch.no_grad():
        policy.network.actor.log_std.copy_(torch.tensor([-12.0, 4.0]))
    found["deviations beyond their bounds"] = gradients(policy, make_batch(policy, 37), PPOLoss("max"), clip_coef=1e6)
    return found


def masked():
    """Compare gradients of two choices of which some are forbidden."""
    action = MultiCategorical((3, 2))
    spec = ObsSpec(leaves_of(spaces.Box(-1, 1, (4,), np.float32), mask=mask_leaf("info", 5)))
    torch.manual_seed(0)
    network = MLP(4, 5, free_std=False, hidden_sizes=(8,), activation="tanh", shared_trunk=False)
    policy, n = Policy(Encoder(spec), network, action), 50
    draws = torch.Generator().manual_seed(1)
    obs, mask = fused_gradient._made_up_obs(policy, n, draws)
    with torch.no_grad():
        params = policy(obs).params
    numbers = torch.randn(4, n, generator=draws)
    batch = Batch(obs, action.mode(params), numbers[0] - 1, params, *numbers[1:], None)
    return {**gradients(policy, batch, PPOLoss("max", "penalty")), "forbidden": int((mask == 0).sum())}


def wrong(name, change):
    """Return what the comparison at the start says of kernels whose function `name` is changed."""
    right = getattr(kernels, name)
    setattr(kernels, name, change(right))
    policy = make_policy(Categorical(3))
    try:
        make_update(policy, PLAIN, kernel=True).fuse(make_batch(policy, 32), 2)
    except CompileError as error:
        return str(error)
    finally:
        setattr(kernels, name, right)
    return None


def larger(differentiate):
    """Return a gradient that is 2 % too large."""

    def changed(*args, **kwargs):
        gradient, squares = differentiate(*args, **kwargs)
        gradient[: -kernels.N_FIGURES] *= 1.02
        return gradient, squares

    return changed


def skipped():
    """Return the minibatches skipped and run, by torch and by kernels, for numbers that are not finite."""
    found = []
    for distribution, field in [("categorical", "returns"), ("bits", "advantages"), ("gaussian", "params")]:
        for value in (math.nan, math.inf):

            def spoil(batch, field=field, value=value):
                getattr(batch, field).view(ROWS, -1)[17, 0] = value

            case = PLAIN | {"distribution": distribution}
            runs = [named(run(case, kernel, change=spoil)[1]) for kernel in (False, True)]
            counts = ("skipped_minibatches", "minibatches_run", "skipped_in_a_row")
            found.append([[report[name] for name in counts] for report in runs])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    fused_gradient._EXAMPLE_ROWS = 33  # the interpreter is slow
    repeated = [run(PLAIN, kernel=True)[0] for _ in range(2)]
    json.dump(
        {
            "cases": [compare(case, compares=i < 3) for i, case in enumerate(pairwise(OPTIONS))],
            "shapes": shapes(),
            "repeats": torch.equal(*repeated),
            "skipped": skipped(),
            "masked": masked(),
            "wrong": [
                wrong("differentiate", larger),
                wrong("take_step", lambda _: lambda *args, **kwargs: None),
            ],
        },
        sys.stdout,
    )
