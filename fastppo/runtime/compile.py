"""A tensor function as compiled code: same arguments, same results within rounding, another cost.

The function is traced to one graph of tensor operations (`make_fx`), which goes to Inductor as it is. torch.compile
itself would do the same with guards that are checked at each call, 100-300 us that a small update doesn't have; here
the shapes are fixed, so nothing is checked and nothing can be recompiled.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._functorch.config
import torch._inductor
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

aten = torch.ops.aten
compilations = 0  # of this process


class CompileError(Exception):
    """A function that can't be compiled here; the text says why."""


def compile_graph(fn: Callable[..., Any], example: Sequence[Tensor]) -> Callable[..., Any]:
    """`fn` compiled for tensors of the shapes, strides, dtypes and device of `example`, and for no others.

    Asks of fn: tensors in, tensors out (or changed in place), no host reads, no randomness. It is traced with shapes
    alone, so nothing in `example` is read or changed. What fn reaches other than by its arguments is frozen.

    Raises:
        CompileError: no compiler, or an operation that can't be traced or compiled.
    """
    global compilations
    cpu = all(x.device.type == "cpu" for x in example)
    if cpu and (missing := _missing_compiler()):
        raise CompileError(missing)
    with torch.no_grad():
        try:
            graph = make_fx(fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*example)
            rational_tanh(graph)
            for node in graph.graph.nodes:
                node.meta.clear()  # shapes of the tracer's own, which Inductor infers again
            # fake tensors with an environment for shapes are what Inductor's cache on disk asks for
            fake = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
            # its other cache can't take a graph from make_fx, and says so with a traceback
            with tracing(TracingContext(fake)), torch._functorch.config.patch(enable_autograd_cache=False):
                # a C++ caller instead of Python's: a third of a small update
                compiled = torch._inductor.compile(graph, list(example), options={"cpp_wrapper": cpu})
        except Exception as error:
            text = str(error).strip().splitlines()
            raise CompileError(f"{type(error).__name__}: {text[0] if text else ''}") from error
    compilations += 1
    shapes = [(x.shape, x.dtype) for x in example]

    def checked(*tensors: Tensor) -> Any:  # noqa: ANN401 - what fn returns
        assert [(x.shape, x.dtype) for x in tensors] == shapes, "compiled for other shapes"
        return compiled(*tensors)

    return checked


def worth_compiling(minibatches: int) -> tuple[bool, str]:
    """Whether compiling the update pays within a run with `minibatches` ahead, and why.

    From figures of two CPU cores (benchmarks/update.py), not from a clock, so that a run can be repeated: a small
    minibatch loses 2.5 ms of its 3.5 when compiled, larger ones more; compiling costs 10-20 s, a third of that when
    its result lies on disk already.
    """
    saved = minibatches * 2.5e-3
    verdict = f"{minibatches:,} minibatches ahead: compiling saves about {saved:,.0f} s and costs 10-20 s"
    return saved > 20, verdict


def _missing_compiler() -> str | None:
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return None if shutil.which(name) else f"there is no C++ compiler ({name}); install g++ or set CXX"


# tanh(x) = x P(x^2) / Q(x^2) on [-7.9, 7.9], beyond which it is 1 in float32; absolute error below 2.4e-7.
# The minimax coefficients of Eigen's generic_fast_tanh_float (MPL 2.0), highest power first.
_P: tuple[float, ...] = (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08)
_P += (1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03)
_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
_EDGE = 7.90531110763549805


def rational_tanh(graph: fx.GraphModule) -> None:
    """Replace float32 tanh on the CPU by a quotient of polynomials, a third of the cost of Inductor's.

    Gradients are in the graph already, as functions of the result.
    """
    for node in graph.graph.find_nodes(op="call_function", target=aten.tanh.default):
        if node.meta["val"].dtype != torch.float32 or node.meta["val"].device.type != "cpu":
            continue
        with graph.graph.inserting_before(node):
            call = graph.graph.call_function

            def polynomial(x2: fx.Node, coefficients: Sequence[float], call: Any = call) -> Any:  # noqa: ANN401
                total = call(aten.mul.Tensor, (x2, coefficients[0]))
                for c in coefficients[1:-1]:
                    total = call(aten.mul.Tensor, (call(aten.add.Tensor, (total, c)), x2))
                return call(aten.add.Tensor, (total, coefficients[-1]))

            x = call(aten.clamp.default, (node.args[0], -_EDGE, _EDGE))
            x2 = call(aten.mul.Tensor, (x, x))
            result = call(aten.div.Tensor, (call(aten.mul.Tensor, (polynomial(x2, _P), x)), polynomial(x2, _Q)))
        node.replace_all_uses_with(result)
        graph.graph.erase_node(node)
    graph.recompile()
