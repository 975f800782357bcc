"""GAE by its definition, a discounted sum of TD errors up to the episode's end, in Python floats (float64).

Source: Schulman et al. 2016, eq. 11 and 16 (arXiv:1506.02438).
"""


def td_error(case, n, t):
    """Return r_t + gamma V(s') - V(s_t) of environment `n`; V(s') is 0 after termination."""
    future = 0.0 if case["terminated"][t][n] else case["next_values"][t][n]
    return case["rewards"][t][n] + case["gamma"] * future - case["values"][t][n]


def advantage_by_definition(case, n, t):
    """Return A_t = sum over k >= 0 of (gamma lambda)^k delta_{t+k}, up to the end of the episode or the rollout."""
    total, weight = 0.0, 1.0
    for k in range(t, len(case["rewards"])):
        total += weight * td_error(case, n, k)
        if case["done"][k][n]:
            break
        weight *= case["gamma"] * case["gae_lambda"]
    return total


def advantages_by_definition(case):
    """Return the advantages as a [T][N] table.

    The sum is quadratic in T on purpose: a linear backward pass would be the recursion under test. It ends early at
    weights below 1e-18, which are negligible in float64.
    """
    steps, envs = len(case["rewards"]), len(case["rewards"][0])
    deltas = [[td_error(case, n, t) for n in range(envs)] for t in range(steps)]
    table = [[0.0] * envs for _ in range(steps)]
    decay = case["gamma"] * case["gae_lambda"]
    for n in range(envs):
        for t in range(steps):
            total, weight = 0.0, 1.0
            for k in range(t, steps):
                total += weight * deltas[k][n]
                weight *= decay
                if case["done"][k][n] or weight < 1e-18:
                    break
            table[t][n] = total
    return table
