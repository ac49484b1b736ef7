"""Training through a handle leaves buffers and frozen parameters of the base alone, or says that it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import tiny
from tests.handles import lora
from tunesmith import UsageError


class Counting(nn.Module):
    """Keeps a running mean of what it sees in training, in a buffer of its own."""

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4), persistent=persistent)

    def forward(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.inner(x) - self.mean


class Around(nn.Module):
    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.first, self.counting = nn.Linear(4, 4), Counting(persistent)

    def forward(self, x):
        return self.counting(self.first(x))


def test_buffers_that_training_would_change_are_refused_and_have_their_values_again():
    base = Around()
    handle = lora(base, target_modules=["first"]).train()
    with pytest.raises(UsageError, match=r"counting\.mean"):
        handle(torch.ones(3, 4))
    assert torch.equal(base.counting.mean, torch.zeros(4))
    handle.eval()(torch.ones(3, 4))


def test_a_private_copy_has_buffers_of_its_own_that_train():
    base = Around()
    handle = lora(base, target_modules=["first"], modules_to_save=["counting"]).train()
    handle(torch.ones(3, 4)).sum().backward()
    assert torch.equal(base.counting.mean, torch.zeros(4))
    assert any("mean" in name and value.any() for name, value in handle.get_adapter_state_dict().items())


def test_buffers_that_no_checkpoint_holds_are_the_modules_own_business():
    handle = lora(Around(persistent=False), target_modules=["first"]).train()
    handle(torch.ones(3, 4)).sum().backward()


def test_batch_norms_train_with_the_batch_and_keep_the_bases_statistics():
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    handle, x = lora(base, target_modules=["0", "2"]).train(), torch.randn(6, 4)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    merged = handle.merge_and_unload(copy=True).train()
    torch.testing.assert_close(handle(x), merged(x), rtol=1e-5, atol=1e-6)
    handle(x).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_parameters_of_the_base_that_train_are_told_of(llama, llama_inputs, caplog):
    handle = lora(llama).train()
    handle(**llama_inputs)
    assert not caplog.records
    llama.model.norm.weight.requires_grad_(True)
    other = lora(tiny.make("llama")).train()
    other.bare_base.model.norm.weight.requires_grad_(True)
    other(**llama_inputs)
    assert "model.norm.weight" in caplog.text and "modules_to_save" in caplog.text


def test_a_handle_made_of_a_part_of_another_is_refused(llama):
    handle = lora(llama)
    for part in (handle.model, handle.base_model, handle.get_base_model(), handle.model.layers[0]):
        with pytest.raises(UsageError, match="part of another handle"):
            lora(part)
    prompted = tiny.make("llama")
    assert lora(prompted).bare_base is prompted


@pytest.mark.parametrize("reach", [lambda h: h.model, lambda h: h.model.layers[0], lambda h: h.get_decoder()])
def test_a_part_of_a_base_under_virtual_tokens_is_refused(llama, llama_inputs, reach):
    from tests.handles import prompted

    handle = prompted(llama)
    with pytest.raises(UsageError, match="virtual tokens"):
        reach(handle)(llama_inputs["input_ids"])
    assert handle.base_model(**llama_inputs).logits.shape == handle(**llama_inputs).logits.shape
