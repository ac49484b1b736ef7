"""LoRA on parameters that no module of their own computes with, such as the fused weights of experts.

    W' = W + s B A,   W in R^{out x in}
    W'_e = W_e + s B_e A_e   for each expert e, transposed where the module stores `(experts, in, out)` and says so

The module is called as a view of it that holds W'. Hu et al. 2021, https://arxiv.org/abs/2106.09685 (section 4.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, ParameterAdapter
from ..bases.stored_tensors import shape_of
from ..bases.view import module_view, own_parameter
from ..inits.lora import init_factors
from ..kernels.fp32 import at_least_fp32
from ..registry import register_part
from .lora_config import LoraConfig, LoraSettings

# The ecosystem's library (peft 0.21) adds the change of an attention's output projection twice, in calls and merges, so this is
# what its files mean.
OF_ATTENTION = 2


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
        weight = attrgetter(name)(module)
        self.r = settings.r
        self.scale = settings.scale * (OF_ATTENTION if "." in name else 1)
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
    """LoRA on some parameters of one module, by name, in the order in which the module holds them.

    `nn.MultiheadAttention` reads its output projection's weight, so there that is one of them, with twice the scale:
    `W' = W + 2 s B A` for `out_proj.weight`.
    """

    @classmethod
    def fault(cls, base: nn.Module, config: LoraConfig, settings: Any) -> str | None:
        """Of `nn.MultiheadAttention` as a target."""
        drops = config.lora_dropout > 0 and not config.inference_mode
        used = {"use_dora": config.use_dora, "lora_bias": config.lora_bias, "lora_dropout": drops}
        wrong = [name for name, value in used.items() if value]
        if wrong:
            return f"LoRA changes the weights of a MultiheadAttention, so {' and '.join(wrong)} cannot act there; leave it out"
        if config.init_lora_weights not in (True, False, "gaussian"):
            return f'a MultiheadAttention needs init_lora_weights=True, False or "gaussian", got {config.init_lora_weights!r}'
        if base._parameters.get("in_proj_weight") is None:
            return "its queries, keys and values have projections of their own; only one in_proj_weight for all can be adapted"
        return None

    def __init__(self, module: nn.Module, config: LoraConfig, settings: dict[str, LoraSettings]) -> None:
        super().__init__(module, [])  # it changes what is there, so it has no values to put in its place
        self.names = list(settings)
        for name in self.names:
            self._modules[name.replace(".", "_")] = LoraOnParameter(module, name, config, settings[name])

    def reset_parameters(self, base: Any) -> None:
        for change in self.changes().values():
            change.reset_parameters()

    def changes(self) -> dict[str, LoraOnParameter]:
        """By parameter."""
        return {name: change for name, change in zip(self.names, self._modules.values()) if isinstance(change, LoraOnParameter)}

    def forward(self, module: nn.Module) -> nn.Module:
        own = {name: change for name, change in self.changes().items() if "." not in name}  # others act where they are read
        return module_view(module, {name: change(own_parameter(module, name)) for name, change in own.items()})

    def parts(self) -> Iterator[tuple[str, Adapter]]:
        for name, change in self.changes().items():
            path, _, leaf = name.rpartition(".")
            if path:
                part = self._part({leaf: change})
                part.__dict__["names"] = [leaf]
                yield path, part

    def in_file(self, beside: bool) -> dict[str, Tensor]:
        """The ecosystem's files wrap the module once for each parameter of its own, the last one outermost."""
        prefixes = prefixes_in_file([name for name in self.names if "." not in name])
        tensors: dict[str, Tensor] = {}
        for name, change in reversed(self.changes().items()):
            path = name.rpartition(".")[0]
            prefix = f"base_layer.{path}." if path else prefixes[name]
            tensors |= {f"{prefix}{leaf}.weight": tensor for leaf, tensor in change.named_parameters()}
        return tensors

    def replaced(self, module: nn.Module) -> dict[str, Tensor]:
        weights = {name: attrgetter(name)(module) for name in self.names}
        return {name: change(at_least_fp32(weights[name])).to(weights[name].dtype) for name, change in self.changes().items()}
