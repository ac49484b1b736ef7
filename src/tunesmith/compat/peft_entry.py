"""`peft.get_peft_model(model, our configuration)` makes one of our handles.

Trainers that are given a configuration call this function themselves. Its type says whose handle is meant, so the choice is
made here; with peft's configurations, peft's function runs as it always did.
"""

from __future__ import annotations

import functools
import sys
from typing import Any


def accept_our_configurations(peft: Any) -> None:
    """Put a function that tells configurations apart in place of peft's, wherever it was imported."""
    theirs = peft.get_peft_model
    if getattr(theirs, "__module__", None) == __name__:
        return
    choosing = _choosing(theirs)
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        if names.get("get_peft_model") is theirs:
            names["get_peft_model"] = choosing


def _choosing(theirs: Any) -> Any:
    from ..config import PeftConfig
    from ..model import get_peft_model as ours

    @functools.wraps(theirs, assigned=("__name__", "__qualname__", "__doc__", "__annotations__"))
    def get_peft_model(model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        return (ours if isinstance(peft_config, PeftConfig) else theirs)(model, peft_config, *args, **kwargs)

    return get_peft_model
