"""Training steps: each attaches a handle to a net, trains in some way, and answers the gradients."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.handles import gradients, lora
from tests.runtime.recompute_places import Block, Net
from tunesmith import LoraConfig, PeftModel
from tunesmith.runtime.frame import current_frame


def on(net: Net, seed: int = 1, **fields: Any) -> PeftModel:
    return lora(net, seed, target_modules=["up", "down", "head"], r=4, **fields).train()


def inputs(seed: int = 3) -> Tensor:
    return torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _loss(model: nn.Module, seed: int = 3, **kwargs: Any) -> Tensor:
    return model(inputs(seed), **kwargs).square().sum()


def _one_step(net: Net) -> dict:
    handle = on(net)
    _loss(handle).backward()
    return gradients(handle)


def _inputs_with_gradients(net: Net) -> dict:
    handle, x = on(net), inputs().requires_grad_()
    handle(x).square().sum().backward()
    return {**gradients(handle), "inputs": x.grad}


def _accumulated(net: Net) -> dict:
    handle = on(net)
    for seed in (3, 4):
        _loss(handle, seed).backward()
    return gradients(handle)


def _retained(net: Net) -> dict:
    handle = on(net)
    loss = _loss(handle)
    loss.backward(retain_graph=True)
    loss.backward()
    return gradients(handle)


def _second_order(net: Net) -> dict:
    handle, x = on(net), inputs().requires_grad_()
    (first,) = torch.autograd.grad(handle(x).square().sum(), x, create_graph=True)
    first.square().sum().backward()
    return gradients(handle)


def _two_handles(net: Net) -> dict:
    first, second = on(net, 1), on(net, 2)
    losses = [_loss(first), _loss(second)]
    for loss in losses:
        loss.backward()
    return {**gradients(first), **{f"second {name}": value for name, value in gradients(second).items()}}


def _two_handles_in_one_pass(net: Net) -> dict:
    first, second = on(net, 1), on(net, 2)
    (_loss(first) * _loss(second)).backward()
    return {**gradients(first), **{f"second {name}": value for name, value in gradients(second).items()}}


def _with_another(net: Net) -> PeftModel:
    handle = on(net)
    torch.manual_seed(5)
    handle.add_adapter("other", LoraConfig(target_modules=["up", "down", "head"], init_lora_weights=False))
    return handle.train()


def _added_between(net: Net) -> dict:
    handle = _with_another(net)
    loss = _loss(handle)
    handle.set_adapter(["default", "other"])
    loss.backward()
    return _of_default(handle)


def _switched_between(net: Net) -> dict:
    """`set_adapter` freezes the adapters that it does not name; this one trains on."""
    handle = _with_another(net)
    loss = _loss(handle)
    handle.set_adapter("other")
    handle.tree("default").requires_grad_(True)
    loss.backward()
    return _of_default(handle)


def _disabled_between(net: Net) -> dict:
    handle = on(net)
    loss = _loss(handle)
    with handle.disable_adapter():
        loss.backward()
    return gradients(handle)


def _mixed_rows(net: Net) -> dict:
    handle = _with_another(net)
    handle.set_adapter(["default", "other"])
    _loss(handle, adapter_names=["default", "other", "__base__"] * 2).backward()
    return gradients(handle)


def _bare_in_one_pass(net: Net) -> dict:
    handle, x = on(net), inputs(4).requires_grad_()
    (_loss(handle) * net(x).square().sum()).backward()
    return {**gradients(handle), "bare inputs": x.grad}


def _bare_between(net: Net) -> dict:
    handle, x = on(net), inputs(4).requires_grad_()
    loss = _loss(handle)
    net(x).square().sum().backward()
    loss.backward()
    return {**gradients(handle), "bare inputs": x.grad}


def _backward_in_a_thread(net: Net) -> dict:
    handle = on(net)
    _run(_loss(handle).backward)
    return gradients(handle)


def _forward_in_a_thread(net: Net) -> dict:
    handle, losses = on(net), []
    _run(lambda: losses.append(_loss(handle)))
    losses[0].backward()
    return gradients(handle)


def _backward_in_anothers_call(net: Net) -> dict:
    """A hook of one handle's call runs the backward pass of another."""
    handle, other = on(net, 1), on(net, 2)
    loss = _loss(handle)
    hook = net.head.register_forward_hook(lambda *_: loss.backward())
    with torch.no_grad():
        other(inputs())
    hook.remove()
    return gradients(handle)


def _failed_forward(net: Net) -> dict:
    handle = on(net)
    hook = net.head.register_forward_pre_hook(_fails)
    with pytest.raises(ZeroDivisionError):
        _loss(handle)
    hook.remove()
    _loss(handle).backward()
    return gradients(handle)


def _failed_backward(net: Net) -> dict:
    """The pass stops at the first linear map of the middle block, in the middle of what is computed again."""
    handle = on(net)
    hook = _inner(net.blocks[1]).up.register_forward_hook(_fail_at_the_gradient)
    loss = _loss(handle)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    assert current_frame() is None
    hook.remove()
    handle.zero_grad(set_to_none=True)
    _loss(handle).backward()
    return gradients(handle)


def _gradients_by_grad(net: Net) -> dict:
    handle = on(net)
    parameters = dict(handle.adapters.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(_loss(handle), list(parameters.values()))))


def _from_an_intermediate(net: Net) -> dict:
    """A loss on a hidden state, beside the one on the result."""
    handle, states = on(net), []
    hook = net.blocks[1].register_forward_hook(lambda _, args, result: states.append(result))
    loss = _loss(handle)
    hook.remove()
    (loss + states[0].cos().sum()).backward()
    return gradients(handle)


def _in_evaluation(net: Net) -> dict:
    handle = on(net).eval()
    _loss(handle).backward()
    return gradients(handle)


def _dropped_out(net: Net) -> dict:
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    handle = on(net, lora_dropout=0.3)
    torch.manual_seed(7)
    _loss(handle).backward()
    return gradients(handle)


def _dora(net: Net) -> dict:
    handle = on(net, use_dora=True)
    _loss(handle).backward()
    return gradients(handle)


def _copied_head_and_biases(net: Net) -> dict:
    handle = lora(net, target_modules=["up", "down"], r=4, modules_to_save=["head"], bias="all").train()
    _loss(handle).backward()
    return gradients(handle)


def _run(function: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result()


def _fails(*_: Any) -> None:
    raise ZeroDivisionError


def _of_default(handle: PeftModel) -> dict:
    return {name: value for name, value in gradients(handle).items() if name.startswith("default")}


def _fail_at_the_gradient(_: nn.Module, args: Any, result: Tensor) -> None:
    if result.requires_grad:
        result.register_hook(_fails)


def _inner(block: nn.Module) -> Block:
    return next(module for module in block.modules() if isinstance(module, Block))


SCENARIOS = {
    function.__name__.strip("_").replace("_", " "): function
    for function in (
        _one_step, _inputs_with_gradients, _accumulated, _retained, _second_order, _two_handles, _two_handles_in_one_pass,
        _added_between, _switched_between, _disabled_between, _mixed_rows, _bare_in_one_pass, _bare_between,
        _backward_in_a_thread, _forward_in_a_thread, _backward_in_anothers_call, _failed_forward, _failed_backward,
        _gradients_by_grad, _from_an_intermediate, _in_evaluation, _dropped_out, _dora, _copied_head_and_biases,
    )
}  # fmt: skip
