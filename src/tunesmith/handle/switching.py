"""Which of a handle's adapters are active."""

from __future__ import annotations

from ..config import PeftConfig, PeftType
from ..errors import UsageError
from .frames import Frames


class Switching(Frames):
    """The part of a handle that switches between its adapters and deletes them."""

    def set_adapter(self, adapter_name: str | list[str] | tuple[str, ...], inference_mode: bool = False) -> None:
        """Make these adapters the active ones; only they train (unless loaded or set for inference)."""
        names = self._named(adapter_name)
        before, self._active = self._active, names
        self._settle()
        for name in {*before, *names} & self.peft_config.keys():
            trains = name in names and not inference_mode and not self.peft_config[name].inference_mode
            self.tree(name).requires_grad_(trains)

    def set_requires_grad(self, adapter_names: str | list[str] | tuple[str, ...], requires_grad: bool = True) -> None:
        """Let these adapters train, active or not, or freeze them; until `set_adapter` decides again.

        Raises:
            AdapterNameError: this handle has no adapter of one of the names.
        """
        for name in self._named(adapter_names):
            self.tree(name).requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Remove adapters; if no active one is left, the first remaining one becomes active."""
        names = self._named(adapter_name)
        for name in names:
            self._require_unmerged(name)
        self._active = tuple(name for name in self._active if name not in names)
        for name in names:
            del self.adapters[name], self.peft_config[name]
        self._forget()
        if not self._active:
            self.set_adapter(tuple(self.peft_config)[:1])

    def _require_unmerged(self, name: str) -> None:
        """
        Raises:
            UsageError: the adapter is merged into the base's weights.
        """
        if name in self.merged_adapters:
            raise UsageError(f'"{name}" is merged into the weights; call unmerge_adapter() first')

    @property
    def active_adapter(self) -> str:
        """Name of the active adapter; the first, when several are."""
        return self._active[0] if self._active else ""

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapter]

    @property
    def peft_type(self) -> PeftType | str | None:
        return self.active_peft_config.peft_type

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of modules that some adapter of this handle trains whole; None where none does."""
        return {name for config in self.peft_config.values() for name in getattr(config, "modules_to_save", None) or ()} or None

    @property
    def has_active_enabled_adapter(self) -> bool:
        return bool(self._effective)
