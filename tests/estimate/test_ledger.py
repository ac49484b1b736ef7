"""The ledger of memory: what lives, and the gaps between it."""

from __future__ import annotations

import torch

from tunesmith.estimate.ledger import Ledger


def test_a_ledger_counts_what_lives():
    x = torch.empty(1000, 100, device="meta")
    with Ledger() as ledger:
        with ledger.phase("two"):
            y = x + 1
            z = (y @ y.T).sum()
        assert ledger.live == 400_000 + 4, "x was there before"
        assert ledger.peaks["two"] == 400_000 + 4_000_000 + 4
        del y
        assert ledger.live == 4 and z.is_meta
    assert ledger.flops == 2 * 1000 * 1000 * 100


def test_gaps_are_counted_between_small_blocks_alone():
    with Ledger() as ledger, ledger.phase("made"):
        ledger.slack = 0.5
        kept = torch.empty(100, device="meta"), torch.empty(10**8, device="meta")
    assert ledger.peaks["made"] == 600 + 4 * 10**8 and len(kept) == 2
