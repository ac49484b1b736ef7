"""A recipe with lists as values: one run for each combination, and one table of all runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .processes import check_alone
from .recipe import FIELDS, SYNONYMS, read_recipe, resolve

NOT_VARIED = {"data", "output_dir", "columns", "options"}
MOST = 200


def combinations(recipe: Path, flags: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """`(name, settings)` of each run; the name says what varies: `learning_rate=0.001,lora_r=8`.

    Raises:
        ConfigError: nothing varies, a list is empty, a setting cannot be varied, or there are too many combinations.
    """
    given = {**read_recipe(recipe), **flags}
    lists = {name: value for name, value in given.items() if isinstance(value, list)}
    for name, values in lists.items():
        if SYNONYMS.get(name, name) in NOT_VARIED:
            raise ConfigError(f"{recipe}: {name} cannot be varied; give one value")
        if not values:
            raise ConfigError(f"{recipe}: {name} is an empty list; add values")
    if not lists:
        raise ConfigError(f"{recipe} varies nothing; give a list, e.g. `learning_rate: [1e-4, 1e-3]`, or use tunesmith train")
    total = 1
    for values in lists.values():
        total *= len(values)
    if total > MOST:
        raise ConfigError(f"{recipe} makes {total} runs; at most {MOST} are allowed")
    found = []
    for chosen in itertools.product(*lists.values()):
        varied = dict(zip(lists, chosen))
        name = ",".join(f"{key}={_shown(value)}" for key, value in varied.items())
        found.append((name, resolve(None, {}, {**given, **varied}).values))
    if len({name for name, _ in found}) < len(found):
        raise ConfigError(f"{recipe}: a list contains a value twice; keep one")
    return found


def _shown(value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return "".join(character if character.isalnum() or character in "+-._" else "_" for character in text)


def finished(folder: Path) -> dict[str, Any] | None:
    """The last record of a finished run; None of any other."""
    from .callbacks import METRICS_FILE, read_metrics

    records = read_metrics(folder / METRICS_FILE)
    ended = records and "held_out_loss_after" in records[-1] and (folder / "adapter_model.safetensors").is_file()
    return records[-1] if ended else None


def run_all(recipe: Path, flags: dict[str, Any]) -> list[dict[str, Any]]:
    """Train every combination that is not finished yet; `sweep.json` in the output folder is written after each.

    Raises:
        ConfigError: see `combinations`.
        UsageError: a launcher has started several processes.
        TunesmithError: a run failed; those before it are kept, and the same command resumes the sweep.
    """
    from . import run

    check_alone("sweep")
    runs = combinations(recipe, flags)
    folder = Path(runs[0][1].get("output_dir", FIELDS["output_dir"].default))
    rows = []
    for name, values in runs:
        place = folder / name
        if finished(place) is None:
            run.from_values({**values, "output_dir": str(place)}, resume=True)
        ended = finished(place)
        assert ended is not None, "a run that raises nothing is finished"
        row = {"run": name, "before": ended["held_out_loss_before"], "after": ended["held_out_loss_after"]}
        rows.append({**row, "seconds": ended["seconds"]})
        (folder / "sweep.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return sorted(rows, key=lambda row: float("inf") if row["after"] is None else row["after"])
