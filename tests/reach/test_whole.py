"""The whole base, reached through a handle, answers as the handle does and as the merged model does."""

from __future__ import annotations

import pytest
import torch

from tests.reach.methods import MERGED_PAIRS, OFF, PAIRS, PREFIX, VIRTUAL_TOKENS
from tests.reach.models import FAMILIES
from tests.reach.parts import assert_same, assert_same_gradients, case_of, gradients_of, slope, slope_of_merged
from tests.reach.roots import CLIENTS, EVERY, GENERATING, OF_TRANSFORMERS, ROOTS, USES
from tests.reach.ways import MODES, RUNNERS, Cycle, mode_of, within
from tunesmith import TunesmithError

# Virtual tokens need inputs of their own; embeddings that a module of theirs gives may be refused.
MAY_REFUSE = {(method, "embeddings of its own") for method in (*VIRTUAL_TOKENS, *PREFIX)}


def _uses_of(family: str) -> list[str]:
    facts = FAMILIES[family]
    allowed = {EVERY, *([OF_TRANSFORMERS] if facts.task else []), *([GENERATING] if facts.generates else [])}
    return [name for name, (of, _) in USES.items() if of in allowed]


def _clients_of(family: str) -> list[str]:
    return [name for name, (families, _) in CLIENTS.items() if family in families]


def _wholes() -> list[tuple[str, ...]]:
    roots, runners, modes = Cycle(ROOTS), Cycle(RUNNERS), Cycle(MODES)
    uses = {family: Cycle(_uses_of(family)) for family in FAMILIES}
    found = [(*pair, next(roots), next(uses[pair[0]]), next(runners), next(modes)) for pair in PAIRS for _ in range(2)]
    # Threads draw from one generator of random numbers.
    return [case for case in found if case[3:5] != ("sampling", "in two threads")]


def _codes() -> list[tuple[str, ...]]:
    modes, clients = Cycle(MODES), {family: Cycle(_clients_of(family)) for family in FAMILIES}
    return [(*pair, next(clients[pair[0]]), next(modes)) for pair in MERGED_PAIRS if _clients_of(pair[0])]


WHOLES, CODES = _wholes(), _codes()


@pytest.mark.each_value_once
@pytest.mark.parametrize(("family", "method", "root", "use", "runner", "mode"), WHOLES)
def test_the_base_reached_through_a_handle_answers_as_the_handle(family, method, root, use, runner, mode):
    case, ask = case_of(method, family), USES[use][1]
    told = f"{family}, {method}: {use} of {root} {runner} ({mode})"
    with mode_of(mode, *case.models) as grad:
        try:
            expected = within(grad, lambda: ask(case.handle, case.inputs))()
            model = ROOTS[root](case.handle)
            found = RUNNERS[runner](within(grad, lambda: ask(model, case.inputs)))
        except TunesmithError as error:
            assert (method, use) in MAY_REFUSE, f"{told}: refused without need: {error}"
            return
        assert_same(found, expected, f"{told}: another answer than the handle's")
        if case.merged is not None:
            merged = within(grad, lambda: ask(case.merged, case.inputs))()
            assert_same(found, merged, f"{told}: another answer than the merged model's")
        if grad is torch.enable_grad:
            assert_same_gradients(gradients_of(case, found), gradients_of(case, expected), told)
    case.assert_bare()


@pytest.mark.each_value_once
@pytest.mark.parametrize(("family", "method", "client", "mode"), CODES)
def test_code_around_a_handle_computes_what_it_computes_around_the_merged_model(family, method, client, mode):
    case, run = case_of(method, family), CLIENTS[client][1]
    told = f"{family}, {method}: {client} ({mode})"
    with mode_of(mode, *case.models) as grad:
        found = within(grad, lambda: run(case.handle, case.inputs))()
        assert_same(found, within(torch.no_grad, lambda: run(case.merged, case.inputs))(), told)
        if grad is torch.enable_grad and method != OFF and "dora" not in method:  # its norm counts as constant
            gradients = gradients_of(case, found)
            expected, direction = slope_of_merged(case, lambda merged: run(merged, case.inputs))
            assert slope(gradients, direction) == pytest.approx(expected, rel=1e-5, abs=1e-6), told
    case.assert_bare()
