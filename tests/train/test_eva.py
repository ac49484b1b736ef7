"""The adapter that EVA initializes."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import quiet


def batches(name: str = "llama", count: int = 6) -> list[dict]:
    return [tiny.inputs_for(name, rows=4, length=12, seed=i) for i in range(count)]


def eva_handle(base, **options):
    fields = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 4, "init_lora_weights": "eva", **options}
    return ts.get_peft_model(base, ts.LoraConfig(**fields)).eval()


def test_each_A_holds_the_main_directions_of_its_modules_inputs():
    base = tiny.make("llama")
    handle = eva_handle(base, eva_config={"rho": 1.0, "tau": 1.0}, target_modules=["q_proj", "down_proj"])
    collected: dict[str, list] = {}
    hooks = [
        base.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: collected.setdefault(path, []).append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for path, _ in handle.tree("default").items()
    ]
    with torch.no_grad():
        for batch in batches(count=2):
            base(**batch)
    for hook in hooks:
        hook.remove()
    ts.initialize_lora_eva_weights(handle, batches(count=2), show_progress_bar=False)
    for path, adapter in handle.tree("default").items():
        x = torch.cat(collected[path])
        directions = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh
        assert adapter.lora_A.shape == (4, x.shape[1]) and not adapter.lora_B.any()
        # what the 4 rows span holds the first two directions almost whole; later ones are of nearly equal size
        assert (directions[:2] @ adapter.lora_A.T).norm(dim=1).min() > 0.95


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
def test_redistributes_ranks_within_the_budget_and_starts_as_the_base(options, tmp_path):
    base, inputs = tiny.make("llama"), tiny.inputs_for("llama")
    handle = eva_handle(base, target_modules=["q_proj", "v_proj", "down_proj", "o_proj"], **options)
    scale = next(adapter.scale for _, adapter in handle.tree("default").items())
    ts.initialize_lora_eva_weights(handle, batches(), show_progress_bar=False)
    ranks = {path: adapter.lora_A.shape[0] for path, adapter in handle.tree("default").items()}
    assert sum(ranks.values()) == 8 * 4 and len(set(ranks.values())) > 1 and max(ranks.values()) <= 8
    assert all(adapter.scale == pytest.approx(scale) for _, adapter in handle.tree("default").items())
    torch.testing.assert_close(handle(**inputs).logits, base(**inputs).logits, atol=1e-5, rtol=0)
    assert not any(module._forward_pre_hooks for module in base.modules())
    with torch.no_grad():
        for parameter in handle.adapters.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    handle.save_pretrained(tmp_path)
    expected = handle(**inputs).logits
    assert torch.equal(ts.PeftModel.from_pretrained(base, tmp_path).eval()(**inputs).logits, expected)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(**inputs).logits, expected, atol=1e-5, rtol=0)


def test_ranks_and_directions_are_near_the_references():
    """The reference reads on until it has converged, with a randomised decomposition; both see 40 batches here."""
    base = tiny.make("llama")
    fields = {"r": 2, "init_lora_weights": "eva", "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    ours = ts.get_peft_model(base, ts.LoraConfig(**fields, eva_config={"rho": 1.0, "tau": 0.999}))
    with quiet():
        theirs = peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(**fields, eva_config=peft.EvaConfig(rho=1.0, tau=0.999))
        )
        peft.initialize_lora_eva_weights(theirs, batches(count=40), show_progress_bar=False)
    ts.initialize_lora_eva_weights(ours, batches(count=40), show_progress_bar=False)
    for path, adapter in ours.tree("default").items():
        expected = theirs.base_model.model.get_submodule(path).lora_A.default.weight
        assert expected.shape == adapter.lora_A.shape
        assert torch.linalg.svdvals(adapter.lora_A @ expected.T)[0] > 0.9, path


def test_modules_that_explain_nothing_lose_their_adapter():
    base = tiny.make("llama")
    handle = eva_handle(base, r=2, target_modules=["q_proj", "down_proj"])
    paths = sorted(path for path, _ in handle.tree("default").items())
    state = ts.get_eva_state_dict(handle, batches(), show_progress_bar=False)
    state[paths[0]] = state[paths[0]][:0]
    kept = [path for path in paths if len(state[path])]
    ts.initialize_lora_eva_weights(handle, eva_state_dict=state)
    assert sorted(path for path, _ in handle.tree("default").items()) == kept and paths[0] not in kept
    assert handle.peft_config["default"].target_modules == set(kept)


def test_padding_and_tokens_without_a_label_are_ignored():
    base, batch = tiny.make("llama"), tiny.inputs_for("llama", rows=4, length=12)
    batch["attention_mask"][:, :3] = 0
    batch["labels"] = torch.where(torch.arange(12) < 6, -100, batch["input_ids"])
    seen = []

    def note(layer_input, mask, path):
        seen.append((layer_input.shape[:2], None if mask is None else mask.sum().item()))
        return layer_input.reshape(-1, layer_input.shape[-1])

    for masked, count in ((True, 4 * 6), (False, 4 * 9)):
        seen.clear()
        handle = eva_handle(base, eva_config={"use_label_mask": masked})
        ts.get_eva_state_dict(handle, [batch], prepare_layer_inputs_fn=note, show_progress_bar=False)
        assert seen and all(found == ((4, 12), count) for found in seen)


def test_whitening_scales_directions():
    base = tiny.make("llama")
    plain = ts.get_eva_state_dict(eva_handle(base), batches(), show_progress_bar=False)
    white = ts.get_eva_state_dict(eva_handle(base, eva_config={"whiten": True}), batches(), show_progress_bar=False)
    for path, directions in plain.items():
        ratio = white[path].norm(dim=1) / directions.norm(dim=1)
        assert (ratio.diff() > 0).all() and torch.nn.functional.cosine_similarity(white[path], directions).min() > 1 - 1e-5


def test_wrong_uses_say_what_is_wrong():
    base = tiny.make("llama")
    with pytest.raises(ts.UsageError, match="needs a dataloader"):
        ts.initialize_lora_eva_weights(eva_handle(base))
    with pytest.raises(ts.UsageError, match="saw no inputs"):
        ts.initialize_lora_eva_weights(eva_handle(base), [], show_progress_bar=False)
    with pytest.raises(ts.UsageError, match='was not made with LoraConfig\\(init_lora_weights="eva"\\)'):
        ts.initialize_lora_eva_weights(ts.get_peft_model(base, ts.LoraConfig()), batches())
    with pytest.raises(ts.UsageError, match="got LlamaForCausalLM"):
        ts.initialize_lora_eva_weights(base, batches())
    with pytest.raises(ts.UsageError, match="carry no adapter here"):
        ts.initialize_lora_eva_weights(eva_handle(base), eva_state_dict={"model.norm": torch.zeros(1, 2)})
