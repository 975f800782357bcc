"""The rollout kernel: equal to torch's rollout, in Triton's interpreter; what it covers."""

import pytest
from torch import nn

from fastppo.ppo.kernel_rollout import not_covered
from tests.kernels.interpreted import run_interpreted

pytest.importorskip("triton", reason="Triton has no version for this platform")


@pytest.fixture(scope="module")
def found():
    return run_interpreted("tests.kernels.interpreted_rollouts")


def test_rollouts_equal_those_of_torch_and_continue_alike(found):
    assert len(found["cases"]) == 8
    for i, case in enumerate(found["cases"]):
        exact = ("terminated", "truncated", "done", "final_step", "final_end_steps", "final_counts", "seed", "episode")
        assert {case["worst"][name] for name in exact if name in case["worst"]} == {0.0}, i
        assert {name: x for name, x in case["worst"].items() if x > 1e-4} == {}, i
    assert sum(case["terminated"] > 0 for case in found["cases"]) >= 3
    assert sum(case["truncated"] > 0 for case in found["cases"]) >= 5


def test_the_comparison_at_the_start_finds_a_wrong_kernel(found):
    equal, differs = found["check"]
    assert equal == "equal"
    assert "truncated differ from torch's" in differs or "obs differ" in differs


def test_not_covered_gives_the_reason():
    from tests.kernels.interpreted_rollouts import Case, collector

    _, env, policy = collector(Case("CartPole-v1", 500))
    assert not_covered(policy, env) is None
    _, env, policy = collector(Case("CartPole-v1", 500, hidden=(65,)))
    assert "wider than 64" in not_covered(policy, env)
    policy.network = nn.Linear(4, 2)
    assert "not the MLP" in not_covered(policy, env)
