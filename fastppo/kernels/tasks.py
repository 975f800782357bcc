"""The tasks of `fastppo.envs.tensor` as Triton device functions; the classes there define the contract.

A state is four columns [B] float32, of which a task may leave the last ones 0. TASK is the name of the task's class and
OPTION its only field.
"""

import math

import triton
import triton.language as tl

from fastppo.kernels.layers import clamp

# SplitMix64, as in `fastppo.envs.tensor.task`
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MIX1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX2 = tl.constexpr(0x94D049BB133111EB)
_PI = tl.constexpr(math.pi)
_ANGLE_LIMIT = tl.constexpr(12 * 2 * math.pi / 360)


@triton.jit
def _uniform(seed, episode, i: tl.constexpr, n: tl.constexpr):
    """Return number i of n of an episode's reset, [B] float32 in [0, 1), for seeds and episodes [B] int64."""
    z = seed.to(tl.uint64) + (episode * n + (i + 1)).to(tl.uint64) * _GAMMA
    z = (z ^ (z >> 30)) * _MIX1
    z = (z ^ (z >> 27)) * _MIX2
    z = z ^ (z >> 31)
    return (z >> 40).to(tl.int32).to(tl.float32) * 2.0**-24


@triton.jit
def reset(TASK: tl.constexpr, seed, episode):
    """Return the first state of each episode, for seeds and episodes [B] int64."""
    if TASK == "Pendulum":
        zero = tl.zeros_like(seed).to(tl.float32)
        return (_uniform(seed, episode, 0, 2) * 2 - 1) * _PI, _uniform(seed, episode, 1, 2) * 2 - 1, zero, zero
    elif TASK == "MountainCarContinuous":
        zero = tl.zeros_like(seed).to(tl.float32)
        return _uniform(seed, episode, 0, 1) * 0.2 - 0.6, zero, zero, zero
    else:
        half_width: tl.constexpr = 0.1 if TASK == "Acrobot" else 0.05
        return (
            _uniform(seed, episode, 0, 4) * (2 * half_width) - half_width,
            _uniform(seed, episode, 1, 4) * (2 * half_width) - half_width,
            _uniform(seed, episode, 2, 4) * (2 * half_width) - half_width,
            _uniform(seed, episode, 3, 4) * (2 * half_width) - half_width,
        )


@triton.jit
def step(TASK: tl.constexpr, OPTION: tl.constexpr, s0, s1, s2, s3, action):
    """Return the next state, rewards [B] and terminated [B] bool, for actions [B], an index or a number in bounds."""
    if TASK == "CartPole":
        return _cartpole(OPTION, s0, s1, s2, s3, action)
    elif TASK == "Acrobot":
        return _acrobot(s0, s1, s2, s3, action)
    elif TASK == "Pendulum":
        return _pendulum(OPTION, s0, s1, s2, s3, action)
    else:
        tl.static_assert(TASK == "MountainCarContinuous")
        return _mountain_car(OPTION, s0, s1, s2, s3, action)


@triton.jit
def observe(TASK: tl.constexpr, s0, s1, s2, s3, columns):
    """Return the observations of a state as a tile [B, C], for `columns` = 0..C-1; 0 in columns beyond the last one."""
    if TASK == "Pendulum":
        cos, sin = cos_sin(s0)
        return _tile(columns, cos, sin, s1)
    elif TASK == "Acrobot":
        cos1, sin1 = cos_sin(s0)
        cos2, sin2 = cos_sin(s1)
        return _tile(columns, cos1, sin1, cos2) + _tile(columns - 3, sin2, s2, s3)
    else:
        return _tile(columns, s0, s1, s2) + tl.where(columns[None, :] == 3, s3[:, None], 0.0)


@triton.jit
def cos_sin(x):
    """Return cosine and sine of x, to 2e-7 for |x| < 50,000.

    Not tl.cos and tl.sin, whose reduction of huge arguments takes memory. x is reduced by multiples of pi / 2, which is
    a sum of three numbers short enough that the products are exact; the polynomials are minimax on [-pi/4, pi/4].

    Source: Cody and Waite 1980, "Software manual for the elementary functions".
    """
    turns = tl.floor(x * (2 / _PI) + 0.5)
    r = ((x - turns * 1.5703125) - turns * 4.83751296997e-4) - turns * 7.54978994877e-8
    r2 = r * r
    cos = (((2.44677067e-5 * r2 - 1.38877297e-3) * r2 + 4.16666567e-2) * r2 - 0.5) * r2 + 1.0
    sin = (((2.86567956e-6 * r2 - 1.98559923e-4) * r2 + 8.33338592e-3) * r2 - 1.66666672e-1) * r2 * r + r
    quarter = turns.to(tl.int32) & 3
    odd = (quarter & 1) == 1
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)


@triton.jit
def _tile(columns, x0, x1, x2):
    """Return [B, C] with x0, x1 and x2 [B] where `columns` [C] are 0, 1 and 2, and 0 elsewhere."""
    at = columns[None, :]
    tile = tl.where(at == 0, x0[:, None], tl.where(at == 1, x1[:, None], x2[:, None]))
    return tl.where((at >= 0) & (at <= 2), tile, 0.0)


@triton.jit
def _cartpole(SUTTON_BARTO_REWARD: tl.constexpr, x, x_dot, theta, theta_dot, action):
    force = tl.where(action == 1, 10.0, -10.0)
    cos, sin = cos_sin(theta)
    temp = (force + 0.05 * theta_dot * theta_dot * sin) / 1.1
    theta_acc = (9.8 * sin - cos * temp) / (0.5 * (4.0 / 3.0 - 0.1 * cos * cos / 1.1))
    x_acc = temp - 0.05 * theta_acc * cos / 1.1
    x, theta = x + 0.02 * x_dot, theta + 0.02 * theta_dot
    fallen = (tl.abs(x) > 2.4) | (tl.abs(theta) > _ANGLE_LIMIT)
    reward = tl.where(fallen, -1.0, 0.0) if SUTTON_BARTO_REWARD != 0 else tl.full(x.shape, 1.0, tl.float32)
    return x, x_dot + 0.02 * x_acc, theta, theta_dot + 0.02 * theta_acc, reward, fallen


@triton.jit
def _acrobot(theta1, theta2, speed1, speed2, action):
    torque = action.to(tl.float32) - 1.0
    # Runge-Kutta of order 4; the sums grow with the slopes, so that few columns are alive at once
    a1, a2, b1, b2 = _acrobot_derivatives(theta1, theta2, speed1, speed2, torque)
    sum1, sum2, sum3, sum4 = a1, a2, b1, b2
    for k in tl.static_range(3):
        by = 0.2 if k == 2 else 0.1
        weight = 1.0 if k == 2 else 2.0
        a1, a2, b1, b2 = _acrobot_derivatives(
            theta1 + by * a1, theta2 + by * a2, speed1 + by * b1, speed2 + by * b2, torque
        )
        sum1, sum2, sum3, sum4 = sum1 + weight * a1, sum2 + weight * a2, sum3 + weight * b1, sum4 + weight * b2
    sixth: tl.constexpr = 0.2 / 6.0
    theta1, theta2 = _wrap(_wrap(theta1 + sixth * sum1)), _wrap(_wrap(theta2 + sixth * sum2))
    speed1 = clamp(speed1 + sixth * sum3, -4 * _PI, 4 * _PI)
    speed2 = clamp(speed2 + sixth * sum4, -9 * _PI, 9 * _PI)
    cos1, _ = cos_sin(theta1)
    cos12, _ = cos_sin(theta2 + theta1)
    swung_up = -cos1 - cos12 > 1.0
    return theta1, theta2, speed1, speed2, tl.where(swung_up, 0.0, -1.0), swung_up


@triton.jit
def _acrobot_derivatives(theta1, theta2, speed1, speed2, torque):
    cos2, sin2 = cos_sin(theta2)
    _, sin1 = cos_sin(theta1)
    _, sin12 = cos_sin(theta1 + theta2)
    d1 = 0.25 + (1.25 + cos2) + 2.0
    d2 = 0.25 + 0.5 * cos2 + 1.0
    phi2 = 4.9 * sin12
    phi1 = -0.5 * speed2 * speed2 * sin2 - speed2 * speed1 * sin2 + 14.7 * sin1 + phi2
    acceleration2 = (torque + d2 / d1 * phi1 - 0.5 * speed1 * speed1 * sin2 - phi2) / (1.25 - d2 * d2 / d1)
    return speed1, speed2, -(d2 * acceleration2 + phi1) / d1, acceleration2


@triton.jit
def _wrap(angle):
    angle = tl.where(angle > _PI, angle - 2 * _PI, angle)
    return tl.where(angle < -_PI, angle + 2 * _PI, angle)


@triton.jit
def _pendulum(G: tl.constexpr, angle, speed, s2, s3, torque):
    turned = angle + _PI
    off = turned - tl.floor(turned / (2 * _PI)) * (2 * _PI) - _PI
    cost = off * off + 0.1 * speed * speed + 0.001 * torque * torque
    _, sin = cos_sin(angle)
    speed = clamp(speed + (1.5 * G * sin + 3.0 * torque) * 0.05, -8.0, 8.0)
    return angle + speed * 0.05, speed, s2, s3, -cost, tl.zeros(angle.shape, tl.int1)


@triton.jit
def _mountain_car(GOAL_VELOCITY: tl.constexpr, position, speed, s2, s3, push):
    cos, _ = cos_sin(3 * position)
    speed = clamp(speed + (push * 0.0015 - 0.0025 * cos), -0.07, 0.07)
    position = clamp(position + speed, -1.2, 0.6)
    speed = tl.where((position <= -1.2) & (speed < 0), 0.0, speed)
    arrived = (position >= 0.45) & (speed >= GOAL_VELOCITY)
    return position, speed, s2, s3, tl.where(arrived, 100.0, 0.0) - push * push * 0.1, arrived
