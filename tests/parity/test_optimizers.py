"""LoRA+ and LoRA-FA against the reference library and the equations of their papers."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.optimizers import create_lorafa_optimizer as their_lorafa
from peft.optimizers import create_loraplus_optimizer as their_loraplus
from torch import nn

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import ours_on, own_names, read_by_peft
from tests.parity.test_files import with_labels
from tunesmith.checkpoint.names import current_name, named_tensors

GROUPED = {
    "plain": ("llama", {}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "biases": ("opt", {"bias": "all"}),
    "norms and a head": ("llama", {"modules_to_save": ["input_layernorm", "lm_head"]}),
    "dora": ("llama", {"use_dora": True}),
    "a bias on B": ("opt", {"lora_bias": True}),
    "a classifier": ("bert-classifier", {}),
    "tokens": ("llama", {"trainable_token_indices": [3, 7]}),
}


def both(name, folder, **options):
    """The same adapter in both libraries, training, with `{name in files: parameter}` of each."""
    base, task = tiny.make(name), tiny.task_of(name)
    ours = ours_on(base, "lora", task, **options)
    ours.save_pretrained(folder)
    theirs = read_by_peft(base, folder, is_trainable=True)
    mine = {key: tensor for key, _, tensor in named_tensors(ours.adapters.default, ours.peft_config["default"], base)}
    return ours, mine, theirs, {current_name(key): tensor for key, tensor in own_names(theirs).items()}


@pytest.mark.parametrize("case", GROUPED)
def test_loraplus_groups_are_the_references(case, tmp_path):
    name, options = GROUPED[case]
    ours, mine, theirs, reference = both(name, tmp_path, **options)
    fields = {"lr": 1e-3, "loraplus_lr_ratio": 16, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-5}
    groups = ts.create_loraplus_optimizer(ours, torch.optim.AdamW, **fields, eps=1e-7).param_groups
    expected = their_loraplus(theirs, torch.optim.AdamW, **fields, eps=1e-7).param_groups

    def settings(groups, named):
        names = {parameter: key for key, parameter in named.items()}
        return {names[p]: (g["lr"], g["weight_decay"], g["eps"]) for g in groups for p in g["params"]}

    found = settings(groups, mine)
    assert found == settings(expected, reference) and found.keys() == mine.keys()
    assert len({values[0] for values in found.values()}) > 1


def test_loraplus_refuses_what_makes_no_sense():
    handle = ours_on(tiny.make("llama"), "lora", "CAUSAL_LM")
    with pytest.raises(ts.ConfigError, match=r"loraplus_lr_ratio=0.5 must be .* at least 1"):
        ts.create_loraplus_optimizer(handle, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=0.5)
    with pytest.raises(ts.UsageError, match="got LlamaForCausalLM"):
        ts.create_loraplus_optimizer(tiny.make("llama"), torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=2)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}],
    ids=["plain", "rslora", "patterns"],
)
@pytest.mark.parametrize(("decay", "steps"), [(0.0, 3), (0.1, 1)])
def test_lorafa_steps_are_the_references(decay, steps, options, tmp_path, monkeypatch):
    """Without the reference's rounding of corrected gradients to bf16. It decays weights after the step, not before: that

    differs by lr^2 * decay a step. It also adds Adam's eps before the correction of the bias, which tells only for
    gradients near eps; the loss is scaled so that they are far from it.
    """
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    name, lr = "llama", 1e-2
    ours, mine, theirs, reference = both(name, tmp_path, **options)
    before = {key: tensor.detach().clone() for key, tensor in mine.items()}
    optimizers = (
        ts.create_lorafa_optimizer(ours, r=4, lora_alpha=8, lr=lr, weight_decay=decay),
        their_lorafa(theirs, r=4, lora_alpha=8, lr=lr, weight_decay=decay),
    )
    for _ in range(steps):
        for model, optimizer in zip((ours, theirs), optimizers):
            (1e8 * model(**with_labels(name)).loss).backward()
            optimizer.step()
            optimizer.zero_grad()
    for key, tensor in mine.items():
        if "lora_A" in key:
            assert torch.equal(tensor, before[key]) and not tensor.requires_grad
            continue
        assert (tensor - before[key]).abs().max() > 0.9 * lr
        torch.testing.assert_close(tensor, reference.get(key, tensor), atol=1e-5 + lr**2 * decay, rtol=0)
    assert any("lora_B" in key for key in reference)


def test_lorafa_correction_gives_the_step_nearest_to_the_full_gradients():
    """Of all dB, `s dB A` with the corrected one lies nearest to the gradient of W itself (equation 6 of the paper)."""
    base, x = nn.Sequential(nn.Linear(12, 9)), torch.randn(30, 12)
    handle = ts.get_peft_model(base, ts.LoraConfig(r=4, lora_alpha=12, target_modules=["0"], init_lora_weights=False))
    adapter = handle.tree("default").node("0")._adapter
    optimizer = ts.create_lorafa_optimizer(handle, r=4, lora_alpha=12, lr=0.1)
    handle(x).square().sum().backward()
    seen = {}
    step = torch.optim.AdamW.step
    torch.optim.AdamW.step = lambda self: seen.update(corrected=adapter.lora_B.grad.clone())
    gradient = adapter.lora_B.grad.clone()
    try:
        optimizer.step()
    finally:
        torch.optim.AdamW.step = step
    assert torch.equal(adapter.lora_B.grad, gradient), "the gradient is put back"
    y = x @ (base[0].weight + adapter.scale * adapter.lora_B @ adapter.lora_A).T + base[0].bias
    full = 2 * y.T @ x  # gradient of W
    nearest = torch.linalg.lstsq(adapter.scale * adapter.lora_A.T, full.T).solution.T
    torch.testing.assert_close(seen["corrected"], nearest, rtol=1e-3, atol=1e-4 * nearest.abs().max().item())


def test_lorafa_of_convolutions_and_embeddings_learns():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.conv = nn.Embedding(9, 6), nn.Conv1d(6, 6, 1)
            self.image = nn.Conv2d(1, 4, 3)

        def forward(self, ids):
            return self.image(self.words(ids)[:, None]).square().mean()

    handle = ts.get_peft_model(Net(), ts.LoraConfig(r=2, lora_alpha=2, target_modules=["words", "image"]))
    optimizer = ts.create_lorafa_optimizer(handle, r=2, lora_alpha=2, lr=0.05)
    ids, losses = torch.randint(0, 9, (4, 5)), []
    for _ in range(20):
        loss = handle(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert handle.tree("default").node("words")._adapter.lora_A.any()


def test_lorafa_state_is_saved_and_restored():
    ours = ours_on(tiny.make("llama"), "lora", "CAUSAL_LM")
    copied = copy.deepcopy(ours)
    first = ts.create_lorafa_optimizer(ours, r=4, lora_alpha=8, lr=1e-2)
    ours(**with_labels("llama")).loss.backward()
    first.step()
    second = ts.create_lorafa_optimizer(copied, r=4, lora_alpha=8, lr=1e-2)
    second.load_state_dict(first.state_dict())
    assert all(state["step"] == 1 for state in second.state_dict()["state"].values())


def test_lorafa_refuses_what_it_cannot_do():
    handle = ours_on(tiny.make("llama"), "lora", "CAUSAL_LM")
    with pytest.raises(ts.ConfigError, match='r=8, but the adapter "default" has r=4'):
        ts.create_lorafa_optimizer(handle, r=8, lora_alpha=8, lr=1e-3)
    with pytest.raises(ts.UsageError, match="no A to freeze"):
        ts.create_lorafa_optimizer(ts.get_peft_model(tiny.make("llama"), ts.IA3Config()), r=4, lora_alpha=8, lr=1e-3)
    on_parameters = ts.LoraConfig(r=4, target_parameters=["q_proj.weight"])
    with pytest.raises(ts.UsageError, match="LoRA-FA is for modules"):
        ts.create_lorafa_optimizer(ts.get_peft_model(tiny.make("llama"), on_parameters), r=4, lora_alpha=8, lr=1e-3)
