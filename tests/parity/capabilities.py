"""What each method can do, found out by doing it: the source of the table in docs/methods.md and of `test_capabilities.py`."""

from __future__ import annotations

import copy
import inspect
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import output, quiet, read_by_peft, scrambled, written_by_peft
from tunesmith.config import PeftConfig
from tunesmith.registry import adapter_type, all_methods

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
TARGETS = ["q_proj", "v_proj"]


@dataclass
class Case:
    """One method, or one variant of it that a flag chooses.

    Args:
        name: as the table shows it.
        config: our configuration class.
        fields: for both libraries' configurations.
        reference: the reference library's configuration class; None where it has no such method.
        base: which tiny model.
    """

    name: str
    config: type[PeftConfig]
    fields: dict[str, Any] = field(default_factory=dict)
    reference: Any = None
    base: str = "llama"

    def ours(self) -> Any:
        return scrambled(ts.get_peft_model(tiny.make(self.base), self.config(task_type=self.task, **self.fields))).eval()

    def theirs(self) -> Any:
        with quiet():
            config = self.reference(task_type=self.task, **self.fields)
            return scrambled(peft.get_peft_model(tiny.make(self.base), config)).eval()

    @property
    def task(self) -> str:
        return tiny.task_of(self.base)

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        inputs = tiny.inputs_for(self.base, rows=3)
        tokens = self.fields.get("token_indices") or self.fields.get("trainable_token_indices")
        if tokens:  # the trained ones occur
            inputs["input_ids"][:, 1 : 1 + len(tokens)] = torch.tensor(tokens)
        return inputs | ({"task_ids": torch.tensor([0, 1, 1])} if "num_tasks" in self.fields else {})


def cases() -> list[Case]:
    """Every registered method, and the variants of LoRA."""
    made = []
    for name, method in all_methods().items():
        own = dict(FIELDS.get(name, {}))
        base = own.pop("base", "llama")
        if "target_modules" in inspect.signature(method.config).parameters and base == "llama":
            own.setdefault("target_modules", TARGETS)
        reference = getattr(peft, method.config.__name__, None)
        made.append(Case(title(method.adapter), method.config, own, reference, base))
        if name == "LORA":
            for label, extra in VARIANTS.items():
                own = {**FIELDS[name], "target_modules": TARGETS, **extra}
                made.append(Case(label, method.config, own, reference, own.pop("base", "llama")))
    return made


FIELDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 50, "init_r": 4, "target_r": 2},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2, "target_modules": None},
    "BITFIT": {"base": "bloom"},
    "BOFT": {"boft_block_size": 8},
    "BOTTLENECK": {"bottleneck_size": 4, "target_modules": None},
    "HRA": {"r": 4},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "LORA": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2, "num_ranks": 2},
    "OFT": {"oft_block_size": 8},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "TRAINABLE_TOKENS": {"token_indices": [3, 5, 8], "target_modules": ["embed_tokens"]},
    "VERA": {"r": 8},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA, rank-stabilised (rsLoRA)": {"use_rslora": True},
    "LoRA, weight-decomposed (DoRA)": {"use_dora": True},
    "LoRA with a bias on B": {"lora_bias": True, "base": "opt"},
    "LoRA, PiSSA initialisation": {"init_lora_weights": "pissa"},
    "LoRA, OLoRA initialisation": {"init_lora_weights": "olora"},
    "LoRA, orthogonal initialisation": {"init_lora_weights": "orthogonal"},
    "LoRA with trainable tokens": {"trainable_token_indices": [3, 5, 8]},
}


def title(adapter: type) -> str:
    """The method's name as its module's first sentence has it."""
    return (inspect.getdoc(inspect.getmodule(adapter)) or adapter.__name__).partition(":")[0]


def paper(case: Case) -> str:
    adapter = adapter_type(case.config(task_type=case.task, **case.fields))
    found = re.findall(r"arxiv\.org/abs/([\d.]*\d)", inspect.getdoc(inspect.getmodule(adapter)) or "")
    return f"[{found[0]}](https://arxiv.org/abs/{found[0]})" if found else ""


# --- what is tried; each returns "yes", "no" or "-" (where the question makes no sense), or raises -------------------------


def trains(case: Case) -> str:
    torch.manual_seed(0)
    handle = ts.get_peft_model(tiny.make(case.base), case.config(task_type=case.task, **case.fields)).train()
    optimizer = torch.optim.Adam([p for p in handle.parameters() if p.requires_grad], lr=1e-2)
    inputs = case.inputs
    labels = torch.arange(3) % 3 if case.task == "SEQ_CLS" else inputs.get("decoder_input_ids", inputs["input_ids"])
    losses = []
    for _ in range(12):
        loss = handle(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3, losses
    return "yes"


def saves_and_loads(case: Case) -> str:
    handle = case.ours()
    with tempfile.TemporaryDirectory() as folder:
        handle.save_pretrained(folder)
        again = ts.PeftModel.from_pretrained(tiny.make(case.base), folder).eval()
    assert torch.equal(output(again, case.inputs), output(handle, case.inputs))
    return "yes"


def loads_theirs(case: Case) -> str:
    if case.reference is None:
        return "-"
    theirs = case.theirs()
    with tempfile.TemporaryDirectory() as folder:
        written_by_peft(theirs, Path(folder))
        mine = ts.PeftModel.from_pretrained(tiny.make(case.base), folder).eval()
    _assert_alike(mine, theirs, case)
    return "yes"


def they_load_ours(case: Case) -> str:
    if case.reference is None:
        return "-"
    mine = case.ours()
    with tempfile.TemporaryDirectory() as folder:
        mine.save_pretrained(folder)
        theirs = read_by_peft(tiny.make(case.base), Path(folder))
    _assert_alike(mine, theirs, case)
    return "yes"


def merges(case: Case) -> str:
    handle = case.ours()
    try:
        merged = handle.merge_and_unload(copy=True)
    except ts.UsageError as error:
        assert "cannot be merged" in str(error)
        return "no"
    torch.testing.assert_close(output(merged, case.inputs), output(handle, case.inputs), atol=1e-4, rtol=1e-4)
    return "yes"


def mixes(case: Case) -> str:
    """A batch of three rows: this adapter, none, this adapter."""
    handle = case.ours()
    with torch.no_grad():
        mixed = tiny.main_output(handle(**case.inputs, adapter_names=["default", "__base__", "default"]))
    with handle.disable_adapter():
        plain = output(handle, case.inputs)
    mixed = mixed[:, -plain.shape[1] :]
    expected = output(handle, case.inputs)[:, -plain.shape[1] :]
    torch.testing.assert_close(mixed[1], plain[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[[0, 2]], expected[[0, 2]], atol=1e-5, rtol=1e-4)
    return "yes"


CAPABILITIES: dict[str, Callable[[Case], str]] = {
    "trains": trains,
    "saves": saves_and_loads,
    "loads peft's": loads_theirs,
    "peft loads ours": they_load_ours,
    "merges": merges,
    "mixes by row": mixes,
}


def _assert_alike(mine: Any, theirs: Any, case: Case) -> None:
    expected = output(theirs, case.inputs)
    with torch.no_grad():
        plain = tiny.main_output(copy.deepcopy(mine).unload()(**case.inputs))
    assert (expected[:, -plain.shape[1] :] - plain).abs().max() > 1e-3, "the adapter does nothing; this proves nothing"
    torch.testing.assert_close(output(mine, case.inputs), expected, atol=1e-5, rtol=1e-5)


def page(results: dict[str, dict[str, str]]) -> str:
    """The methods' page."""
    listed = {case.name: case for case in cases()}
    lines = [
        "# Methods",
        "",
        "Generated by `python tools/methods_page.py`, which tries everything in `tests/parity/capabilities.py`; the test suite",
        "repeats it. *loads peft's* and *peft loads ours*: files of one library give the same outputs in the other (a dash:",
        "`peft` has no such method). *merges*: into the weights of the base. *mixes by row*: works in one batch with rows that",
        "use other adapters or none, in training and inference.",
        "",
        f"| method | configuration | paper | {' | '.join(CAPABILITIES)} |",
        f"|---|---|---|{'---|' * len(CAPABILITIES)}",
    ]
    for name, answers in results.items():
        case = listed[name]
        answered = " | ".join(answers[capability] for capability in CAPABILITIES)
        lines.append(f"| {name} | `{case.config.__name__}` | {paper(case)} | {answered} |")
    return "\n".join(lines) + "\n"
