"""Compile a function of tensors for fixed shapes.

The function is traced to one graph of tensor operations (`make_fx`), which goes to Inductor as it is. torch.compile
would do the same with guards that are checked at each call, 100-300 us that a small update doesn't have; here the
shapes are fixed, so nothing is checked again and nothing can be recompiled.

Arguments and results are trees: tensors, None, and tuples of trees, so that NamedTuples keep their names.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._functorch.config
import torch._inductor
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fastppo.errors import first_line

aten = torch.ops.aten
compilations = 0  # in this process


class CompileError(Exception):
    """A function that can't be compiled here; the text says why."""


def compile_graph(fn: Callable[..., Any], example: Sequence[Any]) -> Callable[..., Any]:
    """Compile `fn` for arguments with the shapes, strides, dtypes and device of `example`, and for no others.

    `fn` must take and return trees of tensors (or change tensors in place), read nothing on the host and draw no random
    numbers. It is traced with shapes alone, so nothing in `example` is read or changed. Tensors that `fn` reaches
    other than by its arguments become constants.

    Args:
        fn: takes as many positional arguments as `example` has.
        example: one tree for each argument.

    Raises:
        CompileError: there is no compiler, or an operation can't be traced or compiled.
    """
    global compilations
    flat = flatten(example)
    cpu = all(x.device.type == "cpu" for x in flat)
    if cpu and (missing := _missing_compiler()):
        raise CompileError(missing)
    result: list[Any] = []  # the tree that fn returned while it was traced

    def on_flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        result[:] = [fn(*_rebuild(tuple(example), iter(tensors)))]
        return tuple(flatten(result))

    # backward passes run in this thread: on a GPU, autograd's own thread would not be part of the trace
    with torch.no_grad(), torch.autograd.set_multithreading_enabled(False):
        try:
            graph = make_fx(on_flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*flat)
            rational_tanh(graph)
            for node in graph.graph.nodes:
                node.meta.clear()  # the tracer's shapes, which Inductor infers again
            # Inductor's cache on disk asks for fake tensors with a shape environment
            fake = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
            # its other cache can't take a graph from make_fx, and prints a traceback about it
            with tracing(TracingContext(fake)), torch._functorch.config.patch(enable_autograd_cache=False):
                # a C++ caller instead of Python's saves a third of a small update
                compiled = torch._inductor.compile(graph, [*flat], options={"cpp_wrapper": cpu})
            if not cpu:  # Triton builds and loads its kernels at the first call
                compiled(*(x.clone() for x in flat))
        except Exception as error:
            raise CompileError(f"{type(error).__name__}: {first_line(error).removesuffix('.')}") from error
    compilations += 1
    shapes = [(x.shape, x.dtype) for x in flat]

    def call(*arguments: Any) -> Any:  # noqa: ANN401 - trees
        tensors = flatten(arguments)
        assert [(x.shape, x.dtype) for x in tensors] == shapes, "compiled for other shapes"
        return _rebuild(result[0], iter(compiled(*tensors)))

    return call


def flatten(trees: Sequence[Any]) -> list[Tensor]:
    """List the tensors of some trees, depth first."""
    tensors: list[Tensor] = []
    _collect(trees, tensors)
    return tensors


def _collect(trees: Sequence[Any], tensors: list[Tensor]) -> None:
    # into one list, since it runs at each call of a compiled function
    for tree in trees:
        if isinstance(tree, Tensor):
            tensors.append(tree)
        elif tree is not None:
            _collect(tree, tensors)


def _rebuild(like: Any, tensors: Iterator[Tensor]) -> Any:  # noqa: ANN401 - trees
    """Return a tree of the structure of `like` with the next of `tensors` as its leaves."""
    if isinstance(like, Tensor):
        return next(tensors)
    if like is None:
        return None
    parts = [_rebuild(part, tensors) for part in like]
    return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)


def worth_compiling(minibatches: int) -> tuple[bool, str]:
    """Whether compiling the update pays within a run with `minibatches` ahead, and why.

    Decided from figures of two CPU cores (benchmarks/update.py), not from a clock, so that a run can be repeated:
    compiling saves a small minibatch 2.5 of its 3.5 ms, larger ones more; it costs 10-20 s, a third of that when the
    result is on disk already.
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
    """Replace float32 tanh on the CPU by a quotient of polynomials, at a third of the cost of Inductor's.

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
