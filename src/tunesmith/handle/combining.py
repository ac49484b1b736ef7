"""A handle's adapters combined into new ones."""

from __future__ import annotations

import torch

from ..attach.build import build
from ..attach.tree import check_name
from ..combine.adapters import combined, fill
from ..combine.arithmetic import Member, Recipe, check_weights
from .adding import Adding


class Combining(Adding):
    """The part of a handle that combines its adapters into new ones."""

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str | None = None,
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Combine trained adapters into a new one. It is inactive until `set_adapter`, and is saved and loaded like any other.

        Args:
            adapters, weights: names, and one weight for each, which may be negative.
            adapter_name: the new one's name.
            combination_type: for LoRA "svd" (the default: the best adapter of rank `svd_rank` for the weighted sum of
                changes), "cat" (exactly that sum; ranks add up), "linear" (sum of factors, for equal ranks), "ties",
                "dare_linear", "dare_ties", "magnitude_prune" (likewise, with pruned factors) or one of the latter four with
                "_svd" (on pruned changes). For IA3 and prompt tuning "linear", the default. One adapter alone is scaled.
            svd_rank: the new rank, by default the largest of the members' ranks.
            svd_clamp: quantile at which the values of the new factors are clipped.
            svd_full_matrices, svd_driver: for `torch.linalg.svd`.
            density: share of the values that pruning keeps.
            majority_sign_method: "total" or "frequency": how "ties" elects the sign of each value.

        Raises:
            AdapterNameError, ConfigError, UsageError: in each case nothing was added.
        """
        for name in adapters:
            self.require_adapter(name)
        check_name(adapter_name, self.peft_config)
        check_weights(adapters, weights)
        members = [Member(name, self.peft_config[name], self.tree(name), weight) for name, weight in zip(adapters, weights)]
        alone = len(members) == 1 and svd_rank is None and density is None
        if combination_type is None:
            combination_type = "svd" if members[0].config.method == "LORA" else "linear"
        options = {"full_matrices": svd_full_matrices, "driver": svd_driver}
        recipe = Recipe("linear" if alone else combination_type, svd_rank, svd_clamp, options, density, majority_sign_method)
        config, values = combined(self.bare_base, members, recipe)
        plan, config = self.plan_adapter(config, current_names=True)
        wide = any(p.dtype == torch.float32 for member in members for p in member.tree.parameters())
        tree = build(self.bare_base, config, plan, full_precision=wide, initialise=False)
        fill(tree, values, members)
        self.take_adapter(adapter_name, config, tree)
