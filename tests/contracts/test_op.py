"""Contract of a fused operation: its float64 specification at odd shapes, forward, backward, in every option.

On a CPU these run through plain PyTorch; `test_interpreter.py` runs this file again with Triton's interpreter on, which
must be so before Triton is imported, and then the kernels answer. The same table runs on a GPU where there is one.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dbtrain_kernels import OPS, Op, of_operators
from dbtrain_kernels.cases import Case
from dbtrain_kernels.dispatch import choose, interpreting
from tests.kit.operations import BOUNDS, PRODUCT_BOUNDS, on

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = [pytest.param(name, case, id=f"{name}-{case.name}") for name in OPS for case in OPS[name].load("cases")()]
anywhere = pytest.mark.parametrize("device", DEVICES)
every_case = pytest.mark.parametrize("name, case", CASES)
interpreted = pytest.mark.skipif(not interpreting(), reason="needs the kernels: see test_interpreter.py")
FUSED = [pytest.param("cpu", marks=interpreted), DEVICES[1]]


def evaluate(name, function, inputs):
    """Every result of a call by name: outputs, arguments changed in place, gradients for fixed cotangents."""
    op = OPS[name]
    tracked = [key for key in op.differentiable if inputs.get(key) is not None]
    for key in tracked:
        inputs[key].requires_grad_()
    output = function(**inputs)
    fields = output._asdict() if hasattr(output, "_asdict") else {"output": output}
    results = {key: value.detach() for key, value in fields.items()}
    results |= {f"{key} afterwards": inputs[key] for key in op.mutated if inputs.get(key) is not None}
    if tracked:
        heads = [value for value in fields.values() if value.requires_grad]
        cotangents = [
            torch.linspace(0.5, 2, max(head.numel(), 1), dtype=head.dtype, device=head.device).view(head.shape)
            for head in heads
        ]
        gradients = torch.autograd.grad(heads, [inputs[key] for key in tracked], cotangents)
        results |= {f"d {key}": gradient for key, gradient in zip(tracked, gradients)}
    return results


def distance(got, want):
    """|got - want| / |want| in 2-norms; 0 for two zeros."""
    got, want = got.double(), want.double()
    error = torch.linalg.vector_norm(got - want).item()
    return error / torch.linalg.vector_norm(want).item() if error else 0.0


def far_off(got, want, products=torch.float32):
    """The results that are further from the float64 results than their dtype, and that of products, allows."""
    assert got.keys() == want.keys()
    found = {}
    for key, value in got.items():
        assert value.shape == want[key].shape, key
        if not value.is_floating_point():
            assert torch.equal(value, want[key]), key
        elif not distance(value, want[key]) <= max(BOUNDS[value.dtype], PRODUCT_BOUNDS[products]):
            found[key] = distance(value, want[key])
    return found


def oracle(name, case, device, **changes):
    return evaluate(name, OPS[name].load("reference"), on(device, case.inputs(), torch.float64) | changes)


@contextlib.contextmanager
def poisoned():
    """Memory from torch.empty is full of NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@anywhere
@every_case
def test_float64_reference_same_bits_and_arguments(name, case, device):
    """One call among NaN and one among whatever memory holds: both are the specification, and change what they may."""
    fused, inputs, before = OPS[name].load("fused"), on(device, case.inputs()), on(device, case.inputs())
    with poisoned():
        got = evaluate(name, fused, inputs)
    assert far_off(got, oracle(name, case, device), case.products) == {}
    again = evaluate(name, fused, on(device, case.inputs()))
    assert {key: torch.equal(got[key], again[key]) for key in got} == dict.fromkeys(got, True)
    tensors = [key for key, value in inputs.items() if isinstance(value, torch.Tensor)]
    changed = {key for key in tensors if not torch.equal(inputs[key], before[key])}
    assert changed <= set(OPS[name].mutated)


class Registered(TorchDispatchMode):
    """Keeps the calls of registered operators: (operator, its arguments)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dbtrain":
            copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in args]
            self.calls.append((func, copies))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", FUSED)
@pytest.mark.parametrize("name", [name for name in OPS if OPS[name].fused])
@pytest.mark.parametrize("which", [0, -1])
def test_opcheck(name, which, device):
    """The forward operator takes the gradients that the operation has, unless it writes into its arguments: then what
    calls it has them."""
    with Registered() as registered:
        evaluate(name, OPS[name].load("fused"), on(device, OPS[name].load("cases")()[which].inputs()))
    assert {operator._schema.name.split("::")[1] for operator, _ in registered.calls} <= set(of_operators("launches"))
    for number, (operator, values) in enumerate(registered.calls):
        for argument, value in zip(operator._schema.arguments, values):
            own = number == 0 and not operator._schema.is_mutable
            if own and argument.name in OPS[name].differentiable:
                value.requires_grad_()
        # Its compilation by AOT is what `test_compiles_without_a_graph_break` does, to the same bits.
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        checked = torch.library.opcheck(operator, tuple(values), test_utils=tests)
        assert set(checked.values()) == {"SUCCESS"}


@anywhere
@pytest.mark.parametrize("name", OPS)
def test_compiles_without_a_graph_break(name, device):
    fused, case = OPS[name].load("fused"), OPS[name].load("cases")()[-1]
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=False)
    got, want = (evaluate(name, function, on(device, case.inputs())) for function in (compiled, fused))
    assert {key: torch.equal(got[key], want[key]) for key in got} == dict.fromkeys(got, True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_cuda_graph_replays_the_same_bits(name):
    fused, case = OPS[name].load("fused"), OPS[name].load("cases")()[-1]
    with torch.no_grad():
        once, inputs = on("cuda", case.inputs()), on("cuda", case.inputs())
        want = fused(**once)  # also compiles, which a capture must not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # records without running
            got = fused(**inputs)
        graph.replay()
    torch.cuda.synchronize()
    pairs = zip(got, want) if isinstance(got, tuple) else [(got, want)]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(inputs[key], once[key]) for key in OPS[name].mutated if once.get(key) is not None)


@pytest.mark.parametrize("name", [name for name in OPS if OPS[name].differentiable])
def test_gradcheck_of_the_reference(name):
    for case in OPS[name].load("cases")():
        inputs = on("cpu", case.inputs(), torch.float64)
        if sum(value.numel() for value in inputs.values() if isinstance(value, torch.Tensor)) > 2000:
            continue

        tracked = {key: inputs[key].requires_grad_() for key in OPS[name].differentiable if inputs[key] is not None}

        def heads(*values, inputs=inputs, tracked=tracked):
            output = OPS[name].load("reference")(**inputs | dict(zip(tracked, values)))
            return tuple(value for value in (output if isinstance(output, tuple) else (output,)) if value.requires_grad)

        values = tuple(tracked.values())
        assert torch.autograd.gradcheck(heads, values, fast_mode=True)  # along random directions: all numbers at once


MUTANTS = {
    "v for eps": ("loss", "epsilon", lambda inputs: {"parameterization": "v_prediction"}),
    "eps for v": ("loss", "v_prediction", lambda inputs: {"parameterization": "epsilon"}),
    "flow with the sign of v": ("loss", "flow", lambda inputs: {"parameterization": "v_prediction"}),
    "mean for sum": ("loss", "epsilon", lambda inputs: {"weight_B": inputs["weight_B"] / len(inputs["weight_B"])}),
    "mask dropped": ("loss", "mask", lambda inputs: {"mask": None}),
    "neighbour's weight": ("loss", "epsilon", lambda inputs: {"weight_B": inputs["weight_B"].roll(1)}),
    "alpha for sigma": ("noising", "plain", lambda inputs: {"sigma_S": inputs["alpha_S"]}),
    "one stream for both draws": ("noising", "plain", lambda inputs: {"purposes": (1, 1, 4, 2, 9)}),
    "t of the noise's stream": ("noising", "t of many", lambda inputs: {"purposes": (3, 1, 4, 1, 9)}),
    "strata that do not turn": ("noising", "t in strata", lambda inputs: {"purposes": (3, 1, 4, 2, 2)}),
    "a neighbour's adapter": ("lora", "plain", lambda inputs: {"up_NDR": inputs["up_NDR"].flip(0)}),
    "scale forgotten": ("lora", "plain", lambda inputs: {"scale_N": torch.ones(2)}),
    "key words swapped": ("noising", "plain", lambda inputs: {"key_B2": inputs["key_B2"].flip(1)}),
    "global clip": ("adamw", "plain", lambda inputs: {"clip_N": inputs["clip_N"].mean().expand(3)}),
    "step off by one": ("adamw", "plain", lambda inputs: {"step_N": inputs["step_N"] + 1}),
    "decay forgotten": ("adamw", "plain", lambda inputs: {"decay_N": torch.zeros(3)}),
    "SiLU forgotten": ("group_norm", "plain", lambda inputs: {"silu": False}),
    "embedding forgotten": ("group_norm", "channels last", lambda inputs: {"shift_BC": None}),
    "angles of a neighbour": ("rotary", "plain", lambda inputs: {"cos": inputs["cos"].roll(1, 1)}),
    "halves for neighbours": ("rotary", "plain", lambda inputs: {"halves": True}),
    "gate forgotten": ("residual_norm", "modulated", lambda inputs: {"gate": None}),
    "a neighbour's modulation": ("residual_norm", "modulated", lambda inputs: {"scale": inputs["scale"].flip(0)}),
    "scale for 1 + scale": ("residual_norm", "modulated", lambda inputs: {"unit": False}),
    "mean left in": ("residual_norm", "plain", lambda inputs: {"centered": False}),
    "gate for value": ("swiglu", "plain", lambda inputs: {"gate": inputs["value"], "value": inputs["gate"]}),
    "no rest": ("adamw", "a resting row", lambda inputs: {"active_N": torch.ones(3, dtype=torch.bool)}),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant):
    """The comparison above has the power to see each of these mistakes, at a thousand times its bound."""
    name, which, change = MUTANTS[mutant]
    (case,) = (case for case in OPS[name].load("cases")() if case.name == which)
    inputs = on("cpu", case.inputs())
    got = evaluate(name, OPS[name].load("fused"), inputs | change(inputs))
    want = oracle(name, case, "cpu")
    floats = [key for key in got if got[key].is_floating_point()]
    assert max(distance(got[key], want[key]) for key in floats) > 1e-3
    with pytest.raises(AssertionError):
        assert far_off(got, want) == {}


@pytest.mark.parametrize("name", OPS)
def test_a_row_is_whole(name):
    assert all(callable(OPS[name].load(part)) for part in ("fused", "reference", "cases", "work"))
    assert choose(name, "cpu").fused == interpreting()


def cube(x):
    """A toy operation."""
    return x * x * x


def cubes():
    return [Case("three", lambda device="cpu": {"x": torch.linspace(-1, 1, 3, device=device)})]


def test_a_row_with_a_plain_form_alone_keeps_the_contract(monkeypatch):
    here = cube.__module__
    monkeypatch.setitem(OPS, "cube", Op(f"{here}:cube", f"{here}:cubes", differentiable=("x",)))
    (case,) = OPS["cube"].load("cases")()
    test_float64_reference_same_bits_and_arguments("cube", case, "cpu")
    test_compiles_without_a_graph_break("cube", "cpu")
    test_gradcheck_of_the_reference("cube")
