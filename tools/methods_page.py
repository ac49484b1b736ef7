"""Write docs/methods.md: every method and what it can do, found by trying (tests/parity/capabilities.py)."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.parity.capabilities import CAPABILITIES, PAGE, cases, page


def main() -> int:
    results: dict[str, dict[str, str]] = {}
    for case in cases():
        results[case.name] = {}
        for name, attempt in CAPABILITIES.items():
            try:
                results[case.name][name] = attempt(case)
            except Exception:
                traceback.print_exc()
                results[case.name][name] = "**fails**"
        print(case.name, results[case.name], flush=True)
    PAGE.write_text(page(results))
    return int(any("**fails**" in answers.values() for answers in results.values()))


if __name__ == "__main__":
    sys.exit(main())
