"""`tunesmith train`: a data file to an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError


def train(
    data: Annotated[Path, typer.Option(help="csv, json, jsonl or txt file with one text per row.")],
    text_column: Annotated[str | None, typer.Option(help="Column or key that holds the text.")] = None,
    base: Annotated[str, typer.Option("--base", "--model-name-or-path", help="sprout, a folder or a hub id.")] = "sprout",
    output_dir: Annotated[Path, typer.Option(help="Where the adapter is written.")] = Path("adapter"),
    method: Annotated[str, typer.Option(help="prompt-tuning, lora, or any of `tunesmith methods`.")] = "prompt-tuning",
    num_virtual_tokens: Annotated[int, typer.Option(help="Prompt methods: how many virtual tokens.")] = 8,
    prompt_tuning_init_text: Annotated[str | None, typer.Option(help="Prompt tuning: a text to start from.")] = None,
    lora_r: Annotated[int, typer.Option(help="LoRA and its kin: rank.")] = 8,
    lora_alpha: Annotated[int, typer.Option(help="LoRA: strength (scale is alpha / r).")] = 16,
    lora_dropout: Annotated[float, typer.Option(help="LoRA: dropout while training.")] = 0.0,
    lora_target_modules: Annotated[str | None, typer.Option(help="Comma-separated names or all-linear.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="A field of the method's config, e.g. use_dora=true; repeatable."),
    ] = None,
    num_train_epochs: Annotated[float, typer.Option("--num-train-epochs", "--epochs", help="Passes over the data.")] = 5,
    learning_rate: Annotated[float | None, typer.Option(help="Default: the method's usual one.")] = None,
    per_device_train_batch_size: Annotated[
        int, typer.Option("--per-device-train-batch-size", "--batch-size", help="Rows per step.")
    ] = 8,
    max_length: Annotated[int, typer.Option(help="Cut longer rows to so many tokens.")] = 256,
    held_out: Annotated[float, typer.Option(help="Share of the rows kept for evaluation.")] = 0.1,
    packing: Annotated[
        bool | None,
        typer.Option("--packing/--no-packing", help="Texts of a batch in one row, unpadded. Default: where possible."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="What the base computes in: auto (bfloat16 where fast), float32, ...")] = "auto",
    seed: Annotated[int, typer.Option(help="Decides the held-out rows, start values and order of rows.")] = 0,
) -> None:
    """Train an adapter on your own texts.

    Example: tunesmith train --data prompts.csv --text-column prompt --output-dir my-adapter
    """
    from rich.console import Console

    from ..data.files import check_folder, read_texts

    options = read_options(option or [])
    texts = read_texts(data, text_column)  # before torch is imported: a mistake in the data shows at once
    check_folder(output_dir)

    from ..auto import load_base, load_tokenizer
    from ..bases.precision import dtype_named
    from ..train import job, quiet

    console = Console(highlight=False, soft_wrap=True)
    settings = job.Settings(
        method, num_virtual_tokens, prompt_tuning_init_text, lora_r, lora_alpha, lora_dropout, lora_target_modules,
        num_train_epochs, per_device_train_batch_size, learning_rate, max_length, held_out, seed, options, packing,
    )  # fmt: skip
    quiet.hush()
    chosen = dtype_named(dtype)
    model, tokenizer = load_base(base, dtype="auto" if chosen is None else chosen), load_tokenizer(base)
    computes = str(model.dtype).removeprefix("torch.")
    note = ", which this machine multiplies fastest (--dtype float32 for full precision)" if dtype == "auto" and chosen else ""
    console.print(f"{len(texts)} rows from {data}; base {base} in {computes}{note}; method {method}")
    result = job.train(model, tokenizer, texts, settings, title=method, console=console)
    size = job.save(result, tokenizer, output_dir)
    trainable, total = result.handle.get_nb_trainable_parameters()
    console.print(f"trained {trainable:,} of {total:,} parameters; {result.sentence()}")
    console.print(f"adapter: {output_dir} ({size / 1024:.1f} KB of tensors)")
    console.print(f'use it: tunesmith generate --adapter {output_dir} --prompt "..."')


def read_options(pairs: list[str]) -> dict[str, Any]:
    """`["r=16", "use_dora=true"]` as a dictionary; values are JSON, or else plain text.

    Raises:
        ConfigError: a pair has no `=`, or a name comes twice.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name or name in options:
            raise ConfigError(f"--option {pair}: give each field once, as name=value, e.g. --option use_dora=true")
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text
    return options
