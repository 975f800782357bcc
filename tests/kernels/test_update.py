"""The update's kernels: equal to torch's update, in Triton's interpreter; what they cover; the seam."""

import pytest
from torch import nn

from fastppo.functional.bounded_distributions import Beta
from fastppo.functional.distributions import Categorical, MultiCategorical
from fastppo.functional.losses import PPOLoss
from fastppo.ppo.kernel_gradient import not_fused
from tests.kernels.interpreted import run_interpreted
from tests.test_fused import make_policy
from tests.test_gpu_kernels import KERNELS

pytest.importorskip("triton", reason="Triton has no version for this platform")


@pytest.fixture(scope="module")
def found():
    return run_interpreted("tests.kernels.interpreted_updates")


def test_kernel_update_matches_torch(found):
    assert len(found["cases"]) >= 15
    for i, case in enumerate(found["cases"]):
        assert case["params"] < 1e-5, i
        assert case["report"] < 1e-4, i
        assert case["state"] < 1e-5, i
        assert case["same"], i
    assert sum(case["stopped"] for case in found["cases"]) >= 3


def test_gradients_of_odd_shapes_match_torch(found):
    for name, errors in (found["shapes"] | {"masked": found["masked"]}).items():
        assert errors["flat"] < 1e-5, name
        assert errors["diagnostics"] < 1e-4, name
        assert errors["n_rows"] == 0, name
    assert found["masked"]["forbidden"] > 10


def test_equal_updates_give_equal_bits(found):
    assert found["repeats"]


def test_numbers_that_are_not_finite_are_skipped_as_by_torch(found):
    assert all(torchs == ours for torchs, ours in found["skipped"])
    assert any(torchs[0] > 0 for torchs, _ in found["skipped"])


def test_the_comparison_at_the_start_finds_wrong_kernels(found):
    gradient, step = found["wrong"]
    assert "its gradient differs from torch's" in gradient
    assert step == "a step of its kernels differs from torch's"


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    """Runs on the fake GPU."""
    return run_interpreted("tests.kernels.interpreted_gpu", str(tmp_path_factory.mktemp("runs")))


def test_a_run_on_a_gpu_starts_with_kernels_and_replays_them(on_gpu):
    """The comparison at the start, capture, replay; the results are those of torch."""
    found = on_gpu["cases"]
    for name, case in found.items():
        assert case["difference"] < 1e-5, name
        assert case["launched by Python"] == [], "a replay runs no Python"
        covered = name != "not covered"
        assert (case["compile"], case["kernels"]) == (("fused", True) if covered else ("graph", False)), name
    assert found["tensor"]["notes"][0].startswith("compile fused: rollout and update run in kernels; took")
    assert found["host"]["notes"][0].startswith("rollouts are not fused: there are kernels for the classic control")
    assert found["host"]["notes"][1].startswith("compile fused: the update runs in kernels; took")
    assert found["not covered"]["notes"][0] == "not fused: the policy has memory."


WITHOUT = {
    "_kernel": ("advantages use gae_doubling: the Triton kernel does not work here (CalledProcessError", True),
    "_rollout": ("rollouts are not fused: a kernel failed: CalledProcessError", True),
    **dict.fromkeys(("_differentiate", "_adam"), ("not fused: a kernel failed: CalledProcessError", False)),
}


@pytest.mark.parametrize("kernel", WITHOUT)
def test_a_run_goes_on_without_a_kernel_that_fails(on_gpu, kernel):
    case, (note, fused) = on_gpu["broken"][kernel], WITHOUT[kernel]
    assert (case["compile"], case["kernels"]) == (("fused", True) if fused else ("graph", False))
    assert len([line for line in case["notes"] if line.startswith(note)]) == 1, "one line why"
    assert case["difference"] < 1e-5


def test_every_triton_kernel_is_interpreted_here(on_gpu):
    assert {tuple(kernel) for kernel in on_gpu["known"]} == {(kernel.module, kernel.name) for kernel in KERNELS}


@pytest.mark.parametrize(
    ("policy", "loss", "why"),
    [
        (make_policy(Categorical(3)), PPOLoss("max"), None),
        (make_policy(Categorical(3), widths=(65,)), PPOLoss("max"), "wider than 64"),
        (make_policy(Categorical(3), widths=(4,) * 4), PPOLoss("max"), "more than 3 hidden layers"),
        (make_policy(Categorical(3), obs=33), PPOLoss("max"), "more than 32 features"),
        (make_policy(MultiCategorical((1,) * 9)), PPOLoss("max"), "more than 8 components"),
        (make_policy(Categorical(17)), PPOLoss("max"), "more than 16 outputs"),
        (make_policy(Categorical(3), widths=(4,) * 3, shared=True), PPOLoss("max"), "more than 2 hidden layers"),
        (make_policy(Beta(2)), PPOLoss("max"), "the distribution is Beta"),
        (make_policy(Categorical(3)), nn.Identity(), "the loss is Identity"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else "",
)
def test_not_fused_gives_the_reason(policy, loss, why):
    reason = not_fused(policy, loss)
    assert (reason is None) == (why is None)
    assert why is None or why in reason
