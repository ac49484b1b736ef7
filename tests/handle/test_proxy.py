"""What a module looks like through its handle: its own class, its own attributes, and nothing that can be replaced."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from tests import tiny
from tests.handles import lora, out
from tunesmith import UsageError


class Kept(nn.Module):
    """Keeps its layers in a list and a dictionary, too, and a bound method of one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.order = [self.first, self.second]
        self.named = {"last": self.second}
        self.start = self.first.forward

    def forward(self, x):
        for layer in self.order:
            x = layer(x)
        return x


X = torch.ones(2, 3)


@pytest.fixture
def kept():
    return lora(Kept(), target_modules=["first", "second"]).eval()


def test_modules_and_methods_that_are_kept_outside_the_tree_act(kept):
    base = kept.get_base_model()
    for layer in base.order:
        assert not torch.equal(layer(X), getattr(kept.bare_base, "first" if layer is base.first else "second")(X))
    assert torch.equal(base.named["last"](X), base.second(X)) and torch.equal(base.start(X), base.first(X))
    assert torch.equal(base.order[1](base.start(X)), kept(X))


def test_a_proxy_is_its_module_to_whoever_asks(llama):
    handle = lora(llama)
    part = handle.model.layers[0]
    assert isinstance(part, type(llama.model.layers[0])) and part.__class__ is type(llama.model.layers[0])
    assert part == llama.model.layers[0] and hash(part) == hash(llama.model.layers[0]) and part is handle.model.layers[0]
    assert part != lora(tiny.make("llama")).model.layers[0]
    assert dict(handle.named_modules()).keys() >= {"base_model", "base_model.model", "base_model.model.model.layers.0"}
    names = [name.removeprefix("base_model.model.") for name in handle.state_dict() if name.startswith("base_model")]
    assert names == list(llama.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_of_a_proxy_is_one_of_a_copied_handle(llama, llama_inputs, copied):
    handle = lora(llama)
    again = copied(handle.model)
    with torch.no_grad():
        found, expected = (model(**llama_inputs).last_hidden_state for model in (again, handle.model))
    assert torch.equal(found, expected) and again.embed_tokens.weight.data_ptr() != llama.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(
    "write",
    [
        lambda part: setattr(part, "lm_head", nn.Linear(32, 96)),
        lambda part: setattr(part.lm_head, "weight", nn.Parameter(torch.zeros(96, 32))),
        lambda part: part.model._modules.__setitem__("norm", nn.Identity()),
        lambda part: setattr(part.model, "forward", print),
        lambda part: setattr(part.model, "__class__", nn.Identity),
        lambda part: part.model.load_state_dict({}),
        lambda part: part.model.half(),
        lambda part: part.model.norm.requires_grad_(),
        lambda part: delattr(part.model, "norm"),
    ],
)
def test_what_would_change_the_base_is_refused(llama, llama_inputs, write):
    handle, before = lora(llama), out(llama, llama_inputs)
    with pytest.raises(UsageError):
        write(handle.get_base_model())
    assert torch.equal(out(llama, llama_inputs), before)


def test_a_base_that_is_a_container_is_one_in_every_form():
    base = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    handle = lora(base, target_modules=["0", "2"])
    for shown in (handle.base_model, handle.get_base_model()):
        assert len(shown) == 3 and isinstance(shown[1], nn.ReLU)
        assert torch.equal(nn.Sequential(*shown)(X), handle(X)) and torch.equal(shown[:2](X), shown[1](shown[0](X)))


def test_other_libraries_may_hold_parameters_in_a_dictionary_of_their_own():
    """DeepSpeed does, with marks on it, in every module of the model that it is given."""

    class Held(dict):
        mark = False

    base = nn.Sequential(nn.Linear(3, 3))
    handle = lora(base, target_modules=["0"])
    expected = handle(X)
    for module in handle.modules():
        module._parameters = Held(module._parameters)
    for module in handle.modules():
        module._parameters.mark = True
    assert type(base[0]._parameters) is Held and base[0]._parameters.mark
    assert torch.equal(handle(X), expected)


def test_modules_that_are_added_to_a_base_later_act_and_take_its_handles_mode(llama, llama_inputs):
    handle = lora(llama).train()
    llama.around = nn.Sequential(nn.Dropout(0.5))
    llama.around.inner = llama.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 32)
    assert torch.equal(handle.around.inner(x), handle.model.layers[0].self_attn.q_proj(x))
    assert not torch.equal(handle.around.inner(x), llama.around.inner(x))
    handle.resize_token_embeddings(tiny.VOCAB + 8)
    handle(**llama_inputs)
    assert not llama.training and not any(module.training for module in llama.model.modules())
    assert handle.get_input_embeddings().num_embeddings == tiny.VOCAB + 8
