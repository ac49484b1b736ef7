"""Functions of peft that are given our objects answer for ours.

`peft.get_peft_model(model, our configuration)` makes one of our handles (trainers that are given a configuration call it
themselves), and `peft.get_peft_model_state_dict(our handle)` gives its tensors under the names of peft's files, which the
names in a handle's `state_dict` would not lead peft to. What is given says whose function is meant; for peft's own objects,
peft's runs.
"""

from __future__ import annotations

import functools
import sys
from typing import Any


def accept_ours(peft: Any) -> None:
    """Put functions that tell apart what they are given in place of peft's, wherever those were imported."""
    from ..config import PeftConfig
    from ..errors import UsageError
    from ..model import PeftModel, get_peft_model

    def given_configuration(model: Any, peft_config: Any = None, *_: Any, **__: Any) -> bool:
        return isinstance(peft_config, PeftConfig)

    def given_handle(model: Any, *_: Any, **__: Any) -> bool:
        return isinstance(model, PeftModel)

    def tensors_of(model: Any, state_dict: Any = None, adapter_name: str = "default", **_: Any) -> Any:
        return model.get_adapter_state_dict(adapter_name, state_dict)

    def set_tensors(*_: Any, **__: Any) -> Any:
        raise UsageError(
            "set_peft_model_state_dict cannot write into this handle; load_adapter(folder, name) replaces its values"
        )

    _replace(peft, "get_peft_model", given_configuration, get_peft_model)
    _replace(peft, "get_peft_model_state_dict", given_handle, tensors_of)
    _replace(peft, "set_peft_model_state_dict", given_handle, set_tensors)


def _replace(peft: Any, name: str, ours_is_meant: Any, ours: Any) -> None:
    theirs = getattr(peft, name)

    @functools.wraps(theirs)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (ours if ours_is_meant(*args, **kwargs) else theirs)(*args, **kwargs)

    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        if names.get(name) is theirs:
            names[name] = chosen
