"""GAE as the paper writes it: discounted TD errors summed to the episode's end. Plain Python floats (float64)."""


def td_error(case, n, t):
    """r_t + gamma V(s') - V(s_t), the future being worth nothing after a real end."""
    future = 0.0 if case["terminated"][t][n] else case["next_values"][t][n]
    return case["rewards"][t][n] + case["gamma"] * future - case["values"][t][n]


def advantage_by_definition(case, n, t):
    """A_t = sum over k of (gamma lambda)^k delta_{t+k}, the sum ending with the episode or the rollout."""
    total, weight = 0.0, 1.0
    for k in range(t, len(case["rewards"])):
        total += weight * td_error(case, n, k)
        if case["done"][k][n]:
            break
        weight *= case["gamma"] * case["gae_lambda"]
    return total


def advantages_by_definition(case):
    """The whole [T][N] table. Linear in T by walking each episode's weights backwards would be the recursion under
    test, so this stays quadratic but for weights that have vanished in float64."""
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
