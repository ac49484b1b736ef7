"""A run as one self-contained page of HTML: its outcome, curves, samples before and after, and its recipe."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .callbacks import METRICS_FILE, read_metrics

REPORT_FILE = "report.html"
WIDTH, HEIGHT, LEFT, BELOW = 720, 260, 52, 34  # of a plot, and of the margins for its labels
COLOURS = {"training": "#2563eb", "held out": "#d97706", "learning rate": "#64748b"}
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem;color:#1e293b;background:#fff}
h1{font-size:1.5rem;margin-bottom:.2rem} h2{font-size:1.1rem;margin:2rem 0 .5rem} svg{width:100%;height:auto}
table{border-collapse:collapse;width:100%} td,th{text-align:left;padding:.3rem .8rem .3rem 0;vertical-align:top;
border-bottom:1px solid #e2e8f0} td.text{white-space:pre-wrap;overflow-wrap:anywhere} pre{background:#f8fafc;padding:1rem;
overflow-x:auto;font-size:.85rem} .legend span{margin-right:1.2rem} text{font:12px system-ui,sans-serif;fill:#64748b}
@media(max-width:40rem){.samples tr,.samples td,.samples th{display:block;border:0}}
"""


@dataclass(frozen=True)
class Sample:
    """A prompt, its answers before and after training, and the expected one."""

    prompt: str
    before: str
    after: str
    expected: str


@dataclass(frozen=True)
class Facts:
    """What a report shows besides the records."""

    title: str
    outcome: str
    table: dict[str, str]
    recipe: str
    samples: Sequence[Sample] = field(default=())


def write(folder: Path, facts: Facts) -> Path:
    """Write the page of a run from its records, completely or not at all."""
    page = folder / REPORT_FILE
    staged = folder / f".{REPORT_FILE}"
    staged.write_text(as_html(facts, read_metrics(folder / METRICS_FILE)), encoding="utf-8")
    staged.replace(page)
    return page


def as_html(facts: Facts, records: Sequence[dict[str, Any]]) -> str:
    """The page."""
    curves = {
        "training": [(r["step"], r["loss"]) for r in records if "loss" in r],
        "held out": [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r],
    }
    first, last = (next((r[key] for r in records if r.get(key) is not None), None) for key in ENDS)
    if first is not None and last is not None:
        end = max((step for points in curves.values() for step, _ in points), default=1)
        curves["held out"] = [(0, first), *(curves["held out"] or [(end, last)])]  # `last` may be of the best adapter
    rates = {"learning rate": [(r["step"], r["learning_rate"]) for r in records if "learning_rate" in r]}
    rows = "".join(f"<tr><th>{_safe(name)}</th><td>{_safe(value)}</td></tr>" for name, value in facts.table.items())
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{_safe(facts.title)}</title><style>{STYLE}</style><h1>{_safe(facts.title)}</h1><p>{_safe(facts.outcome)}</p>",
        f"<table>{rows}</table>",
        f"<h2>Loss (nats per token)</h2>{picture(curves)}",
        f"<h2>Learning rate</h2>{picture(rates)}",
        _samples(facts.samples),
        f"<h2>Recipe</h2><p><code>tunesmith train recipe.yaml</code> repeats this run.</p><pre>{_safe(facts.recipe)}</pre>",
    ]
    return "\n".join(part for part in parts if part) + "\n</html>\n"


ENDS = ("held_out_loss_before", "held_out_loss_after")


def picture(curves: dict[str, list[tuple[int, float]]]) -> str:
    """Curves over steps as SVG, with a legend; values that are not finite are left out."""
    curves = {name: [at for at in points if math.isfinite(at[1])] for name, points in curves.items()}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return "<p>no records</p>"
    steps = [step for points in curves.values() for step, _ in points]
    values = [value for points in curves.values() for _, value in points]
    low, high, end = min(values), max(values), max(steps) or 1
    span = (high - low) or abs(high) or 1.0

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 10) * step / end

    def y(value: float) -> float:
        return 10 + (HEIGHT - BELOW - 10) * (1 - (value - low) / span)

    drawn = []
    for part in range(5):
        value = low + span * part / 4
        drawn.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#e2e8f0"/>')
        drawn.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for step in sorted({round(end * part / 4) for part in range(5)}):
        drawn.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{step}</text>')
    for name, points in curves.items():
        line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        drawn.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>')
        if len(points) < 12:
            drawn += [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3" fill="{COLOURS[name]}"/>' for s, v in points]
    legend = "".join(f'<span style="color:{COLOURS[name]}">&#9632; {name}</span>' for name in curves)
    title = f"<title>{', '.join(curves)} over {end} steps</title>"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{title}{"".join(drawn)}</svg><p class="legend">{legend} by step</p>'


def _samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    rows = "".join(
        "<tr>" + "".join(f'<td class="text">{_safe(text)}</td>' for text in (s.prompt, s.before, s.after, s.expected)) + "</tr>"
        for s in samples
    )
    heads = "".join(f"<th>{name}</th>" for name in ("prompt", "before", "after", "expected"))
    return f'<h2>Held-out rows, before and after</h2><table class="samples"><tr>{heads}</tr>{rows}</table>'


def _safe(text: object) -> str:
    return html.escape(str(text))
