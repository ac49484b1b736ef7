"""LoRA on parameters that no module of their own computes with, such as the fused weights of experts.

    W' = W + s B A,   W in R^{out x in}
    W'_e = W_e + s B_e A_e   for each expert e, transposed where the module stores `(experts, in, out)` and says so

The module is called as a view of it that holds W'. Hu et al. 2021, https://arxiv.org/abs/2106.09685 (section 4.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import ParameterAdapter
from ..bases.stored_tensors import shape_of
from ..bases.view import module_view
from ..inits.lora import init_factors
from ..kernels.fp32 import at_least_fp32
from ..registry import register_part
from .lora_config import LoraConfig, LoraSettings


def prefixes_in_file(names: Sequence[str]) -> dict[str, str]:
    """What stands before the factors of each parameter of one module: files wrap it once for each, the last one outermost."""
    return {name: "base_layer." * depth for depth, name in enumerate(reversed(names))}


def stacked(
    factors: Mapping[tuple[int, int], tuple[Tensor, Tensor, float]], experts: int, heights: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Factors of one parameter out of those of the linear maps that became its parts; a map without factors gets zeros.

        W_e = [W_{e,0}; W_{e,1}; ...],   A_e = [A_{e,0}; A_{e,1}; ...],   B_e = diag(s_0 B_{e,0}, s_1 B_{e,1}, ...)

    Args:
        factors: `{(expert, part): (A, B, s)}`, A `(r, in)`, B `(out, r)`; a part's rank is its experts' highest.
        experts: how many there are.
        heights: `out` of each part.

    Returns:
        `A (experts * R, in)` and `B (out, R * experts)`, where `out` and `R` are sums over the parts.
    """
    ranks = [max((len(a) for (_, of), (a, _, _) in factors.items() if of == part), default=0) for part in range(len(heights))]
    like = next(iter(factors.values()))[0]
    all_a = like.new_zeros(experts, sum(ranks), like.shape[1])
    all_b = like.new_zeros(sum(heights), sum(ranks), experts)
    for (expert, part), (a, b, scale) in factors.items():
        row, column = sum(heights[:part]), sum(ranks[:part])
        all_a[expert, column : column + len(a)] = a
        all_b[row : row + len(b), column : column + len(a), expert] = b if scale == 1 else b * scale
    return all_a.flatten(0, 1), all_b.flatten(1)


class LoraOnParameter(nn.Module):
    """A `(experts * r, in)` and B `(out, r * experts)` of one parameter; a matrix counts as one expert."""

    def __init__(self, module: nn.Module, name: str, config: LoraConfig, settings: LoraSettings) -> None:
        super().__init__()
        weight = getattr(module, name)
        self.r = settings.r
        self.scale = settings.scale
        self.init = config.init_lora_weights
        *stacked, rows, columns = shape_of(weight)
        self.experts = stacked[0] if stacked else 1
        self.inputs_first = bool(stacked) and bool(getattr(module, "is_transposed", False))
        inner, out = (rows, columns) if self.inputs_first else (columns, rows)
        self.lora_A = nn.Parameter(torch.empty(self.experts * self.r, inner))
        self.lora_B = nn.Parameter(torch.empty(out, self.r * self.experts))

    def reset_parameters(self) -> None:
        init_factors(self.lora_A, self.lora_B, self.init, self.r)

    def forward(self, weight: Tensor) -> Tensor:
        """`W'`, in the weight's type."""
        a = self.lora_A.to(weight.dtype).view(self.experts, self.r, -1)  # (experts, r, in)
        b = self.lora_B.to(weight.dtype).view(-1, self.r, self.experts).permute(2, 0, 1)  # (experts, out, r)
        change = self.scale * (a.mT @ b.mT if self.inputs_first else b @ a)
        return weight + change.view_as(weight)


@register_part("_parameters_changed")
class LoraParameters(ParameterAdapter):
    """LoRA on some parameters of one module, by name, in the order in which the module holds them."""

    def __init__(self, module: nn.Module, config: LoraConfig, settings: dict[str, LoraSettings]) -> None:
        super().__init__(module, [])  # it changes what is there, so it has no values to put in its place
        self.names = list(settings)
        for name in self.names:
            self._modules[name] = LoraOnParameter(module, name, config, settings[name])

    def reset_parameters(self, base: Any) -> None:
        for change in self.changes().values():
            change.reset_parameters()

    def changes(self) -> dict[str, LoraOnParameter]:
        """By parameter."""
        return {name: change for name, change in self._modules.items() if isinstance(change, LoraOnParameter)}

    def forward(self, module: nn.Module) -> nn.Module:
        return module_view(module, {name: change(getattr(module, name)) for name, change in self.changes().items()})

    def in_file(self, beside: bool) -> dict[str, Tensor]:
        """The ecosystem's files wrap the module once for each parameter, the last one outermost."""
        prefixes = prefixes_in_file(self.names)
        tensors: dict[str, Tensor] = {}
        for name, change in self.changes().items():
            tensors |= {f"{prefixes[name]}{leaf}.weight": tensor for leaf, tensor in change.named_parameters()}
        return tensors

    def replaced(self, module: nn.Module) -> dict[str, Tensor]:
        weights = {name: getattr(module, name) for name in self.names}
        return {name: change(at_least_fp32(weights[name])).to(weights[name].dtype) for name, change in self.changes().items()}
