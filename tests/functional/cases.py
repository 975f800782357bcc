"""Random rollouts for tests of GAE."""

import numpy as np
import torch

from fastppo.functional.gae import Trajectory

# (fraction terminated, fraction truncated)
PATTERNS = {"none": (0, 0), "terminated": (0.1, 0), "truncated": (0, 0.1), "both": (0.2, 0.2), "every row": (0.5, 1)}


def make_case(t, n, pattern, gamma=0.99, gae_lambda=0.95, seed=0):
    rng = np.random.default_rng(seed)
    p_term, p_trunc = PATTERNS[pattern]
    terminated, truncated = rng.random((t, n)) < p_term, rng.random((t, n)) < p_trunc
    return {
        "rewards": rng.normal(size=(t, n)).astype(np.float32),
        "values": rng.normal(size=(t, n)).astype(np.float32),
        "next_values": rng.normal(size=(t, n)).astype(np.float32),
        "terminated": terminated,
        "done": terminated | truncated,
        "gamma": gamma,
        "gae_lambda": gae_lambda,
    }


def as_tensors(case, dtype=torch.float32):
    """Return the arguments of a kernel."""
    tensors = [torch.as_tensor(case[name]) for name in Trajectory._fields]
    tensors = [x if x.dtype == torch.bool else x.to(dtype) for x in tensors]
    return [
        Trajectory(*tensors),
        torch.tensor(case["gamma"], dtype=dtype),
        torch.tensor(case["gae_lambda"], dtype=dtype),
    ]
