"""The comparison of kernels with torch at the start, where a GPU rounds to TF32: tensor cores keep 10 bits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastppo.functional.distributions import Categorical, Gaussian
from fastppo.functional.losses import PPOLoss
from fastppo.policies.flat_parameters import FlatParameters
from fastppo.ppo.fused_gradient import check_gradient
from fastppo.ppo.kernel_gradient import _TOLERANCE, in_each_precision
from fastppo.ppo.update_step import LossGradient
from fastppo.runtime.compile import CompileError
from tests.test_fused import make_policy

aten = torch.ops.aten
# how torch's and Triton's products may round their factors: to the nearest number, or towards 0
ROUNDINGS = {"nearest": 0x1000, "towards zero": 0}


class TF32(TorchDispatchMode):
    """Rounds the factors of matrix products to TF32."""

    def __init__(self, rounding):
        super().__init__()
        self.half, self.products = ROUNDINGS[rounding], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten.mm.default, aten.addmm.default):
            self.products += 1
            args = (*args[:-2], *map(self.rounded, args[-2:]))
        return func(*args, **(kwargs or {}))

    def rounded(self, x):
        return ((x.contiguous().view(torch.int32) + self.half) & ~0x1FFF).view(torch.float32)


class InTF32:
    """A gradient whose matrix products are in TF32."""

    constants = ()

    def __init__(self, gradient, rounding, change=lambda gradient: gradient):
        self.gradient, self.rounding, self.change, self.pack = gradient, rounding, change, gradient.pack

    def __call__(self, *arguments):
        with TF32(self.rounding) as mode:
            found = self.gradient(*arguments)
        assert mode.products > 8, "forward and backward of two trunks"
        return self.change(found)


def check(rounding, *change, distribution=None, activation="tanh", tolerance=_TOLERANCE["tf32"]):
    policy = make_policy(distribution or Gaussian(6), obs=17, widths=(64, 64), activation=activation)
    parameters, loss = FlatParameters(policy.network), PPOLoss("max")
    gradient = InTF32(LossGradient(policy, parameters, loss, scale_advantages=True), rounding, *change)
    check_gradient(gradient, policy, parameters, loss, fillers=False, tolerance=tolerance)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
@pytest.mark.parametrize("distribution", [Categorical(3), Gaussian(6)], ids=["categorical", "gaussian"])
def test_kernels_that_round_otherwise_than_torch_are_taken(rounding, activation, distribution):
    check(rounding, distribution=distribution, activation=activation)


@pytest.mark.parametrize("wrong", [torch.neg, torch.zeros_like, lambda x: x.flip(0), lambda x: x * torch.nan])
def test_wrong_kernels_are_found_in_tf32(wrong):
    with pytest.raises(CompileError, match="its gradient differs"):
        check("nearest", lambda gradient: gradient._replace(flat=wrong(gradient.flat)))


def test_the_strict_comparison_needs_float32():
    with pytest.raises(CompileError, match="its gradient differs"):
        check("nearest", tolerance=_TOLERANCE["ieee"])


@pytest.mark.parametrize(("before", "compared"), [("high", ["highest", "high"]), ("highest", ["highest"])])
def test_each_precision_is_compared_and_the_one_before_restored(before, compared):
    found = []
    torch.set_float32_matmul_precision(before)
    try:
        in_each_precision(lambda: found.append(torch.get_float32_matmul_precision()))
        assert found == compared
        with pytest.raises(ZeroDivisionError):
            in_each_precision(lambda: 1 / 0)
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")
