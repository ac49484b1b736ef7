"""transformers' plain Trainer and tunesmith.Trainer on handles: checkpoints, evaluation, resuming, the best adapter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers.trainer_pt_utils import LabelSmoother

import tunesmith
from tests import tiny
from tests.handles import lora
from tunesmith import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tunesmith.data.text import PadRight
from tunesmith.train.fused_loss import HeadLoss
from tunesmith.train.trainer import AdapterTrainerMixin

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


@pytest.mark.parametrize("kind", [transformers.Trainer, tunesmith.Trainer])
@pytest.mark.parametrize("config", CONFIGS)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(config, kind, tmp_path):
    """(The plain one knows handles by `isinstance`, where peft is installed.)"""
    whole = make_trainer(kind, tmp_path / "whole", CONFIGS[config]())
    whole.train()
    make_trainer(kind, tmp_path / "cut", CONFIGS[config]()).train()
    torch.manual_seed(99)  # the resumed run starts from other values, all of which must come from the checkpoint
    resumed = make_trainer(kind, tmp_path / "cut", CONFIGS[config]())
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    expected = whole.model.adapters.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in resumed.model.adapters.state_dict().items())


@pytest.mark.parametrize("kind", [transformers.Trainer, tunesmith.Trainer])
def test_best_adapter_is_reloaded_at_the_end(kind, tmp_path):
    best_at_end = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = make_trainer(kind, tmp_path, CONFIGS["lora"](), learning_rate=1.0, **best_at_end)
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


class Net(torch.nn.Module):
    """No PreTrainedModel, no configuration."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)

    def forward(self, x, labels=None):
        logits = self.b(torch.tanh(self.a(x)))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("kind", [transformers.Trainer, tunesmith.Trainer])
def test_checkpoints_of_ones_own_module_hold_the_adapter_alone_and_are_resumed(kind, tmp_path):
    data = [{"x": torch.randn(8), "labels": torch.tensor(i % 2)} for i in range(8)]

    def trainer(steps):
        settings = {"use_cpu": True, "report_to": [], "save_steps": 2, "disable_tqdm": True, "label_names": ["labels"]}
        arguments = transformers.TrainingArguments(str(tmp_path), max_steps=steps, **settings)
        return kind(model=lora(Net(), target_modules=["a"]), args=arguments, train_dataset=data)

    trainer(2).train()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    trainer(4).train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-4" / "adapter_config.json").is_file()


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


class Own(torch.nn.Module):
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
    handle = get_peft_model(Own(), LoraConfig(r=2, target_modules=["inner"]))
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


# --- the loss is the one of the plain Trainer -----------------------------------------------------------------------------


def losses(make_handle, inputs, classes=(transformers.Trainer, tunesmith.Trainer), items=None, **arguments):
    """`[(loss, gradient)]` of one batch, by each Trainer class."""
    found = []
    for trainer_class in classes:
        handle = make_handle().train()
        settings = transformers.TrainingArguments(output_dir="unused", use_cpu=True, report_to=[], **arguments)
        trainer = trainer_class(model=handle, args=settings, train_dataset=[], data_collator=PadRight(0))
        loss = trainer.compute_loss(handle, dict(inputs), num_items_in_batch=items)
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in handle.adapters.parameters()])))
    return found


def assert_equal_losses(found, rtol=1e-5):
    (expected, gradient), *others = found
    for loss, other in others:
        torch.testing.assert_close(loss, expected, rtol=rtol, atol=0)
        assert (other - gradient).norm() <= 10 * rtol * gradient.norm()


def labelled(name: str = "llama") -> dict[str, torch.Tensor]:
    inputs = tiny.inputs_for(name, rows=3, length=12)
    return {**inputs, "labels": inputs["input_ids"].clone()}


def of_experts(kind, dtype, **sizes):
    """A handle whose routers' loss is added with the coefficient of the published models."""

    def make():
        torch.manual_seed(0)
        shape = {**tiny.SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "output_router_logits": True, **sizes}
        base = transformers.AutoModelForCausalLM.from_config(kind(**shape)).to(dtype)
        return lora(base, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind, sizes",
    [
        (transformers.MixtralConfig, {"num_local_experts": 4}),
        (transformers.Qwen2MoeConfig, {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}),
        (transformers.GraniteMoeConfig, {"num_local_experts": 4, "logits_scaling": 8.0}),
    ],
)
def test_the_loss_of_routers_is_kept(kind, sizes, dtype):
    make = of_experts(kind, dtype, router_aux_loss_coef=0.001, **sizes)
    assert_equal_losses(losses(make, labelled()))
    without = make()
    without.bare_base.config.output_router_logits = False
    assert without(**labelled()).loss != make()(**labelled()).loss


@pytest.mark.parametrize(
    "arguments", [{}, {"label_smoothing_factor": 0.1}, {"average_tokens_across_devices": False}, {"bf16": True}]
)
def test_the_fused_loss_is_the_plain_trainers(arguments, monkeypatch):
    taken, fused = [], HeadLoss.__call__
    monkeypatch.setattr(HeadLoss, "__call__", lambda *given: taken.append(1) or fused(*given))
    assert_equal_losses(
        losses(lambda: lora(tiny.make("llama")), labelled(), **arguments), 2e-2 if "bf16" in arguments else 1e-5
    )
    assert taken, "the loss was left to the model"


def test_items_of_the_whole_step_divide_the_loss():
    items = torch.tensor(70)
    assert_equal_losses(losses(lambda: lora(tiny.make("llama")), labelled(), items=items))


class WithPenalty(transformers.Trainer):
    """Another library's Trainer, with a loss of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch) * 3


class OverIt(AdapterTrainerMixin, WithPenalty):
    pass


class OwnSmoother(LabelSmoother):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) + 1


class SmoothsPlainly(transformers.Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.label_smoother = OwnSmoother(epsilon=0.2)


class Smooths(AdapterTrainerMixin, SmoothsPlainly):
    pass


@pytest.mark.parametrize("classes", [(WithPenalty, OverIt), (SmoothsPlainly, Smooths)])
def test_a_trainer_with_a_loss_of_its_own_keeps_it(classes):
    (expected, _), (found, _) = losses(lambda: lora(tiny.make("llama")), labelled(), classes)
    assert torch.equal(found, expected)


def test_a_loss_function_of_the_trainer_is_called():
    handle = lora(tiny.make("llama")).train()
    settings = transformers.TrainingArguments(output_dir="unused", use_cpu=True, report_to=[])
    mine = lambda outputs, labels, num_items_in_batch=None: outputs.logits.square().mean()  # noqa: E731
    trainer = tunesmith.Trainer(model=handle, args=settings, train_dataset=[], compute_loss_func=mine)
    batch = labelled()
    torch.testing.assert_close(trainer.compute_loss(handle, dict(batch)), handle(**batch).logits.square().mean())
