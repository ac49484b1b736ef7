"""transformers' plain Trainer and tunesmith.Trainer on handles: checkpoints, evaluation, resuming, the best adapter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import tunesmith
from tests import tiny
from tunesmith import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tunesmith.data.text import PadRight

CONFIGS = {
    "lora": lambda: LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.1, target_modules="all-linear"),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def rows(count: int = 24) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 12, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(2, tiny.VOCAB, (n,), generator=generator).tolist()} for n in lengths]


def make_trainer(trainer_class: type, folder: Path, config, **arguments) -> transformers.Trainer:
    handle = get_peft_model(tiny.make("llama"), config)
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 6, "save_steps": 2, "eval_steps": 2,
        "eval_strategy": "steps", "save_strategy": "steps", "logging_steps": 1, "learning_rate": 1e-2, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "seed": 5, **arguments,
    }  # fmt: skip
    return trainer_class(
        model=handle,
        args=transformers.TrainingArguments(**settings),
        train_dataset=rows(),
        eval_dataset=rows(8),
        data_collator=PadRight(0),
    )


@pytest.mark.parametrize("trainer_class", [transformers.Trainer, tunesmith.Trainer])
@pytest.mark.parametrize("config", CONFIGS)
def test_trains_evaluates_and_checkpoints_hold_the_adapter_only(trainer_class, config, tmp_path):
    trainer = make_trainer(trainer_class, tmp_path, CONFIGS[config]())
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("adapters.default") for name in changed)
    assert [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]

    checkpoint = tmp_path / "checkpoint-4"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"} <= names
    assert not names & {"model.safetensors", "pytorch_model.bin"}
    assert checkpoint.joinpath("adapter_model.safetensors").stat().st_size < 40_000
    loaded = PeftModel.from_pretrained(tiny.make("llama"), str(tmp_path / "checkpoint-6"))
    inputs = tiny.inputs_for("llama")
    assert torch.equal(loaded(**inputs).logits, trainer.model.eval()(**inputs).logits)


@pytest.mark.parametrize("config", CONFIGS)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(config, tmp_path):
    whole = make_trainer(tunesmith.Trainer, tmp_path / "whole", CONFIGS[config]())
    whole.train()
    make_trainer(tunesmith.Trainer, tmp_path / "cut", CONFIGS[config]()).train()
    torch.manual_seed(99)  # the resumed run starts from other values, all of which must come from the checkpoint
    resumed = make_trainer(tunesmith.Trainer, tmp_path / "cut", CONFIGS[config]())
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    expected = whole.model.adapters.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in resumed.model.adapters.state_dict().items())


def test_best_adapter_is_reloaded_at_the_end(tmp_path):
    best_at_end = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = make_trainer(tunesmith.Trainer, tmp_path, CONFIGS["lora"](), learning_rate=1.0, **best_at_end)
    trainer.train()
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    best = min(losses, key=losses.get)
    assert best != max(losses), "a learning rate of 1 must make the last step worse, else this test shows nothing"
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    stored = PeftModel.from_pretrained(tiny.make("llama"), trainer.state.best_model_checkpoint)
    assert all(torch.equal(p, dict(stored.named_parameters())[n]) for n, p in trainer.model.named_parameters())


def test_a_second_adapter_is_saved_and_resumed_too(tmp_path):
    trainer = make_trainer(tunesmith.Trainer, tmp_path, CONFIGS["lora"](), max_steps=2)
    trainer.model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", r=2))
    trainer.train()
    assert (tmp_path / "checkpoint-2" / "other" / "adapter_model.safetensors").is_file()
    again = make_trainer(tunesmith.Trainer, tmp_path, CONFIGS["lora"](), max_steps=4)
    again.model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", r=2))
    again.train(resume_from_checkpoint=True)


def test_resuming_from_a_folder_without_the_adapter_is_an_error(tmp_path):
    trainer = make_trainer(tunesmith.Trainer, tmp_path, CONFIGS["lora"]())
    with pytest.raises(tunesmith.AdapterFileError, match="holds no adapter"):
        trainer.train(resume_from_checkpoint=str(tmp_path))


def test_trainer_works_where_peft_is_not_installed(tmp_path):
    """With the import of `peft` blocked, the plain Trainer still writes adapter-only checkpoints."""
    script = f"""
import sys, importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "peft" else real(name, *rest)
sys.modules["peft"] = None
from pathlib import Path
import transformers
from transformers.utils import is_peft_available
assert not is_peft_available()
from tests.train.test_trainer import CONFIGS, make_trainer
make_trainer(transformers.Trainer, Path({str(tmp_path)!r}), CONFIGS["lora"](), max_steps=2).train()
names = {{path.name for path in Path({str(tmp_path)!r}, "checkpoint-2").iterdir()}}
assert "adapter_model.safetensors" in names and "model.safetensors" not in names, names
print("fine")
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "fine" in done.stdout, done.stderr[-2000:]


class Net(torch.nn.Module):
    """A base that is no model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)

    def forward(self, x, labels=None):
        logits = self.head(torch.tanh(self.inner(x)))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def train_net(folder: Path, steps: int, **arguments) -> PeftModel:
    torch.manual_seed(1)
    handle = get_peft_model(Net(), LoraConfig(r=2, target_modules=["inner"]))
    settings = {"output_dir": str(folder), "max_steps": steps, "save_steps": 2, "report_to": [], "use_cpu": True}
    examples = [{"x": torch.full((8,), i / 8), "labels": torch.tensor(i % 2)} for i in range(8)]
    trainer = tunesmith.Trainer(
        model=handle,
        args=transformers.TrainingArguments(
            **settings, disable_tqdm=True, label_names=["labels"], lr_scheduler_type="constant"
        ),
        train_dataset=examples,
    )
    trainer.train(**arguments)
    return handle


def test_a_checkpoint_of_a_module_of_ones_own_holds_the_adapter_alone_and_resumes(tmp_path):
    whole = train_net(tmp_path / "whole", 4)
    train_net(tmp_path / "cut", 2)
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    assert {p.name for p in checkpoint.iterdir() if "model" in p.name} == {"adapter_model.safetensors"}
    assert (checkpoint / "training_args.bin").is_file()
    resumed = train_net(tmp_path / "resumed", 4, resume_from_checkpoint=str(checkpoint))
    for name, value in whole.adapters.state_dict().items():
        assert torch.equal(resumed.adapters.state_dict()[name], value)
