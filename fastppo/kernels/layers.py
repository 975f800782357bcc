"""Fully connected layers as functions of Triton's device code: a tile of rows and a tile of weights at a time.

Tiles are padded to powers of two of at least 16, what a tensor core takes. Padding of weights, biases and inputs is
zero, so that padded units are constants whose weights and gradients are zero too. LAYER stands for the constants of a
linear layer, a `fastppo.policies.mlp_layout.Linear`.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

Precision = Literal["tf32", "ieee"]


@triton.constexpr_function
def padded(n):
    """Return the length of the tile that holds n numbers: the next power of two, at least 16."""
    return max(16, 1 << (n - 1).bit_length())


@triton.constexpr_function
def item(items, i):
    """Return items[i] as a constant. Triton 3.6 returns the bare object, which only a number can be passed as."""
    return items[i]


def precision() -> Precision:
    """Return the precision of matrix products that torch is set to."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
def weight_places(LAYER: tl.constexpr):
    """Return the offsets of a layer's weights as a tile [in, out], and the mask that excludes padding."""
    i, o = tl.arange(0, padded(LAYER.n_in)), tl.arange(0, padded(LAYER.n_out))
    inside = (i[:, None] < LAYER.n_in) & (o[None, :] < LAYER.n_out)
    return LAYER.weight + o[None, :] * LAYER.n_in + i[:, None], inside


@triton.jit
def load_weight(params, LAYER: tl.constexpr):
    """Return the transposed weight of a layer, a tile [in, out]."""
    places, inside = weight_places(LAYER)
    return tl.load(params + places, mask=inside, other=0.0)


@triton.jit
def load_weight_as_stored(params, LAYER: tl.constexpr):
    """Return the weight of a layer as it is stored, a tile [out, in], for the backward pass.

    Not tl.trans(load_weight(...)): the compiler would keep that tile in registers from forward to backward.
    """
    i, o = tl.arange(0, padded(LAYER.n_in)), tl.arange(0, padded(LAYER.n_out))
    inside = (o[:, None] < LAYER.n_out) & (i[None, :] < LAYER.n_in)
    return tl.load(params + LAYER.weight + o[:, None] * LAYER.n_in + i[None, :], mask=inside, other=0.0)


@triton.jit
def load_bias(params, LAYER: tl.constexpr):
    """Return the bias of a layer, a tile [out]."""
    o = tl.arange(0, padded(LAYER.n_out))
    return tl.load(params + LAYER.bias + o, mask=o < LAYER.n_out, other=0.0)


@triton.jit
def dense(x, weight, bias, PRECISION: tl.constexpr):
    """Return x weight + bias, a tile [rows, out], for tiles x [rows, in], weight [in, out] and bias [out]."""
    return tl.dot(x, weight, input_precision=PRECISION) + bias[None, :]


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)), finite for every finite x."""
    return tl.where(x < 0, 0.0, x) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def clamp(x, low, high):
    """Return x within [low, high]; NaN stays NaN."""
    return tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def bound_log_std(raw):
    """Return the bounded log standard deviation and its derivative, as `functional.distributions` defines them."""
    over, under = 16.0 * (raw - 2.0), 16.0 * (-10.0 - raw)
    return raw - softplus(over) / 16.0 + softplus(under) / 16.0, 1.0 - sigmoid(over) - sigmoid(under)


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent of x within 2e-7."""
    shrunk = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, shrunk - 1.0, 1.0 - shrunk) / (1.0 + shrunk)


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.70710678))


@triton.jit
def activate(z, KIND: tl.constexpr):
    """Return the activation of z; KIND is a key of `fastppo.policies.mlp.ACTIVATIONS`."""
    if KIND == "tanh":
        h = tanh(z)
    elif KIND == "relu":
        h = tl.where(z < 0, 0.0, z)  # NaN stays NaN
    elif KIND == "elu":
        h = tl.where(z > 0, z, tl.exp(tl.where(z > 0, 0.0, z)) - 1.0)
    elif KIND == "silu":
        h = z * sigmoid(z)
    else:
        tl.static_assert(KIND == "gelu")
        h = z * _normal_cdf(z)
    return h


@triton.jit
def slope(z, h, KIND: tl.constexpr):
    """Return d h / d z for h = activate(z, KIND); z is read for silu and gelu alone."""
    if KIND == "tanh":
        d = 1.0 - h * h
    elif KIND == "relu":
        d = tl.where(h > 0, 1.0, 0.0)
    elif KIND == "elu":
        d = tl.where(h > 0, 1.0, h + 1.0)
    elif KIND == "silu":
        share = sigmoid(z)
        d = share + h * (1.0 - share)
    else:
        tl.static_assert(KIND == "gelu")
        d = _normal_cdf(z) + z * tl.exp(-0.5 * z * z) * 0.39894228
    return d
