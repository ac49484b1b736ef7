"""Labels, as the losses of the ecosystem read them."""

from __future__ import annotations

IGNORED = -100  # the label that no loss counts
