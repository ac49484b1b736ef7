"""What others' tools need to take ours for what they know; nothing below imports it."""

from __future__ import annotations

from ..seen_as import PREPARE
from .peft_entry import accept_ours

PREPARE.append(accept_ours)
