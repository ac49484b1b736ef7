"""AdaLoRA: low-rank changes in the form of a singular value decomposition, whose ranks move to where they matter.

    y = W x + b + s B diag(E) A dropout(x),   s = alpha / (init_r + 1e-5),   loss + w * mean |A A^T - I|_F, |B^T B - I|_F

Each triplet (a row of A, a value of E, a column of B) has an importance: the average of |parameter * gradient|, smoothed
over steps, times its uncertainty. The least important ones are switched off (E = 0) until the budget holds, which falls
from `init_r` to `target_r` a module with the cube of the remaining time.

Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", https://arxiv.org/abs/2303.10512
(sections 3.1 to 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapter import LinearAdapter, ScheduledAdapter
from ..bases.view import BaseView
from ..checks import not_finite, not_positive, not_probability
from ..config import TargetedConfig, config_class
from ..registry import register
from .parts import RankSettings, not_linear_or_convolution, wrong_bias

# The ecosystem's choices where they differ from LoRA's, by `model_type`.
_TARGETS = {
    "t5": ("q", "k", "v", "o", "wi", "wo"),
    "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    "bart": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "roberta": ("query", "key", "value", "dense"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
}


@config_class
class AdaLoraConfig(TargetedConfig):
    """Configuration of AdaLoRA.

    Args:
        total_step: number of optimiser steps of the whole run, counted from 1.
        init_r, target_r: rank of every module at first, and on average in the end.
        tinit, tfinal: steps before the first and after the last change of ranks.
        deltaT: steps between two changes.
        beta1, beta2: how slowly importance and uncertainty follow the last step.
        orth_reg_weight: weight of the penalty that keeps A and B orthogonal, added to the loss in training.
        lora_alpha, lora_dropout, bias: as for LoRA.
        init_lora_weights: True: no change at first (E is zero); False: random values.
        rank_pattern: `{module path + ".lora_E": which triplets are left}`; filled in by the last allocation.
        r: no effect; it is there because files of `peft` contain it.
    """

    total_step: int | None = None
    init_r: int = 12
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    bias: str = "none"
    init_lora_weights: bool = True
    rank_pattern: dict[str, list[bool]] | None = None
    r: int = 8

    method: ClassVar[str] = "ADALORA"
    usual_learning_rate: ClassVar[float] = 0.03
    not_supported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "use_rslora": (), "alpha_pattern": (), "use_dora": (), "lora_bias": (), "trainable_token_indices": (),
        "target_parameters": (), "layer_replication": (), "loftq_config": (), "eva_config": (), "corda_config": (),
        "use_qalora": (), "qalora_group_size": (16,), "megatron_config": (), "megatron_core": ("megatron.core",),
        "ensure_weight_tying": (), "alora_invocation_tokens": (), "arrow_config": (), "lora_ga_config": (),
        "runtime_config": ({"ephemeral_gpu_offload": False},), "use_bdlora": (), "velora_config": (),
        "monteclora_config": (), "kasa_config": (),
    }  # fmt: skip

    def faults(self) -> list[str]:
        found = [*super().faults(), *not_positive({"init_r": self.init_r, "target_r": self.target_r, "deltaT": self.deltaT})]
        found += not_finite({"lora_alpha": self.lora_alpha, "orth_reg_weight": self.orth_reg_weight})
        found += not_probability({"lora_dropout": self.lora_dropout})
        found += wrong_bias(self.bias, "lora_only")
        found += [f"{name}={getattr(self, name)!r} must be at least 0" for name in ("tinit", "tfinal", "orth_reg_weight")
                  if getattr(self, name) < 0]  # fmt: skip
        found += [f"{name}={getattr(self, name)!r} must be above 0 and below 1" for name in ("beta1", "beta2")
                  if not 0 < getattr(self, name) < 1]  # fmt: skip
        if self.target_r > self.init_r:
            found.append(f"target_r={self.target_r} must be at most init_r={self.init_r}: ranks only decrease")
        if self.total_step is None or self.total_step < 1:
            found.append(f"total_step={self.total_step} must be the number of optimiser steps")
        elif self.tinit + self.tfinal >= self.total_step:
            found.append(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave no steps of total_step={self.total_step} for changing ranks"
            )
        return found

    def resolve_targets(self, model_type: str | None) -> None:
        if self.target_modules is None and model_type in _TARGETS:
            self.target_modules = set(_TARGETS[model_type])
        super().resolve_targets(model_type)

    def settings(self, path: str) -> RankSettings:
        left = (self.rank_pattern or {}).get(f"{path}.lora_E")
        alpha = self.lora_alpha if self.lora_alpha > 0 else self.init_r
        return RankSettings(self.init_r if left is None else sum(left), scale=alpha / (self.init_r + 1e-5))

    def budget(self, step: int, at_first: int, in_the_end: int) -> int | None:
        """How many triplets are left after `step`; None where the step changes nothing."""
        assert self.total_step is not None
        last = self.total_step - self.tfinal
        if step <= self.tinit or step > last or (step < last and step % self.deltaT):
            return None
        return int((at_first - in_the_end) * (1 - (step - self.tinit) / (last - self.tinit)) ** 3 + in_the_end)


@register(AdaLoraConfig)
class AdaLora(LinearAdapter, ScheduledAdapter):
    """One module's triplets: `lora_A` `(r, in)`, `lora_E` `(r, 1)`, `lora_B` `(out, r)`; an input counts its kernel.

    `kept` says which triplets are left; None before the first allocation.
    """

    @classmethod
    def fault(cls, base: BaseView, config: AdaLoraConfig, settings: RankSettings) -> str | None:
        return not_linear_or_convolution(base, "AdaLoRA")

    def __init__(self, base: BaseView, config: AdaLoraConfig, settings: RankSettings) -> None:
        super().__init__(base, config, settings)
        r, (out, *inner) = settings.r, base.shape
        self.scale = settings.scale
        self.starts_at_zero = config.init_lora_weights
        self.lora_A = nn.Parameter(torch.empty(r, math.prod(inner)))
        self.lora_E = nn.Parameter(torch.empty(r, 1))
        self.lora_B = nn.Parameter(torch.empty(out, r))
        self.dropout = nn.Dropout(config.lora_dropout)
        self.allocated = config.rank_pattern is not None  # read from a file: its ranks are allocated
        self.kept: Tensor | None = None  # (r,)
        self.before: tuple[Tensor, Tensor | None] | None = None  # E and `kept` as the last optimiser step left them
        self.importance: dict[str, tuple[Tensor, Tensor]] = {}  # {parameter: (smoothed importance, its uncertainty)}

    def reset_parameters(self, base: BaseView) -> None:
        std = 0.02 if self.starts_at_zero else 1.0
        for parameter in (self.lora_A, self.lora_E, self.lora_B):
            nn.init.normal_(parameter, std=std)
        if self.starts_at_zero:
            nn.init.zeros_(self.lora_E)

    def forward(self, x: Tensor, base: BaseView, *args: Any, **kwargs: Any) -> Tensor:
        y = base(x, *args, **kwargs)
        inputs = self.dropout(x.to(y.dtype))
        if not base.is_matrix:
            return y + base.product(inputs, self._change(base).to(y.dtype))
        scaled = (self.lora_A * self.lora_E * self.scale).to(y.dtype)
        return y + inputs @ scaled.T @ self.lora_B.to(y.dtype).T

    def merge(self, weight: Tensor, bias: Tensor | None, base: BaseView) -> tuple[Tensor, Tensor | None]:
        return weight + self._change(base).to(weight.dtype), bias

    def _change(self, base: BaseView) -> Tensor:
        return (self.scale * self.lora_B @ (self.lora_A * self.lora_E)).reshape(base.shape)

    # --- the budget, over all modules of one adapter ------------------------------------------------------------------

    @classmethod
    def penalty(cls, adapters: Mapping[str, Any], config: AdaLoraConfig) -> Tensor:
        """How far A's rows and B's columns are from orthogonal, on average."""
        distances = []
        for adapter in adapters.values():
            for factor in (adapter.lora_A, adapter.lora_B.T):  # (r, ...)
                one = torch.eye(len(factor), device=factor.device, dtype=factor.dtype)
                distances.append((factor @ factor.T - one).norm())
        return config.orth_reg_weight * torch.stack([distance.to(distances[0].device) for distance in distances]).mean()

    @classmethod
    @torch.no_grad()
    def observe_step(cls, adapters: Mapping[str, Any], config: AdaLoraConfig, step: int) -> None:
        assert config.total_step is not None
        if any(adapter.allocated for adapter in adapters.values()):
            return
        for adapter in adapters.values():
            adapter.before = (adapter.lora_E.detach().clone(), adapter.kept)
            if step > config.total_step - config.tfinal:
                adapter.importance.clear()
            elif step < config.total_step - config.tfinal:
                adapter._observe(config.beta1, config.beta2)

    def _observe(self, beta1: float, beta2: float) -> None:
        for name, parameter in self.named_parameters():
            if parameter.grad is None:
                continue
            now = (parameter * parameter.grad).abs()
            average, uncertainty = self.importance.get(name, (torch.zeros_like(now), torch.zeros_like(now)))
            average = beta1 * average.to(now) + (1 - beta1) * now
            uncertainty = beta2 * uncertainty.to(now) + (1 - beta2) * (now - average).abs()
            self.importance[name] = (average, uncertainty)

    @classmethod
    @torch.no_grad()
    def allocate(cls, adapters: Mapping[str, Any], config: AdaLoraConfig, step: int) -> None:
        """Switch off the least important triplets. Until the last allocation they may come back by training."""
        if any(adapter.allocated for adapter in adapters.values()):
            return
        assert config.total_step is not None
        total = sum(len(adapter.lora_E) for adapter in adapters.values())
        budget = config.budget(step, total, config.target_r * len(adapters))
        for adapter in adapters.values():
            unmasked, adapter.kept = adapter.before
            adapter.lora_E.copy_(unmasked)
        if budget is not None and budget < total:
            scores = {path: adapter._scores() for path, adapter in adapters.items()}
            threshold = torch.cat([score.cpu() for score in scores.values()]).kthvalue(total - budget).values.item()
            for path, adapter in adapters.items():
                adapter.kept = scores[path] > threshold
        last = config.total_step - config.tfinal
        for adapter in adapters.values():
            if adapter.kept is not None and (budget is not None or step > last):
                adapter.lora_E.masked_fill_(~adapter.kept[:, None].to(adapter.lora_E.device), 0.0)
        if step >= last:
            final = {f"{path}.lora_E": adapter.kept for path, adapter in adapters.items() if adapter.kept is not None}
            config.rank_pattern = {name: kept.tolist() for name, kept in final.items()} or None

    def _scores(self) -> Tensor:
        """The importance of each triplet, `(r,)`: its value's own, and the means over its two vectors."""
        score = torch.zeros_like(self.lora_E[:, 0])
        for name, axis in (("lora_E", 1), ("lora_A", 1), ("lora_B", 0)):
            average, uncertainty = self.importance.get(name, (score.new_zeros(1, 1), score.new_zeros(1, 1)))
            score = score + (average * uncertainty).to(score).mean(axis)
        return score

    @classmethod
    def saved(cls, name: str, value: Tensor, config: AdaLoraConfig) -> Tensor:
        """Only the triplets that are left are written."""
        path, _, tensor = name.removeprefix("base_model.model.").rpartition(".")
        left = (config.rank_pattern or {}).get(f"{path}.lora_E")
        if left is None or tensor not in ("lora_A", "lora_E", "lora_B"):
            return value
        axis = 1 if tensor == "lora_B" else 0
        if value.shape[axis] == sum(left):  # read from a file, so the others are gone already
            return value
        return value.index_select(axis, torch.tensor(left).nonzero().flatten().to(value.device))
