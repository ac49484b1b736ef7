"""The lean LoRA step against its reference in float64: values, gradients, what it computes and what it keeps."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.kernels import reference
from tunesmith.kernels.lora_linear import applies, lora_linear

IN, OUT, RANK, SCALE = 24, 40, 3, 1.7
SHAPES = {"vector": (IN,), "matrix": (11, IN), "batch": (2, 5, IN), "no rows": (0, IN), "no tokens": (2, 0, IN)}


def case(dtype=torch.float64, shape=SHAPES["batch"], bias=True, transposed=False, masters=None, trained="xab"):
    """`(x, weight, bias, a, b)`; `trained` names those that ask for a gradient."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size, of=dtype):
        return torch.randn(*size, generator=generator).to(of)

    x = draw(*shape)
    weight = draw(IN, OUT).T if transposed else draw(OUT, IN)
    offset = draw(OUT) if bias else None
    a, b = draw(RANK, IN, of=masters or dtype), draw(OUT, RANK, of=masters or dtype)
    for name, value in (("x", x), ("a", a), ("b", b)):
        value.requires_grad_(name in trained)
    return x, weight, offset, a, b


def step(function, values, upstream):
    """The output and the gradients of those values that ask for one."""
    y = function(*values, SCALE)
    wanted = [value for value in values if value is not None and value.requires_grad]
    return y.detach(), *torch.autograd.grad(y, wanted, upstream)


def wide(values, change=lambda value: value):
    """The values in float64."""
    return [None if v is None else change(v.detach()).double().requires_grad_(v.requires_grad) for v in values]


def assert_equals_the_reference(values):
    """Within the bound of rounding: at each number, `roundings` times the unit roundoff times the sum of the terms' sizes.

    The reference on absolute values gives those sums, for the output and for each gradient. Sums are taken in fp32 or wider, of
    at most `terms` numbers; in 16 bits at most 8 results are rounded one after another (factors, h, product, sum).
    """
    upstream = torch.randn(*values[0].shape[:-1], OUT, generator=torch.Generator().manual_seed(1)).to(values[0].dtype)
    found = step(lora_linear, values, upstream)
    expected = step(reference.lora_linear, wide(values), upstream.double())
    sizes = step(reference.lora_linear, wide(values, torch.abs), upstream.double().abs())
    dtype, terms = values[0].dtype, IN + OUT + RANK + values[0].shape[:-1].numel()
    bound = 8 * torch.finfo(dtype).eps / 2 + terms * torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    types = [values[0].dtype] + [v.dtype for v in values if v is not None and v.requires_grad]
    for got, wanted, size, own in zip(found, expected, sizes, types, strict=True):
        assert got.dtype == own and got.shape == wanted.shape
        assert ((got.double() - wanted).abs() <= bound * size).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False], ids=["stored (in, out)", "stored (out, in)"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_equal_the_references(dtype, shape, transposed, bias):
    masters = torch.float32 if dtype.itemsize == 2 else dtype
    assert_equals_the_reference(case(dtype, shape, bias, transposed, masters))


@pytest.mark.parametrize("trained", ["x", "a", "b", "xa", "xb", "ab"])
def test_what_needs_no_gradient_gets_none_and_the_rest_is_right(trained):
    assert_equals_the_reference(case(trained=trained))


def test_an_input_in_another_order_of_memory():
    x, *rest = case(shape=(5, 2, IN))
    swapped = x.detach().transpose(0, 1).requires_grad_()
    assert not swapped.is_contiguous()
    assert_equals_the_reference([swapped, *rest])


@pytest.mark.parametrize("trained", ["xab", "xb", "xa", "ab"])
def test_first_and_second_derivatives_by_finite_differences(trained):
    values = case(trained=trained)
    wanted = [value for value in values if value is not None and value.requires_grad]

    def function(*changed):
        place = iter(changed)
        return lora_linear(*(next(place) if v is not None and v.requires_grad else v for v in values), SCALE)

    assert torch.autograd.gradcheck(function, wanted)
    assert torch.autograd.gradgradcheck(function, wanted)


def test_the_output_may_be_changed_in_place():
    """As by `nn.ReLU(inplace=True)`, or by a model that adds its residual so."""
    values = case()
    found = torch.autograd.grad(lora_linear(*values, SCALE).add_(1).relu_().sum(), values[3])
    expected = torch.autograd.grad((reference.lora_linear(*values, SCALE) + 1).relu().sum(), values[3])
    torch.testing.assert_close(found, expected)


def test_a_change_of_the_input_before_the_backward_pass_is_noticed():
    x, *rest = case(trained="ab")
    y = lora_linear(x, *rest, SCALE)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- what it computes and keeps --------------------------------------------------------------------------------------


class Multiplications(TorchDispatchMode):
    """Counts those of all matrix products (torch's own counter leaves `addmm_` out)."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **(kwargs or {}))


FORWARD = IN * OUT + IN * RANK + RANK * OUT
G, DX, DA, DB = OUT * RANK, OUT * IN + RANK * IN, RANK * IN, OUT * RANK


@pytest.mark.parametrize(
    ("trained", "products"),
    [("xab", G + DX + DA + DB), ("ab", G + DA + DB), ("xb", G + DX + DB), ("b", DB), ("x", G + DX), ("a", G + DA)],
)
def test_no_product_is_computed_that_nobody_needs(trained, products):
    values = case(trained=trained)
    with Multiplications() as forward:
        y = lora_linear(*values, SCALE)
    with Multiplications() as backward:
        y.backward(torch.ones_like(y))
    assert forward.count == 10 * FORWARD and backward.count == 10 * products  # of 10 tokens


def kept(function):
    """Bytes of the storages that `function` keeps for its backward pass, those of parameters left out."""
    storages = {}

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    del result
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_maps_of_one_input_keep_it_once(dtype):
    x, *_ = case(dtype)
    maps = []
    for _ in range(3):
        _, weight, bias, a, b = case(dtype, masters=torch.float32)
        frozen = [nn.Parameter(value, requires_grad=False) for value in (weight, bias)]
        maps.append([*frozen, nn.Parameter(a.detach()), nn.Parameter(b.detach())])
    tokens, size = 10, dtype.itemsize
    assert kept(lambda: [lora_linear(x, *one, SCALE) for one in maps]) == tokens * (IN + 3 * RANK) * size
    for one in maps:
        one[3].requires_grad_(False)  # h is kept for B's gradient alone
    assert kept(lambda: [lora_linear(x, *one, SCALE) for one in maps]) == tokens * IN * size
    for one in maps:
        one[3].requires_grad_()
        one[2].requires_grad_(False)  # the input is kept for A's gradient alone
    assert kept(lambda: [lora_linear(x, *one, SCALE) for one in maps]) == tokens * 3 * RANK * size
    with torch.no_grad():
        assert kept(lambda: [lora_linear(x, *one, SCALE) for one in maps]) == 0


# --- where it applies ------------------------------------------------------------------------------------------------


class Wrapped(torch.Tensor):
    """Stands for sharded and quantised tensors."""


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
@pytest.mark.parametrize(
    "change",
    [lambda v: v.as_subclass(Wrapped), lambda v: v.float(), lambda v: v.detach().requires_grad_()],
    ids=["subclass", "other type", "trained"],
)
def test_it_does_not_apply_to_wrapped_mixed_or_trained_tensors(name, change):
    values = dict(zip(("x", "weight", "bias"), case(trained="")))
    assert applies(**values)
    assert applies(**{**values, "bias": None})
    values[name] = change(values[name])
    assert applies(**values) == (name == "x" and values["x"].requires_grad)


OTHER_LAYOUTS = {
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([x, x[:2]]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_it_does_not_apply_to_inputs_of_another_layout(layout):
    x, weight, bias, _, _ = case(shape=SHAPES["matrix"], trained="")
    assert applies(x, weight, bias) and not applies(OTHER_LAYOUTS[layout](x), weight, bias)


AROUND = {
    "nothing": contextlib.nullcontext,
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast off": lambda: torch.autocast("cpu", torch.bfloat16, enabled=False),
    "forward mode": forward_ad.dual_level,
}


@pytest.mark.parametrize("around", AROUND)
def test_it_applies_where_no_single_operation_must_be_seen(around):
    with AROUND[around]():
        assert applies(*case()[:3]) == (around not in ("autocast", "forward mode"))


@pytest.mark.parametrize(
    "transform",
    [torch.func.vmap, torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))],
    ids=["vmap", "grad", "jvp"],
)
def test_it_does_not_apply_under_function_transforms(transform):
    x, weight, bias, _, _ = case(trained="")
    seen = []

    def function(x):
        seen.append(applies(x, weight, bias))
        return x.sum()

    transform(function)(x)
    assert seen == [False]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_does_not_apply_while_tracing():
    x, weight, bias, _, _ = case(trained="")
    seen = []

    def function(x):
        seen.append(applies(x, weight, bias))
        return x + 1

    torch.jit.trace(function, x, check_trace=False)
    assert seen == [False]
