"""LoRA's two factors at one module: which modules can have them, how they start, what they merge to, their names in files.

What they compute in a call is in `lora.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapter import LinearAdapter
from ..bases.view import BaseView
from ..inits.lora import init_factors
from ..inits.orthogonal import orthogonal
from .lora_config import LoraConfig, LoraSettings

# Names in the ecosystem's files, where the factors are modules.
_IN_FILES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_B_bias": "lora_B.bias"}
_IN_FILES_OF_EMBEDDINGS = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}


class LoraFactors(LinearAdapter):
    """A and B, and B's bias with `lora_bias`; shapes by the module's view, for a linear map A `(r, in)`, B `(out, r)`."""

    @classmethod
    def fault(cls, base: BaseView, config: LoraConfig, settings: LoraSettings) -> str | None:
        groups = getattr(base.module, "groups", 1)
        if settings.r % groups:
            return f"r={settings.r} is not a multiple of its {groups} groups"
        if config.lora_bias and base.tokens_in:
            return "lora_bias=True is for modules that can have a bias; leave embeddings out of target_modules"
        if config.init_lora_weights == "orthogonal" and not base.is_matrix:
            return 'init_lora_weights="orthogonal" is for linear modules only; leave it out of target_modules'
        return None

    def __init__(self, base: BaseView, config: LoraConfig, settings: LoraSettings) -> None:
        super().__init__(base, config, settings)
        a_shape, b_shape = base.low_rank_shapes(settings.r)
        self.scale = settings.scale
        self.init = config.init_lora_weights
        self.on_embedding = base.tokens_in
        self.lora_A = nn.Parameter(torch.empty(a_shape))
        self.lora_B = nn.Parameter(torch.empty(b_shape))
        self.lora_B_bias = nn.Parameter(torch.zeros(b_shape[0])) if config.lora_bias else None
        self.dropout = nn.Dropout(config.lora_dropout)

    def reset_parameters(self, base: BaseView) -> None:
        a, b = self.lora_A, self.lora_B
        if self.init == "orthogonal":
            self._set_factors(*orthogonal(a.shape[1], b.shape[0], a.shape[0]))
        else:
            init_factors(a, b, self.init, a.shape[0], embedding=base.tokens_in)

    @torch.no_grad()
    def _set_factors(self, a: Tensor, b: Tensor) -> None:
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)

    def merge(self, weight: Tensor, bias: Tensor | None, base: BaseView) -> tuple[Tensor, Tensor | None]:
        change = base.compose(self.lora_A.to(weight.dtype), self.lora_B.to(weight.dtype))
        if self.lora_B_bias is not None:
            own = self.lora_B_bias.to(weight.dtype) * self.scale
            bias = own if bias is None else bias + own
        return weight + self.scale * change, bias

    def merge_fault(self, base: BaseView) -> str | None:
        if self.lora_B_bias is not None and base.bias is None:
            return "lora_bias=True trained a bias, but the module has none to merge it into; use the handle unmerged"
        return base.compose_fault()

    def in_file(self, beside: bool) -> dict[str, Tensor]:
        names = _IN_FILES_OF_EMBEDDINGS if self.on_embedding else _IN_FILES
        return {names.get(name, name): tensor for name, tensor in super().in_file(beside).items()}
