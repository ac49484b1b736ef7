"""The demo: two specialists trained on one frozen, bundled base model, measured and compared."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..assets import FOLDER
from ..auto import load_base, load_tokenizer
from ..data.encode import encode_text
from ..data.files import check_folder, read_texts
from ..data.text import mean_loss, pad_id_of
from . import job, quiet
from .continuation import Sampling, continuation
from .progress import JobConsole

CREATIVE = Sampling(max_new_tokens=50, temperature=0.7, top_p=0.9, repetition_penalty=1.2)
SPECIALISTS = {
    "prompt-writer": ("prompts.csv", "prompt", "I want you to act as a"),
    "quote-writer": ("quotes.jsonl", "quote", "There are two things that matter:"),
}


def tell(method: str, output_dir: Path, num_train_epochs: float, seed: int) -> dict[str, dict[str, float]]:
    """Run the demo.

    Returns:
        The perplexities `{model: {data: perplexity}}`.
    """
    check_folder(output_dir)
    started, console = time.monotonic(), Console(highlight=False)
    quiet.hush()
    base, tokenizer = load_base("sprout", dtype=torch.float32).eval(), load_tokenizer("sprout")
    settings = job.Settings(method, num_train_epochs=num_train_epochs, held_out=0.15, seed=seed)
    console.print(f"[bold]One base:[/bold] sprout, {base.num_parameters():,} parameters, frozen. [bold]Method:[/bold] {method}")

    results = {}
    for name, (file, column, _) in SPECIALISTS.items():
        texts = read_texts(FOLDER / "demo" / file, column)
        results[name] = job.train(base, tokenizer, texts, settings, JobConsole(name, console))
        console.print(f"{name}: {results[name].sentence()}")

    perplexities = _perplexities(base, results, pad_id_of(tokenizer))
    console.print(_perplexity_table(perplexities))
    console.print(_generation_table(base, results, tokenizer, seed))
    sizes = {name: job.save(result, tokenizer, output_dir / name) for name, result in results.items()}
    console.print(_size_table(base, results, sizes))
    picture = _draw_losses(results, output_dir / "losses.png")
    console.print(f"loss curves: {picture}" if picture else "no plot: needs matplotlib (pip install 'tunesmith[plot]')")
    console.print(f"adapters: {', '.join(str(output_dir / name) for name in results)}")
    console.print(f'next: tunesmith generate --adapter {output_dir}/quote-writer --prompt "A good friend" --compare')
    console.print(f"done in {time.monotonic() - started:.0f} s")
    return perplexities


def _perplexities(base: nn.Module, results: dict[str, job.Result], pad_id: int) -> dict[str, dict[str, float]]:
    models = {"base": base, **{name: result.handle for name, result in results.items()}}
    return {
        model: {data: math.exp(mean_loss(module, result.held_out, pad_id)) for data, result in results.items()}
        for model, module in models.items()
    }


def _perplexity_table(perplexities: dict[str, dict[str, float]]) -> Table:
    table = Table(title="Perplexity on held-out rows (lower is better)", title_justify="left", min_width=48)
    table.add_column("model")
    rows_of = {"prompt-writer": "prompts", "quote-writer": "quotes"}
    for name in SPECIALISTS:
        table.add_column(rows_of[name], justify="right")
    for model, by_data in perplexities.items():
        best = {data: min(p[data] for p in perplexities.values()) for data in by_data}
        cells = [f"[bold green]{v:.1f}[/bold green]" if v == best[data] else f"{v:.1f}" for data, v in by_data.items()]
        table.add_row(model, *cells)
    return table


def _generation_table(base: nn.Module, results: dict[str, job.Result], tokenizer: Any, seed: int) -> Table:
    table = Table(title="The same prompts, the same base in memory", title_justify="left", show_lines=True)
    table.add_column("model")
    prompts, sampling = [prompt for _, _, prompt in SPECIALISTS.values()], replace(CREATIVE, seed=seed)
    for prompt in prompts:
        table.add_column(f'"{prompt} ..."', ratio=1)
    for name, model in {"base": base, **{name: result.handle for name, result in results.items()}}.items():
        texts = [continuation(model, tokenizer, encode_text(prompt, tokenizer), sampling) for prompt in prompts]
        table.add_row(name, *["... " + " ".join(text.split()) for text in texts])
    return table


def _size_table(base: nn.Module, results: dict[str, job.Result], sizes: dict[str, int]) -> Table:
    table = Table(title="What it costs", title_justify="left")
    for column in ("", "trained parameters", "file"):
        table.add_column(column, justify="left" if not column else "right")
    for name, result in results.items():
        trainable, total = result.handle.get_nb_trainable_parameters()
        table.add_row(name, f"{trainable:,} ({100 * trainable / total:.3f} %)", f"{sizes[name] / 1024:.1f} KB")
    weights = sum(p.numel() * p.element_size() for p in base.parameters())
    adapters = sum(p.numel() * p.element_size() for r in results.values() for p in r.handle.adapters.parameters())
    table.add_row("one base and two adapters in memory", "", f"{(weights + adapters) / 1e6:.1f} MB")
    table.add_row("two full copies would take", "", f"{2 * weights / 1e6:.1f} MB")
    return table


def _draw_losses(results: dict[str, job.Result], path: Path) -> Path | None:
    """Training loss over steps, one line per specialist; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, result in results.items():
        axes.plot(*zip(*result.losses), label=name)
        if result.held_out_after is not None:
            color = axes.lines[-1].get_color()
            axes.axhline(result.held_out_after, linestyle=":", color=color, label=f"{name}, held out, final")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Two adapters, one frozen base")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
