"""The list of known losses, proved by value, by gradient and by reading the forwards; and what must be left to the model."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap

import pytest
import torch
import transformers as tf
from tools import fused_loss_page
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from tests import tiny
from tests.handles import lora
from tests.train import known_models
from tunesmith import PromptTuningConfig, get_peft_model, tested
from tunesmith.model import PeftModelForCausalLM
from tunesmith.train import known_loss, shared_virtual_tokens
from tunesmith.train.fused_loss import FusedLoss


def handle_of(name: str, hostile: bool = False):
    task = "CAUSAL_LM" if name in known_loss.CAUSAL else "SEQ_2_SEQ_LM"
    targets = ["q_proj", "v_proj"] if name == "PhimoeForCausalLM" else "all-linear"  # whose router answers a tuple
    return lora(known_models.make(name, hostile), task_type=task, r=4, target_modules=targets)


def gradient(handle, loss: torch.Tensor) -> torch.Tensor:
    handle.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in handle.adapters.parameters() if p.grad is not None])


def assert_same(handle, batch, **options) -> None:
    own = handle(**batch, **options).loss
    fused = FusedLoss(handle)(batch, items=options.get("num_items_in_batch"))
    assert fused is not None, known_loss.fault(handle, handle.bare_base, handle.effective_frame, batch)
    torch.testing.assert_close(fused, own, rtol=1e-5, atol=0)
    expected = gradient(handle, own)
    found = gradient(handle, fused)
    assert (found - expected).norm() <= 1e-4 * expected.norm() and expected.norm() > 0


@pytest.mark.parametrize("name", sorted(known_loss.PROVED))
def test_value_and_gradient_are_the_models_own(name):
    handle, batch = handle_of(name).eval(), known_models.batch()
    assert_same(handle, batch)
    if name in known_loss.CAUSAL:
        assert_same(handle, batch, num_items_in_batch=torch.tensor(5))


@pytest.mark.parametrize("name", sorted(known_loss.PROVED))
def test_settings_that_change_a_loss_are_noticed(name):
    """Every setting whose name has to do with logits or losses is changed: equal, or left to the model."""
    handle, batch = handle_of(name, hostile=True).eval(), known_models.batch()
    changed = architecture_changes(handle.bare_base.config)
    assert not changed or any(name in names for names in fused_loss_page.CONDITIONS.values())
    if FusedLoss(handle)(batch) is not None:
        assert not changed
        assert_same(handle, batch)
    else:
        assert changed


def architecture_changes(config) -> bool:
    return getattr(config, "final_logit_softcapping", None) is not None or getattr(config, "output_router_logits", False)


def test_the_page_is_current():
    assert fused_loss_page.PAGE.read_text(encoding="utf-8") == fused_loss_page.page(), "run python tools/fused_loss_page.py"


# What the forward of a known class may do from its output head on; `logits` stands for its name of them.
STATEMENTS = [
    r"logits = self\.(lm_head|embed_out)\((hidden_states|sequence_output)"
    r"(\[:, slice_indices, :\])?\)(\.contiguous\(\))?",
    r"(loss|aux_loss) = None",
    r"if self\.config\.final_logit_softcapping is not None:.*tanh.*",
    r"if labels is not None: loss = self\.loss_function\((logits=)?logits, (labels=)?labels, "
    r"(vocab_size=)?self\.(config\.)?vocab_size(, \*\*kwargs|, num_items_in_batch=kwargs\.get\('num_items_in_batch'\))\)",
    r"if labels is not None: loss_fct = CrossEntropyLoss\((ignore_index=-100)?\) labels = labels\.to\(logits\.device\) "
    r"loss = loss_fct\(logits\.view\(-1, [\w.()-]+\), labels\.(view|reshape)\(-1\)\)",
    r"if output_router_logits: .*",
    r"if not return_dict: .*",
    r"return \w+\(loss=loss, (aux_loss=aux_loss, )?logits=logits, .*",
]


@pytest.mark.parametrize("name", sorted(known_loss.PROVED))
def test_a_forward_does_nothing_else_with_its_logits(name):
    function = ast.parse(textwrap.dedent(inspect.getsource(getattr(tf, name).forward))).body[0]
    flat = [re.sub(r"\s+", " ", ast.unparse(statement)).replace("lm_logits", "logits") for statement in function.body]
    start = next(i for i, text in enumerate(flat) if text.startswith("logits = "))
    unknown = [text for text in flat[start:] if not any(re.fullmatch(known, text) for known in STATEMENTS)]
    assert not unknown
    assert not any("logits" in text.replace("logits_to_keep", "").replace("output_router_logits", "") for text in flat[1:start])


@pytest.mark.parametrize("name", sorted(known_loss.CAUSAL))
def test_virtual_tokens_run_once_for_all_rows_with_the_same_loss_and_gradients(name, monkeypatch):
    """7 of them, which is more than the windows of 4 see."""
    monkeypatch.setattr(shared_virtual_tokens, "WORTH", -1000)
    base = known_models.make(name)
    if getattr(base.config, "sliding_window", None) is not None:
        base.config.sliding_window = 4
    torch.manual_seed(1)
    handle = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)).eval()
    batch = known_models.batch()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, -2:] = 0
    batch["labels"][1, -2:] = -100
    assert shared_virtual_tokens.applies(handle, handle.effective_frame, batch)
    assert_same(handle, batch)


# --- what is left to the model --------------------------------------------------------------------------------------


def own_loss(logits, labels, vocab_size, **more):
    return ForCausalLMLoss(logits, labels, vocab_size, **more) + 1e-4 * logits.logsumexp(-1).square().mean()


class OwnForward(tf.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        result = super().forward(*args, **kwargs)
        result.loss = result.loss * 1.001
        return result


class LlamaForCausalLM(tf.LlamaForCausalLM):
    """Remote code keeps the name of the class it starts from."""


class Handle(PeftModelForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class WithLoss(nn.Module):
    """A module of one's own, with a loss of its own."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.lm_head = nn.Linear(4, 4), nn.Linear(4, 9)

    def forward(self, input_ids, labels=None):
        return {"loss": self.lm_head(self.q_proj(torch.ones(1, 4))).sum()}


def llama(**changes):
    return tf.LlamaForCausalLM(tiny._llama_config(**changes))


def replaced_on_the_class(monkeypatch):
    monkeypatch.setattr(tf.LlamaForCausalLM, "loss_function", staticmethod(own_loss))
    return lora(llama())


def forward_wrapped_on_the_class(monkeypatch):
    forward = tf.LlamaForCausalLM.forward
    monkeypatch.setattr(tf.LlamaForCausalLM, "forward", functools.wraps(forward)(lambda *a, **k: forward(*a, **k)))
    return lora(llama())


def cross_entropy_replaced(monkeypatch):
    monkeypatch.setattr("transformers.loss.loss_utils.fixed_cross_entropy", own_loss)
    return lora(llama())


def release_of_tomorrow(monkeypatch):
    monkeypatch.setattr(tested, "installed_fault", lambda: "it is newer than what is tested")
    return lora(llama())


def with_base(change):
    def make(monkeypatch):
        handle = lora(llama())
        change(handle.bare_base)
        return handle

    return make


def with_handle(change):
    def make(monkeypatch):
        handle = lora(llama())
        change(handle)
        return handle

    return make


def mixture(config, **sizes):
    sizes = {**known_models.tiny.SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "output_router_logits": True, **sizes}
    return lambda monkeypatch: lora(tf.AutoModelForCausalLM.from_config(config(**sizes)), task_type="CAUSAL_LM")


def other(config, **sizes):
    sizes = {**known_models.tiny.SIZES, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, **sizes}
    return lambda monkeypatch: lora(tf.AutoModelForCausalLM.from_config(config(**sizes)), task_type="CAUSAL_LM")


LEFT = {
    "loss function of the model": with_base(lambda base: setattr(base, "loss_function", own_loss)),
    "loss function of the class": replaced_on_the_class,
    "another loss_type": with_base(lambda base: setattr(base, "loss_type", "ForMaskedLM")),
    "cross_entropy replaced": cross_entropy_replaced,
    "derived class": lambda monkeypatch: lora(OwnForward(tiny._llama_config())),
    "remote code of that name": lambda monkeypatch: lora(LlamaForCausalLM(tiny._llama_config())),
    "forward of the model": with_base(lambda base: setattr(base, "forward", lambda **inputs: None)),
    "forward wrapped on the class": forward_wrapped_on_the_class,
    "forward of the head": with_base(lambda base: setattr(base.lm_head, "forward", lambda hidden: hidden)),
    "forward of the handle": with_handle(lambda handle: setattr(handle, "forward", lambda **inputs: None)),
    "derived handle": lambda monkeypatch: Handle(llama(), tiny_lora()),
    "hook on the model": with_base(lambda base: base.register_forward_hook(lambda *_: None)),
    "hook on the head": with_base(lambda base: base.lm_head.register_forward_pre_hook(lambda *_: None)),
    "hook on the handle": with_handle(lambda handle: handle.register_forward_hook(lambda *_: None)),
    "hook on the gradients of the head": with_base(lambda base: base.lm_head.register_full_backward_hook(lambda *_: None)),
    "hook set through the handle": with_handle(lambda handle: handle.lm_head.register_forward_hook(lambda *_: None)),
    "loss set through the handle": with_handle(lambda handle: setattr(handle.get_base_model(), "loss_function", own_loss)),
    "trained head": with_base(lambda base: base.lm_head.requires_grad_(True)),
    "head of another size": with_base(lambda base: setattr(base, "lm_head", nn.Linear(32, 100).requires_grad_(False))),
    "adapter on the head": lambda monkeypatch: lora(llama(), target_modules=["lm_head", "q_proj"]),
    "copy of the head": lambda monkeypatch: lora(llama(), modules_to_save=["lm_head"]),
    "untested release": release_of_tomorrow,
    "own module": lambda monkeypatch: lora(WithLoss(), target_modules=["q_proj"]),
    "Mixtral's routers": mixture(tf.MixtralConfig, num_local_experts=4),
    "Qwen 3's routers": mixture(tf.Qwen3MoeConfig, num_experts=4, moe_intermediate_size=32, head_dim=8),
    "Granite": other(tf.GraniteConfig, logits_scaling=1.0),
    "Cohere": other(tf.CohereConfig, logit_scale=1.0, bos_token_id=1, eos_token_id=1),
    "Gemma 2": other(tf.Gemma2Config),
}  # fmt: skip


def tiny_lora():
    from tunesmith import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=4)


@pytest.mark.parametrize("what", LEFT)
def test_left_to_the_model(what, monkeypatch):
    handle = LEFT[what](monkeypatch)
    assert FusedLoss(handle)(tiny_batch()) is None


def tiny_batch() -> dict[str, torch.Tensor]:
    inputs = tiny.inputs_for("llama")
    return {**inputs, "labels": inputs["input_ids"]}


@pytest.mark.parametrize(
    "name", ["shift_labels", "output_router_logits", "logits_to_keep", "ignore_index", "pixel_values", "return_dict"]
)
def test_an_input_that_may_select_another_loss_is_left_to_the_model(name):
    loss = FusedLoss(lora(llama()))
    assert loss({**tiny_batch(), name: torch.ones(2, 7)}) is None
    assert loss(tiny_batch()) is not None


def test_a_hook_of_all_modules_is_left_to_the_model():
    loss = FusedLoss(lora(llama()))
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert loss(tiny_batch()) is None
    assert loss(tiny_batch()) is not None


def test_what_happens_before_the_head_does_not_matter():
    """A site of another handle, hooks on layers and mixed precision leave the loss what it is."""
    base = llama()
    lora(base, target_modules=["lm_head"])
    handle = lora(base)
    base.model.layers[0].register_forward_hook(lambda *_: None)
    assert_same(handle, tiny_batch())


def test_the_reason_is_logged_once(caplog):
    base = llama()
    base.loss_function = own_loss
    loss = FusedLoss(lora(base))
    with caplog.at_level("INFO"):
        loss(tiny_batch()), loss(tiny_batch())
    assert [record.message for record in caplog.records] == [
        "LlamaForCausalLM computes its loss itself: its loss_function is another"
    ]
