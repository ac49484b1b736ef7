"""LoRA's configuration, its variants' fields included."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ..checks import not_finite, not_positive, not_probability
from ..config import TargetedConfig, config_class
from ..errors import ConfigError, did_you_mean
from .parts import RankSettings, by_pattern, with_pattern, wrong_bias
from .trainable_tokens import index_faults

FROM_WEIGHT = ("pissa", "olora", "loftq")  # inits that are parts of the base's weight
INITS = (True, False, "gaussian", "orthogonal", "eva", *FROM_WEIGHT)


@dataclass
class LoftQConfig:
    """Of `init_lora_weights="loftq"`.

    Args:
        loftq_bits: 2, 3 or 4 (NormalFloat, blocks of 64) or 8 (whole numbers, a scale per row).
        loftq_iter: how often quantising and making up for it take turns.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def faults(self) -> list[str]:
        found = []
        if self.loftq_bits not in (2, 3, 4, 8):
            found.append(f"loftq_bits={self.loftq_bits!r} must be 2, 3, 4 or 8")
        return [*found, *not_positive({"loftq_iter": self.loftq_iter})]


@dataclass
class EvaConfig:
    """Of `init_lora_weights="eva"`, which acts in `initialize_lora_eva_weights(model, dataloader)`.

    Args:
        rho: a module's rank may grow to `rho * r`, at others' cost; 1 leaves all ranks at `r`.
        tau: a direction has converged when a batch turns it by no more than this cosine.
        use_label_mask: leave out tokens whose label is `label_mask_value`.
        label_mask_value: the label of tokens that are not part of the loss.
        whiten: scale each direction by the inverse root of its singular value.
        adjust_scaling_factors: keep each module's scale at `lora_alpha / r` when its rank changes.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def faults(self) -> list[str]:
        found = []
        if not (isinstance(self.rho, (int, float)) and self.rho >= 1 and math.isfinite(self.rho)):
            found.append(f"rho={self.rho!r} must be a finite number of at least 1")
        if not (isinstance(self.tau, (int, float)) and 0 <= self.tau <= 1):
            found.append(f"tau={self.tau!r} must be at least 0 and at most 1")
        return found


@dataclass(frozen=True)
class WeightInit:
    """An init that is computed from the weight.

    Args:
        name: one of `FROM_WEIGHT`.
        rounds: of LoftQ's turns, or of the randomised PiSSA; None is the exact one.
        bits: of LoftQ.
    """

    name: str
    rounds: int | None = None
    bits: int | None = None


@dataclass(frozen=True)
class LoraSettings(RankSettings):
    """Rank, scale and, where the factors start as parts of the weight, which ones."""

    init: WeightInit | None = None


@config_class
class LoraConfig(TargetedConfig):
    """Configuration of LoRA.

    `layer_replication` is not supported: it runs layers of the base more than once, each time with other adapters, which
    needs a base that is rebuilt.

    Args:
        r: rank of the change.
        lora_alpha: strength; the change is scaled by `lora_alpha / r`.
        lora_dropout: probability of dropping an input of the change while training.
        use_rslora: scale by `lora_alpha / sqrt(r)` instead.
        bias: "none", "lora_only" (biases of adapted modules) or "all" (every bias); trained as private copies.
        init_lora_weights: True (A Kaiming-uniform, B zero), "gaussian" (A normal with deviation 1/r, B zero), "orthogonal"
            (both random, their product zero), "eva" (as True until `initialize_lora_eva_weights` is called) or False (both
            random: the change is not zero at first). "pissa", "pissa_niter_<rounds>", "olora" and "loftq" start from parts
            of the weight (`lora_from_weight.py`).
        rank_pattern, alpha_pattern: `{name ending or regular expression: value}` for single modules.
        use_dora: also train the size of each output's weights (`dora.py`).
        lora_bias: a trained bias on B.
        target_parameters: endings of parameters to adapt where no module can be named, as for fused experts
            (`lora_parameters.py`); `target_modules` may then be empty, and None means none.
        trainable_token_indices: tokens whose embeddings train, too; `{embedding's name: tokens}` for other embeddings than
            the input's (`trainable_tokens.py`).
        ensure_weight_tying: where the input embedding or a module that holds its weight (a tied output head) is a target or
            in `modules_to_save`, one adapter or copy serves all of them, so that they stay tied (`lora_tied.py`).
        loftq_config, eva_config: options of the inits of these names; a `LoftQConfig`, an `EvaConfig` or a dictionary.
    """

    r: int = 8
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, int | float] | None = None
    use_dora: bool = False
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    loftq_config: LoftQConfig | dict | None = None
    eva_config: EvaConfig | dict | None = None

    method: ClassVar[str] = "LORA"
    ours_alone: ClassVar[tuple[str, ...]] = ("ensure_weight_tying",)
    not_supported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "layer_replication": (),
        "corda_config": (), "use_qalora": (), "qalora_group_size": (16,),
        "megatron_config": (), "megatron_core": ("megatron.core",), "alora_invocation_tokens": (),
        "arrow_config": (), "lora_ga_config": (), "runtime_config": ({"ephemeral_gpu_offload": False},),
        "use_bdlora": (), "velora_config": (), "monteclora_config": (), "kasa_config": (),
        "enable_lora": (), "merge_weights": (True,),  # of early releases: parts of fused weights; merged in eval mode
    }  # fmt: skip

    def __post_init__(self) -> None:
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        self.loftq_config = _made("loftq_config", LoftQConfig, self.loftq_config, self.init_lora_weights == "loftq") or {}
        self.eva_config = _made("eva_config", EvaConfig, self.eva_config, self.init_lora_weights == "eva")
        super().__post_init__()

    def faults(self) -> list[str]:
        found = super().faults()
        found += not_positive(with_pattern("r", self.r, self.rank_pattern, "rank_pattern"))
        found += not_finite(with_pattern("lora_alpha", self.lora_alpha, self.alpha_pattern, "alpha_pattern"))
        found += not_probability({"lora_dropout": self.lora_dropout})
        found += wrong_bias(self.bias, "lora_only")
        found += index_faults(self.trainable_token_indices)
        return found + list(self._init_faults())

    def _init_faults(self) -> Iterator[str]:
        init = self.init_lora_weights
        if init not in INITS and self._quick_rounds() is None:
            allowed = ", ".join(f'"{name}"' for name in INITS[2:])
            yield f'init_lora_weights={init!r} must be True, False, {allowed} or "pissa_niter_<rounds>"'
        if init == "orthogonal":
            ranks = {self.r, *(self.rank_pattern or {}).values()}
            yield from (f'init_lora_weights="orthogonal" needs even ranks, got {r}' for r in sorted(ranks) if r % 2)
        if self.use_dora and self.init_from_weight:
            yield f"use_dora=True cannot be combined with init_lora_weights={init!r}; choose one"
        if self.lora_bias and (self.use_dora or not isinstance(init, bool)):
            yield "lora_bias=True works with init_lora_weights=True or False and without use_dora"
        for value in (self.loftq_config, self.eva_config):
            yield from value.faults() if isinstance(value, (LoftQConfig, EvaConfig)) else ()

        if self.target_parameters:
            found = {"lora_dropout": self.lora_dropout, "use_dora": self.use_dora, "lora_bias": self.lora_bias}
            used = [name for name, value in found.items() if value]
            yield from (f"{name} cannot be combined with target_parameters; leave one out" for name in used)
            if init not in (True, False, "gaussian"):
                yield f'target_parameters needs init_lora_weights=True, False or "gaussian", got {init!r}'

    @classmethod
    def understood(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Files hold options of inits that were not chosen."""
        values, init = super().understood(values), values.get("init_lora_weights")
        idle = [name for name in ("loftq_config", "eva_config") if name.removesuffix("_config") != init]
        return {name: value for name, value in values.items() if name not in idle}

    @property
    def may_target_nothing(self) -> bool:
        return bool(self.target_parameters)

    def resolve_targets(self, model_type: str | None) -> None:
        if self.target_modules is None and self.target_parameters:
            self.target_modules = set()
        super().resolve_targets(model_type)

    @property
    def init_from_weight(self) -> bool:
        """Whether the factors start as parts of the weight, so that the change is counted from there."""
        return self.init_lora_weights in FROM_WEIGHT or self._quick_rounds() is not None

    def _quick_rounds(self) -> int | None:
        """The rounds that "pissa_niter_<rounds>" asks for; None where it is another init."""
        found = re.fullmatch(r"pissa_niter_(\d+)", str(self.init_lora_weights))
        return int(found[1]) if found else None

    def settings(self, path: str) -> LoraSettings:
        r = by_pattern(self.rank_pattern, path, self.r)
        alpha = by_pattern(self.alpha_pattern, path, self.lora_alpha)
        return LoraSettings(r, alpha / math.sqrt(r) if self.use_rslora else alpha / r, self._weight_init())

    def _weight_init(self) -> WeightInit | None:
        if not self.init_from_weight:
            return None
        if isinstance(self.loftq_config, LoftQConfig):
            return WeightInit("loftq", rounds=self.loftq_config.loftq_iter, bits=self.loftq_config.loftq_bits)
        return WeightInit("olora") if self.init_lora_weights == "olora" else WeightInit("pissa", rounds=self._quick_rounds())

    def pattern_keys(self) -> dict[str, list[str]]:
        return {"rank_pattern": list(self.rank_pattern or ()), "alpha_pattern": list(self.alpha_pattern or ())}


def _made(name: str, kind: Any, value: Any, wanted: bool) -> Any:
    """`value` as a `kind`: made from a dictionary, or from defaults where it is wanted and not given."""
    if isinstance(value, dict) and value:
        fields = [field.name for field in dataclasses.fields(kind)]
        wrong = [f'{name} has no field "{key}"{did_you_mean(key, fields)}' for key in value if key not in fields]
        if wrong:
            raise ConfigError("; ".join(wrong))
        value = kind(**value)
    if value and not wanted:
        raise ConfigError(
            f'{name} has an effect only with init_lora_weights="{name.removesuffix("_config")}"; set it, or leave it out'
        )
    return value or (kind() if wanted else None)
