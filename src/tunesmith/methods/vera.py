"""VeRA: one pair of frozen random projections for all modules; each module trains two small vectors.

    y = W x + b + lambda_b * B (lambda_d * A dropout(x)),   A in R^{r x in} and B in R^{out x r} cut out of the shared pair

Kopiczko, Blankevoort, Asano 2024, "VeRA: Vector-based Random Matrix Adaptation", https://arxiv.org/abs/2310.11454
(section 3.1).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapter import LinearAdapter
from ..bases.view import BaseView, view_of
from ..checks import not_finite, not_positive, not_probability
from ..config import Settings, TargetedConfig, config_class
from ..registry import register
from .parts import not_linear, wrong_bias


@config_class
class VeraConfig(TargetedConfig):
    """Configuration of VeRA.

    Args:
        r: rank of the shared projections; larger than LoRA's, because it costs little.
        projection_prng_key: seed of the shared projections.
        save_projection: write the projections, too; without them a file is tiny and relies on the seed.
        vera_dropout: probability of dropping an input of the change while training.
        d_initial: initial value of `lambda_d`; `lambda_b` starts at zero.
        bias: "none", "vera_only" (biases of adapted modules) or "all" (every bias); trained as private copies.
        init_weights: True: no change at first; False: random `lambda_d`, and a `lambda_b` of ones.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    bias: str = "none"
    init_weights: bool = True

    method: ClassVar[str] = "VERA"
    usual_learning_rate: ClassVar[float] = 0.02
    ours_alone: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    def faults(self) -> list[str]:
        return [
            *super().faults(),
            *not_positive({"r": self.r}),
            *not_probability({"vera_dropout": self.vera_dropout}),
            *not_finite({"d_initial": self.d_initial}),
            *wrong_bias(self.bias, "vera_only"),
        ]

    def resolve_targets(self, model_type: str | None) -> None:
        if self.target_modules is None and model_type == "phi":
            self.target_modules = {"q_proj", "v_proj"}
        super().resolve_targets(model_type)


class Projections(nn.Module):
    """The frozen pair of one adapter: A `(r, widest input)`, B `(widest output, r)`."""

    def __init__(self, r: int, inner: int, out: int, seed: int, saved: bool) -> None:
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, shape in (("vera_A", (r, inner)), ("vera_B", (out, r))):  # in this order, from one generator
            tensor = torch.empty(shape, dtype=torch.float32, device="cpu")
            self.register_buffer(name, nn.init.kaiming_uniform_(tensor, generator=generator), persistent=saved)


@register(VeraConfig)
class Vera(LinearAdapter):
    """One module's vectors: `vera_lambda_b` `(out,)` and `vera_lambda_d` `(r,)`."""

    @classmethod
    def fault(cls, base: BaseView, config: VeraConfig, settings: Settings) -> str | None:
        return not_linear(base, "VeRA")

    @classmethod
    def shared_tensors(cls, config: VeraConfig, modules: dict[str, nn.Module]) -> Projections:
        shapes = [view_of(module).shape for module in modules.values()]
        out, inner = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
        return Projections(config.r, inner, out, config.projection_prng_key, config.save_projection)

    def __init__(self, base: BaseView, config: VeraConfig, settings: Settings) -> None:
        super().__init__(base, config, settings)
        self.out, self.inner = base.shape
        self.d_initial, self.init_weights = config.d_initial, config.init_weights
        self.vera_lambda_b = nn.Parameter(torch.empty(self.out))
        self.vera_lambda_d = nn.Parameter(torch.empty(config.r))
        self.dropout = nn.Dropout(config.vera_dropout)

    def reset_parameters(self, base: BaseView) -> None:
        if self.init_weights:
            nn.init.constant_(self.vera_lambda_d, self.d_initial)
            nn.init.zeros_(self.vera_lambda_b)
        else:
            nn.init.normal_(self.vera_lambda_d)
            nn.init.ones_(self.vera_lambda_b)

    def forward(self, x: Tensor, base: BaseView, *args: Any, **kwargs: Any) -> Tensor:
        y = base(x, *args, **kwargs)
        a, b = self._projections(y)
        down = self.dropout(x.to(y.dtype)) @ a.T * self.vera_lambda_d.to(y.dtype)  # (..., r)
        return y + down @ b.T * self.vera_lambda_b.to(y.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None, base: BaseView) -> tuple[Tensor, Tensor | None]:
        a, b = self._projections(weight)
        scaled_b, scaled_d = self.vera_lambda_b.to(weight.dtype)[:, None], self.vera_lambda_d.to(weight.dtype)[:, None]
        return weight + (scaled_b * b) @ (scaled_d * a), bias

    def _projections(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """This module's cut of the shared pair: `(r, in)`, `(out, r)`, of the type and on the device of `like`."""
        shared: Any = self.shared
        return shared.vera_A[:, : self.inner].to(like), shared.vera_B[: self.out].to(like)
