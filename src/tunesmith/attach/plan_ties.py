"""Which modules follow the adapter of the input embedding because they hold its weight (`ensure_weight_tying`)."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from ..bases.view import view_of, view_type
from ..paths import is_inside
from ..registry import part_type

logger = logging.getLogger(__name__)


def holders(modules: dict[str, nn.Module], source: str) -> list[str]:
    """Paths of other modules whose weight is the very one of `source`."""
    weight: Tensor | None = modules[source]._parameters.get("weight")
    if weight is None:
        return []
    return [path for path, module in modules.items() if path != source and module._parameters.get("weight") is weight]


def plan_ties(model: Any, modules: dict[str, nn.Module], config: Any, plan: Any, faults: list[str]) -> None:
    """Move what `plan` does to any module with the input embedding's weight to the embedding, and let the others follow it."""
    words = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    source = next((path for path, module in modules.items() if module is words and words is not None), None)
    followers = holders(modules, source) if source is not None else []
    if source is None or not followers:
        logger.warning("ensure_weight_tying has no effect: no module holds the weight of the input embeddings")
        return
    group = [source, *followers]
    copied, adapted = set(group) & set(plan.copied), set(group) & plan.adapted.keys()
    within = [(path, block) for path in group for block in plan.copied if path != block and is_inside(path, block)]
    faults += [f"{path} is inside {block}, which is trained whole, so its weight cannot stay tied" for path, block in within]
    if copied and adapted:
        faults.append(
            f"{', '.join(sorted(copied))} is trained whole and {', '.join(sorted(adapted))} is a target, but they hold one "
            "weight, which ensure_weight_tying keeps one; choose one of the two"
        )
    elif copied:
        plan.copied = [source, *(path for path in plan.copied if path not in group)]
    elif adapted:
        settings = config.settings(source)
        plan.adapted = {source: settings, **{path: each for path, each in plan.adapted.items() if path not in group}}
        kind = part_type("_tied")
        reasons = {path: kind.fault(view_of(modules[path]), config, settings) for path in followers if view_type(modules[path])}
        faults += [f"{path}: {reason}" for path, reason in reasons.items() if reason]
        faults += [f"{path} is a {type(modules[path]).__name__}" for path in followers if path not in reasons]
    elif not config.trainable_token_indices:  # those follow in any case
        logger.warning("ensure_weight_tying has no effect: neither %s is trained", " nor ".join(group))
    if copied or adapted:
        plan.ties = dict.fromkeys(followers, source)
