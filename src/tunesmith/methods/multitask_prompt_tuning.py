"""Multitask prompt tuning: one shared prompt, turned into each task's own by a trained low-rank factor.

    P_k = P * (U_k V_k),   P in R^{n x d} of all tasks,   U_k in R^{n x r} and V_k in R^{r x d} of task k

Wang et al. 2023, "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning",
https://arxiv.org/abs/2303.02861 (section 3.1).
"""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..checks import not_positive
from ..config import config_class
from ..errors import ConfigError, UsageError
from ..registry import register
from .prompt_tuning import PromptTuning, PromptTuningConfig


class MultitaskPromptTuningInit(str, Enum):
    """Initial values: as in prompt tuning, or trained on source tasks.

    Of these: the shared prompt and the mean of all tasks' factors, those of one task, or the shared prompt alone.
    """

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


_FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@config_class
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Configuration of multitask prompt tuning. Every call says which task each row is: `task_ids`, one per row.

    Args:
        prompt_tuning_init: a `MultitaskPromptTuningInit` or its name.
        prompt_tuning_init_state_dict_path: file of the source tasks' values (an adapter's weights file).
        prompt_tuning_init_task: which source task; for EXACT_SOURCE_TASK.
        num_ranks: rank of the tasks' factors.
        num_tasks: number of tasks.
    """

    prompt_tuning_init: MultitaskPromptTuningInit | str = MultitaskPromptTuningInit.RANDOM  # type: ignore[assignment]
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int = 0
    num_ranks: int = 1
    num_tasks: int = 1

    method: ClassVar[str] = "MULTITASK_PROMPT_TUNING"
    inits: ClassVar[type[Enum]] = MultitaskPromptTuningInit

    def faults(self) -> list[str]:
        found = super().faults()
        found += not_positive({"num_ranks": self.num_ranks, "num_tasks": self.num_tasks})
        if self.prompt_tuning_init_task < 0:
            found.append(f"prompt_tuning_init_task={self.prompt_tuning_init_task!r} must be a whole number of at least 0")
        if self.prompt_tuning_init in _FROM_SOURCE and not self.prompt_tuning_init_state_dict_path:
            init = MultitaskPromptTuningInit(self.prompt_tuning_init).value
            found.append(f"prompt_tuning_init={init} needs prompt_tuning_init_state_dict_path")
        return found


@register(MultitaskPromptTuningConfig)
class MultitaskPromptTuning(PromptTuning):
    """The shared prompt, and each task's factors, `(tasks, tokens * submodules, r)` and `(tasks, r, dim)`."""

    by_task = True

    def __init__(self, config: Any, model: nn.Module, materialized: bool = False) -> None:
        super().__init__(config, model, materialized)
        rows, dim = self.shape(config)
        self.prefix_task_cols = nn.Parameter(torch.empty(config.num_tasks, rows, config.num_ranks))
        self.prefix_task_rows = nn.Parameter(torch.empty(config.num_tasks, config.num_ranks, dim))

    def reset_parameters(self, base: Any) -> None:
        nn.init.normal_(self.prefix_task_cols, std=0.02)
        nn.init.normal_(self.prefix_task_rows, std=0.02)
        if self.config.prompt_tuning_init in _FROM_SOURCE:
            self._take_from_source()
        else:
            super().reset_parameters(base)

    def forward(self, task_ids: Any = None) -> Tensor:
        """`(B, tokens * submodules, dim)`, the prompt of each row's task."""
        count = self.config.num_tasks
        if task_ids is None:
            raise UsageError(
                "multitask prompt tuning needs task_ids, one per row, e.g. task_ids=torch.tensor([0, 1]); "
                "a Trainer keeps that column only with remove_unused_columns=False"
            )
        ids = torch.as_tensor(task_ids, device=self.embedding.device)
        if not torch.compiler.is_compiling() and not bool(((ids >= 0) & (ids < count)).all()):
            raise UsageError(f"task_ids={ids.tolist()} must be numbers from 0 to {count - 1} (num_tasks={count})")
        return self.values() * (self.prefix_task_cols[ids] @ self.prefix_task_rows[ids])

    def _take_from_source(self) -> None:
        """Copy the source tasks' values; all tasks get the same initial factors.

        Raises:
            ConfigError: the file holds no such values, or values of another size.
        """
        config = self.config
        path, init = config.prompt_tuning_init_state_dict_path, config.prompt_tuning_init.value
        source = _read(path)
        wanted: dict[str, Any] = {"prompt_embeddings": self.embedding}
        if init != "ONLY_SOURCE_SHARED":
            wanted |= {"prefix_task_cols": self.prefix_task_cols, "prefix_task_rows": self.prefix_task_rows}
        for name, parameter in wanted.items():
            if name not in source:
                raise ConfigError(
                    f'prompt_tuning_init_state_dict_path: {path} has no "{name}"; give the file of a multitask adapter'
                )
            value = source[name]
            if name != "prompt_embeddings":
                if init == "EXACT_SOURCE_TASK" and config.prompt_tuning_init_task >= len(value):
                    number = config.prompt_tuning_init_task
                    raise ConfigError(f"prompt_tuning_init_task={number}, but {path} holds tasks 0 to {len(value) - 1}")
                value = value.mean(0) if init == "AVERAGE_SOURCE_TASKS" else value[config.prompt_tuning_init_task]
            expected = parameter.shape if name == "prompt_embeddings" else parameter.shape[1:]
            if value.shape != expected:
                found = f'"{name}" of the shape {tuple(value.shape)}'
                raise ConfigError(f"prompt_tuning_init_state_dict_path: {path} holds {found}, expected {tuple(expected)}")
            with torch.no_grad():
                parameter.copy_(value)


def _read(path: str) -> dict[str, Tensor]:
    """Every tensor of a weights file, never running code from it."""
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise ConfigError(f"prompt_tuning_init_state_dict_path: {path} cannot be read as tensors ({error})") from error
    except Exception as error:  # whatever unpickling meets
        raise ConfigError(
            f"prompt_tuning_init_state_dict_path: {path} contains more than tensors, so it was not read"
        ) from error
