"""LoRA takes its lean path where that computes the same, and its plain operations elsewhere, by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests import tiny
from tests.handles import assert_same_gradients, gradients, lora
from tunesmith.bases.view import view_of
from tunesmith.methods import lora as method


class OwnLinear(nn.Linear):
    """A subclass may compute anything."""

    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


@pytest.fixture
def lean(monkeypatch):
    """The inputs of the lean path's calls."""
    calls = []
    real = method.lora_linear

    def counting(x, *rest):
        calls.append(x)
        return real(x, *rest)

    monkeypatch.setattr(method, "lora_linear", counting)
    return calls


def plainly(monkeypatch):
    monkeypatch.setattr(method, "applies", lambda *_: False)


PLACES = {  # module, fields of the config, whether in training, whether the lean path serves it
    "linear": (lambda: nn.Linear(6, 5), {}, True, True),
    "linear in inference": (lambda: nn.Linear(6, 5), {}, False, True),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), {}, True, True),
    "conv1d": (lambda: Conv1D(5, 6), {}, True, True),
    "rslora": (lambda: nn.Linear(6, 5), {"use_rslora": True}, True, True),
    "dropout": (lambda: nn.Linear(6, 5), {"lora_dropout": 0.1}, True, False),
    "dropout in inference": (lambda: nn.Linear(6, 5), {"lora_dropout": 0.1}, False, True),
    "bias of B": (lambda: nn.Linear(6, 5), {"lora_bias": True}, True, False),
    "trained bias": (lambda: nn.Linear(6, 5), {"bias": "all"}, True, False),
    "DoRA": (lambda: nn.Linear(6, 5), {"use_dora": True, "init_lora_weights": True}, True, True),
    "DoRA with dropout": (
        lambda: nn.Linear(6, 5),
        {"use_dora": True, "init_lora_weights": True, "lora_dropout": 0.1},
        True,
        False,
    ),
    "subclass": (lambda: OwnLinear(6, 5), {}, True, False),
}


@pytest.mark.parametrize("place", PLACES)
def test_it_is_taken_where_it_applies(place, lean):
    make, fields, training, served = PLACES[place]
    handle = lora(nn.Sequential(make()).double(), target_modules=["0"], r=2, **fields).train(training)
    with torch.no_grad():
        for parameter in handle.adapters.parameters():
            parameter += 0.1
    handle(torch.randn(3, 6).double())
    lean.clear()
    x = torch.randn(3, 6).double()
    found = handle(x)
    assert len(lean) == served
    if place != "subclass" and not (training and handle.active_peft_config.lora_dropout):
        handle.merge_adapter()
        torch.testing.assert_close(handle(x), found, rtol=1e-10, atol=1e-12)


def test_a_base_that_is_trained_after_all_gets_its_gradient(lean):
    base = nn.Sequential(nn.Linear(6, 5))
    handle = lora(base, target_modules=["0"], r=2)
    base[0].weight.requires_grad_()
    handle(torch.randn(3, 6)).sum().backward()
    assert not lean and base[0].weight.grad.abs().sum() > 0


def test_of_several_adapters_the_innermost_takes_it(lean):
    handle = lora(nn.Sequential(nn.Linear(6, 5)).double(), 1, "one", target_modules=["0"], r=2)
    torch.manual_seed(2)
    handle.add_adapter("two", handle.peft_config["one"])
    handle.set_adapter(["one", "two"])
    x = torch.randn(3, 6).double()
    found = handle(x)
    assert len(lean) == 1
    handle.merge_adapter()
    torch.testing.assert_close(handle(x), found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "opt", "t5", "bert-classifier"])
def test_loss_and_gradients_equal_those_of_plain_operations(name, lean, monkeypatch):
    base = tiny.make(name).double()
    handle = lora(base, target_modules="all-linear", task_type=tiny.task_of(name))
    inputs = tiny.inputs_for(name)

    def step():
        handle.zero_grad(set_to_none=True)
        output = tiny.main_output(handle(**inputs))
        output.cos().sum().backward()
        return output.detach(), dict(gradients(handle))

    found, own = step()
    assert len(lean) >= sum(isinstance(adapter, method.Lora) for _, adapter in handle.tree("default").items())
    plainly(monkeypatch)
    taken = len(lean)
    expected, plain = step()
    assert len(lean) == taken
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    plain = {key: gradient for key, gradient in plain.items() if gradient is not None}
    assert_same_gradients({key: own[key] for key in plain}, plain, rtol=1e-5, atol=1e-8)  # norms compute in fp32


def test_rows_with_adapters_of_their_own_take_it_too(lean):
    base = tiny.make("llama").double()
    handle = lora(base, 1, "one")
    torch.manual_seed(2)
    handle.add_adapter("two", handle.peft_config["one"])
    inputs = tiny.inputs_for("llama", rows=3)
    found = handle(**inputs, adapter_names=["one", "__base__", "two"]).logits
    assert lean and all(len(x) == 1 for x in lean)
    for row, name in enumerate(["one", None, "two"]):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        if name is None:
            expected = base(**one).logits
        else:
            handle.set_adapter(name)
            expected = handle(**one).logits
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-9, atol=1e-12)


class ThreeOfOne(nn.Module):
    """What attention does with its input."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 5) for _ in range(3))

    def forward(self, x):
        return self.q(x) + self.k(x) + self.v(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("fields", "products"), [({}, 0), ({"use_dora": True, "init_lora_weights": True}, 1)])
def test_three_maps_of_one_input_keep_it_once_beside_h(fields, products, dtype):
    """DoRA keeps its product, too, for the gradient of the sizes; what is counted here has a row for each token."""
    handle = lora(ThreeOfOne().to(dtype), target_modules=["q", "k", "v"], r=2, **fields).train()
    tokens, kept = 64, {}
    x = torch.randn(tokens, 6, dtype=dtype, requires_grad=True)
    handle(x)

    def keep(tensor):
        if len(tensor) == tokens:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = handle(x)
    assert sum(storage.nbytes() for storage in kept.values()) == tokens * (6 + 3 * (2 + products * 5)) * dtype.itemsize
    assert result.requires_grad


def test_a_single_token_is_computed_in_the_factors_type(lean):
    """There, rounding the factors costs more than the products, and loses more."""
    handle = lora(tiny.make("llama").to(torch.bfloat16), r=8, target_modules=["q_proj"])
    (adapter, *_) = (module for module in handle.adapters.modules() if isinstance(module, method.Lora))
    base = view_of(handle.bare_base.model.layers[0].self_attn.q_proj)
    with torch.no_grad():
        adapter.lora_B.normal_()
        x = torch.randn(1, 1, adapter.lora_A.shape[1]).to(torch.bfloat16)
        change = adapter.change(x, base, torch.bfloat16)
        exact = adapter.scale * (x.double() @ adapter.lora_A.double().T) @ adapter.lora_B.double().T
        torch.testing.assert_close(change.double(), exact, rtol=2**-8, atol=1e-6)  # one rounding, of the result
        adapter(x, base)
        assert not lean
        adapter(x.expand(1, 9, -1), base)
        assert len(lean) == 1
