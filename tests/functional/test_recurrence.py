import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastppo.functional import recurrence
from fastppo.functional.recurrence import gru_scan, lstm_scan, mingru_scan
from fastppo.native import recurrence as native
from fastppo.runtime import compile as compiling
from fastppo.runtime.compile import compile_graph
from tests.reference.recurrence import gru_by_definition, lstm_by_definition, mingru_by_definition

SCANS = {
    "lstm": (lstm_scan, lstm_by_definition),
    "gru": (gru_scan, gru_by_definition),
    "mingru": (mingru_scan, mingru_by_definition),
}
PATTERNS = {"nowhere": 0.0, "somewhere": 0.2, "at step 0": 0.0, "everywhere": 1.0}
EXACT = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.float64: {"atol": 1e-10, "rtol": 1e-10}}


def make_starts(length, sequences, pattern, seed=0):
    g = torch.Generator().manual_seed(seed)
    starts = torch.rand(length, sequences, generator=g) < PATTERNS[pattern]
    if pattern == "at step 0":
        starts[0] = True
    if pattern == "somewhere" and length > 1:
        starts[length // 2, 0] = True  # some step of a short sequence has a start, and some other none
        starts[length // 2 - 1] = False
    return starts


def make_case(name, length, sequences=3, units=4, pattern="somewhere", dtype=torch.float32, seed=0):
    """The arguments of a scan, in its order."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    starts = make_starts(length, sequences, pattern)
    width = {"lstm": 4, "gru": 3, "mingru": 2}[name] * units
    gates, memory = normal(length, sequences, width), [normal(sequences, units) for _ in range(2)]
    weight, bias = normal(width, units) / units**0.5, normal(units)
    if name == "lstm":
        return gates, weight, starts, *memory
    return (gates, weight, bias, starts, memory[0]) if name == "gru" else (gates, starts, memory[0])


def with_gradients(scan, arguments, seed=1):
    """The results of a scan, and the gradients of a random combination of them."""
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in arguments]
    results = scan(*inputs)
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in results]
    loss = sum((x * w).sum() for x, w in zip(results, weights, strict=True))
    leaves = [x for x in inputs if x.requires_grad]
    # the definition does not touch a memory that is reset at once
    return [*results, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def assert_equals_the_definition(name, arguments):
    scan, definition = SCANS[name]
    exact = [x.double() if x.is_floating_point() else x for x in arguments]
    found, expected = with_gradients(scan, arguments), with_gradients(definition, exact)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, **EXACT[arguments[0].dtype])


def without_c(monkeypatch):
    monkeypatch.setattr(recurrence.native, "takes", lambda *tensors: False)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [1, 2, 8, 17])
@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_values_and_gradients_equal_the_definition(name, length, pattern, dtype):
    assert_equals_the_definition(name, make_case(name, length, pattern=pattern, dtype=dtype))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [2, 17])
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_without_a_compiler_tensor_operations_equal_the_definition(name, length, pattern, monkeypatch):
    without_c(monkeypatch)
    assert_equals_the_definition(name, make_case(name, length, pattern=pattern))


@pytest.mark.parametrize(("sequences", "units"), [(1, 1), (7, 3), (5, 16), (19, 33), (33, 64), (12, 130)])
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_every_size_equals_the_definition(name, sequences, units):
    assert native.unavailable() is None, "this machine has a C compiler"
    assert_equals_the_definition(name, make_case(name, 6, sequences, units))


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_threads_change_no_bit(name):
    arguments, before = make_case(name, 9, 13, 20), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(with_gradients(SCANS[name][0], arguments))
    finally:
        torch.set_num_threads(before)
    # a product of torch's, the gradient of the weight, may sum in another order
    for found in results[1:]:
        same = [torch.equal(a, b) for a, b in zip(found, results[0], strict=True)]
        assert [i for i, equal in enumerate(same) if not equal] in ([], [{"lstm": 4, "gru": 3}[name]])


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("name", SCANS)
def test_transposed_inputs_are_read_by_their_strides(name, length):
    arguments = make_case(name, length)
    assert_equals_the_definition(name, [mirrored(x) if x.dim() > 1 else x for x in arguments])
    gates = arguments[0].transpose(0, 1).contiguous().transpose(0, 1)
    assert_equals_the_definition(name, [gates, *arguments[1:]])


@pytest.mark.parametrize("length", [2, 17])
@pytest.mark.parametrize("name", SCANS)
def test_a_start_moved_by_one_step_changes_values_and_gradients(name, length):
    scan, definition = SCANS[name]
    arguments = make_case(name, length, pattern="nowhere")
    arguments[-2 if name != "lstm" else 2][length // 2, 0] = True
    moved = [x.roll(1, 0) if x.dtype == torch.bool else x for x in arguments]
    found = with_gradients(scan, moved)
    expected = with_gradients(definition, [x.double() if x.is_floating_point() else x for x in arguments])
    assert (found[0].double() - expected[0]).abs().max() > 1e-2
    of_gates = len(found) - sum(x.is_floating_point() for x in arguments)
    assert (found[of_gates].double() - expected[of_gates]).abs().max() > 1e-2
    with pytest.raises(AssertionError):
        torch.testing.assert_close([x.double() for x in found], expected, **EXACT[torch.float32])


@pytest.mark.parametrize("name", SCANS)
def test_no_gradient_passes_an_episode_start(name):
    scan, _ = SCANS[name]
    arguments = [x.requires_grad_(x.is_floating_point()) for x in make_case(name, 8, pattern="nowhere")]
    next(x for x in arguments if x.dtype == torch.bool)[5] = True
    outputs, *_ = scan(*arguments)
    gates, *_, hidden = torch.autograd.grad(outputs[5:].sum(), [arguments[0], arguments[-1]])
    assert not gates[:5].any()
    assert not hidden.any()
    assert gates[5].any(-1).all()


@pytest.mark.parametrize("name", SCANS)
def test_one_gradient_of_one_result_is_enough(name):
    scan, definition = SCANS[name]
    arguments = make_case(name, 5, dtype=torch.float64)
    for k in range(len(scan(*arguments))):
        ours, theirs = (with_gradients(lambda *x, f=f, k=k: f(*x)[k : k + 1], arguments) for f in (scan, definition))
        torch.testing.assert_close(ours, theirs)
    gates = arguments[0].requires_grad_()
    (grad,) = torch.autograd.grad(scan(gates, *arguments[1:])[0].sum(), gates)
    assert grad.any(-1).all()


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_equals_the_layer_of_torch(layer, length):
    torch.manual_seed(0)
    module = layer(5, 7).double()
    x, hidden, cell = torch.randn(length, 3, 5).double(), torch.randn(3, 7).double(), torch.randn(3, 7).double()
    starts = torch.zeros(length, 3, dtype=torch.bool)
    gates = x @ module.weight_ih_l0.t() + module.bias_ih_l0
    if layer is nn.LSTM:
        expected, memory = module(x, (hidden[None], cell[None]))
        found = lstm_scan(gates + module.bias_hh_l0, module.weight_hh_l0, starts, hidden, cell)
    else:
        expected, *memory = module(x, hidden[None])
        bias = module.bias_hh_l0.clone()
        bias[14:] = 0
        found = gru_scan(gates + bias, module.weight_hh_l0, module.bias_hh_l0[14:], starts, hidden)
    torch.testing.assert_close(found, (expected, *(m[0] for m in memory)))
    weights = [torch.randn_like(x) for x in found]
    ours = torch.autograd.grad(sum((x * w).sum() for x, w in zip(found, weights, strict=True)), [*module.parameters()])
    results = (expected, *(m[0] for m in memory))
    loss = sum((x * w).sum() for x, w in zip(results, weights, strict=True))
    torch.testing.assert_close(ours, torch.autograd.grad(loss, [*module.parameters()]))


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("name", SCANS)
def test_gradients_equal_finite_differences(name, length):
    scan, _ = SCANS[name]
    arguments = make_case(name, length, sequences=2, units=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(scan, [x.requires_grad_(x.is_floating_point()) for x in arguments])


@pytest.mark.parametrize("name", SCANS)
def test_whole_equals_two_halves(name):
    scan, _ = SCANS[name]
    arguments = make_case(name, 12, dtype=torch.float64)
    whole = scan(*arguments)
    first, *memory = scan(*(x[:7] if len(x) == 12 and x.dim() > 1 and x.shape[1] == 3 else x for x in arguments))
    k = 2 if name == "lstm" else 1
    rest = [x[7:] if len(x) == 12 and x.dim() > 1 and x.shape[1] == 3 else x for x in arguments[:-k]]
    second, *memory = scan(*rest, *memory)
    torch.testing.assert_close((torch.cat((first, second)), *memory), whole)


def loss_and_gradients(scan):
    """A function of a scan's arguments: its loss, results and gradients."""

    def run(*arguments):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in arguments]
            results = scan(*inputs)
            loss = sum((x * x.cos()).sum() for x in results)
            gradients = torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])
        return loss.detach(), *(x.detach() for x in results), *gradients

    return run


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("name", SCANS)
def test_a_broken_state_ends_where_an_episode_starts(name, length):
    scan, _ = SCANS[name]
    clean = make_case(name, length, pattern="at step 0")
    n_states = 2 if name == "lstm" else 1
    broken = [*clean[:-n_states], *(torch.full_like(x, torch.nan) for x in clean[-n_states:])]
    torch.testing.assert_close(with_gradients(scan, broken), with_gradients(scan, clean))


@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.slow), 9])
@pytest.mark.parametrize("name", SCANS)
def test_compiled_equals_eager(name, length):
    fn = loss_and_gradients(SCANS[name][0])
    compiled = compile_graph(fn, make_case(name, length))
    before = compiling.compilations
    for pattern in PATTERNS:
        arguments = make_case(name, length, pattern=pattern, seed=5)
        torch.testing.assert_close(compiled(*arguments), fn(*arguments), **EXACT[torch.float32])
    assert compiling.compilations == before


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("name", SCANS)
def test_shapes_on_devices_without_data(name, length):
    fn = loss_and_gradients(SCANS[name][0])
    arguments = make_case(name, length)
    expected = [(x.shape, x.dtype, x.stride()) for x in fn(*arguments)]
    on_meta = fn(*(x.to("meta") for x in arguments))
    assert [(x.shape, x.dtype, x.stride()) for x in on_meta] == expected
    assert all(x.device.type == "meta" for x in on_meta)
    with FakeTensorMode() as mode:
        fake = fn(*(mode.from_tensor(x) for x in arguments))
    assert [(x.shape, x.dtype, x.stride()) for x in fake] == expected


@pytest.mark.parametrize("name", ["lstm_forward", "lstm_backward", "gru_forward", "gru_backward"])
def test_the_loops_read_nothing_from_a_device(name):
    loop = getattr(recurrence, f"_{name}")._init_fn  # what runs on a device; on meta the operator infers shapes
    for arguments in (x for kind, x in operator_cases() if kind == name):
        arguments = [None if x is None else x.detach() for x in arguments]
        expected = [x.shape for x in loop(*arguments)]
        on_meta = [None if x is None else x.to("meta") for x in arguments]
        assert [x.shape for x in loop(*on_meta)] == expected


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_masking_every_step_as_on_a_device_equals_the_definition(name, pattern, monkeypatch):
    calls = []
    without_c(monkeypatch)
    monkeypatch.setattr(recurrence, "_steps_with_starts", lambda starts: calls.append(1) or [True] * len(starts))
    assert_equals_the_definition(name, make_case(name, 9, pattern=pattern))
    assert len(calls) == 2


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inputs, self.memory = nn.Linear(5, 16), nn.Linear(4, 16, bias=False)

    def forward(self, x, starts, hidden, cell):
        return lstm_scan(self.inputs(x), self.memory.weight, starts, hidden, cell)[0]


@pytest.mark.parametrize("length", [1, 9])
def test_gradients_of_a_functional_call(length):
    torch.manual_seed(0)
    module = Recurrent()
    x, memory = torch.randn(length, 3, 5), torch.randn(3, 4)
    starts = make_starts(length, 3, "somewhere")
    parameters = {name: x.detach().clone().requires_grad_() for name, x in module.named_parameters()}
    found = torch.func.functional_call(module, parameters, (x, starts, memory, memory))
    expected = module(x, starts, memory, memory)
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(found.square().sum(), [*parameters.values()])
    theirs = torch.autograd.grad(expected.square().sum(), [*module.parameters()])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("name", SCANS)
def test_the_memory_keeps_full_precision_under_autocast(name, length):
    scan, _ = SCANS[name]
    arguments = make_case(name, length)
    gates = arguments[0].bfloat16()
    expected = scan(gates.float(), *arguments[1:])
    with torch.autocast("cpu", torch.bfloat16):
        found = scan(gates, *arguments[1:])
    assert [x.dtype for x in found] == [torch.float32] * len(found)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def mirrored(x):
    """The same values in other strides."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def operator_cases():
    lstm, gru = make_case("lstm", 5), make_case("gru", 5)
    ops = torch.ops.fastppo
    forward = {"lstm_forward": lstm, "gru_forward": gru}
    for name, arguments in forward.items():
        yield name, [x.requires_grad_(x.is_floating_point()) for x in arguments]
    outputs, hidden, cell, *saved = (x.detach() for x in ops.lstm_forward(*lstm))
    _, weight, starts, *memory = (x.detach() for x in lstm)
    yield "lstm_backward", [outputs.cos(), hidden, cell, weight, starts, *memory, outputs, *saved]
    yield "lstm_backward", [outputs.cos(), None, None, weight, starts, *memory, outputs, *saved]
    memory = [mirrored(x) for x in memory]
    yield "lstm_backward", [mirrored(outputs), hidden, mirrored(cell), weight, starts, *memory, outputs, *saved]
    outputs, hidden, *saved = (x.detach() for x in ops.gru_forward(*gru))
    _, weight, _, starts, memory = (x.detach() for x in gru)
    yield "gru_backward", [outputs.cos(), hidden, weight, starts, memory, outputs, *saved]
    yield "gru_backward", [mirrored(outputs), hidden, weight, starts, memory, outputs, *saved]
    yield "gru_backward", [None, hidden, weight, starts, memory, outputs, *saved]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_operators_pass_torchs_own_check():
    checked = []
    for name, arguments in operator_cases():
        torch.library.opcheck(getattr(torch.ops.fastppo, name).default, tuple(arguments))
        checked.append(name)
    assert set(checked) == {"lstm_forward", "lstm_backward", "gru_forward", "gru_backward"}
