"""Every way to compute a layer again in the backward pass, in every kind of training step: the gradients are those without.

A scenario runs once on a base that computes nothing again and once on one that does.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from tests.handles import assert_same_gradients, gradients
from tests.runtime.recompute_places import PLACES, Block, Net, net_with
from tests.runtime.recompute_scenarios import SCENARIOS, inputs, on
from tunesmith import TunesmithError, UsageError
from tunesmith.runtime.frame import current_frame

EXACT = {"rtol": 1e-9, "atol": 1e-13}  # float64, sums of some hundred terms


def _may_fail(place: str, scenario: str) -> bool:
    """Where an error is right, too: what torch itself refuses, and recomputation that ends in no input of the function."""
    reentrant = place.startswith(("reentrant", "a function"))
    return (
        (reentrant and scenario in ("second order", "gradients by grad", "from an intermediate", "retained"))
        or place.startswith("a function")
        or (place.startswith("hooks") and scenario in ("second order", "retained", "from an intermediate"))
    )


def _cannot(place: str, scenario: str) -> bool:
    """What no model can: random numbers are drawn again by mechanisms that do not keep the generator's state, and a state
    inside of a function that runs without gradients has none."""
    if scenario == "dropped out":
        return place.startswith(("a function", "hooks"))
    return scenario == "from an intermediate" and place in ("reentrant, nested", "a function, nested")


CASES = [(place, scenario) for place in PLACES for scenario in SCENARIOS if not _cannot(place, scenario)]


@functools.cache
def _expected(scenario: str) -> dict[str, Tensor]:
    return SCENARIOS[scenario](net_with(lambda net: None))


@pytest.mark.each_value_once
@pytest.mark.parametrize(("place", "scenario"), CASES)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_gradients_are_those_without_recomputation_or_an_error(place, scenario):
    net = net_with(PLACES[place])
    plain = _plain(net)
    try:
        found = SCENARIOS[scenario](net)
    except (TunesmithError, RuntimeError):
        if not _may_fail(place, scenario):
            raise
    else:
        expected = {_unwrapped(name): value for name, value in _expected(scenario).items()}
        assert_same_gradients({_unwrapped(name): value for name, value in found.items()}, expected, **EXACT)
    assert current_frame() is None
    assert all(torch.equal(a, b) for a, b in zip(_plain(net), plain)), "the bare base no longer runs, or recomputes, bare"


@pytest.mark.parametrize("implementation", list(CheckpointImpl), ids=lambda value: value.name.lower())
def test_wrappers_put_around_a_handles_layers_act_or_are_refused(implementation):
    """FSDP and accelerate wrap the layers of what they are given, which is a handle."""
    net = net_with(lambda net: None)
    handle, plain = on(net), _plain(net)
    wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=implementation)
    try:
        apply_activation_checkpointing(handle, wrapper, lambda module: isinstance(module, Block))
        handle.train()(inputs()).square().sum().backward()
    except UsageError:
        pass
    else:
        assert_same_gradients(gradients(handle), _expected("one step"), **EXACT)
    assert all(type(block) is Block for block in net.blocks), "the user's own base is wrapped"
    assert all(torch.equal(a, b) for a, b in zip(_plain(net), plain))


def test_there_are_enough_cases():
    assert len(CASES) >= 150


def _unwrapped(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


def _plain(net: Net) -> tuple[Tensor, Tensor]:
    """The bare base's result, and a gradient that runs through everything that it computes again."""
    x = inputs().requires_grad_()
    net.eval()
    result = net(x)
    result.square().sum().backward()
    for parameter in net.parameters():
        parameter.grad = None
    return result.detach(), x.grad
