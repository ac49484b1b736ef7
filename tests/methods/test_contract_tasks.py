"""Every method on every kind of model and task, with the targets it takes by itself."""

from __future__ import annotations

import copy

import pytest
import torch

from tests import tiny
from tunesmith import PeftModel, TargetError, get_peft_model
from tunesmith.registry import all_methods

METHODS = {name: method.config for name, method in all_methods().items()}
FIELDS = {
    "ADALORA": {"total_step": 20, "init_r": 4, "target_r": 2},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2},
    "BOFT": {"boft_block_size": 4},
    "BOTTLENECK": {"bottleneck_size": 4, "non_linearity": "gelu"},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 2, "num_ranks": 2},
    "OFT": {"oft_block_size": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "TRAINABLE_TOKENS": {"token_indices": [3, 5]},
    "VERA": {"r": 8},
}
# What a method refuses, in words of its error; everything else must work.
BERTS = [name for name in tiny.MODELS if name.startswith("bert")]
REFUSED = (
    {("ADAPTION_PROMPT", "opt"): "not an attention module that LLaMA-Adapter supports"}
    | {("ADAPTION_PROMPT", name): 'no module matches "self_attn"' for name in ("bloom", "t5", "mt5", *BERTS)}
    | {("BITFIT", name): "BITFIT finds nothing to train" for name in ("llama", "t5", "mt5", "llama-classifier")}
)


def config_for(method: str, task: str):
    return METHODS[method](task_type=task, **FIELDS.get(method, {}))


def inputs_for(method: str, name: str) -> dict[str, torch.Tensor]:
    inputs = tiny.inputs_for(name)
    inputs["input_ids"][:, 1:3] = torch.tensor([3, 5])  # the tokens that TRAINABLE_TOKENS trains
    return inputs | ({"task_ids": torch.tensor([0, 1])} if method.startswith("MULTITASK") else {})


def loss_of(handle: PeftModel, name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The task's own loss; for features, a sum of squares."""
    task, ids = tiny.task_of(name), inputs["input_ids"]
    labels = {
        "CAUSAL_LM": {"labels": ids},
        "SEQ_2_SEQ_LM": {"labels": inputs.get("decoder_input_ids")},
        "SEQ_CLS": {"labels": torch.tensor([0, 2])},
        "TOKEN_CLS": {"labels": ids % 3},
        "QUESTION_ANS": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
        "FEATURE_EXTRACTION": {},
    }[task]
    result = handle(**inputs, **labels)
    return result.last_hidden_state.square().mean() if task == "FEATURE_EXTRACTION" else result.loss


def handle_on(method: str, name: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A handle with random, non-trivial adapter values."""
    base = tiny.make(name).to(dtype)
    handle = get_peft_model(base, config_for(method, tiny.task_of(name)))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in handle.adapters.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return handle.eval()


PAIRS = [(method, name) for method in METHODS for name in tiny.MODELS]
each = pytest.mark.parametrize(("method", "name"), [pair for pair in PAIRS if pair not in REFUSED])


@pytest.mark.parametrize(("method", "name"), REFUSED)
def test_what_does_not_fit_is_refused_by_name_and_leaves_the_base_alone(method, name):
    base = tiny.make(name)
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(TargetError, match=REFUSED[method, name]):
        get_peft_model(base, config_for(method, tiny.task_of(name)))
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.each_value_once
@each
def test_acts_and_can_be_switched_off_saved_and_loaded_exactly(method, name, tmp_path):
    handle, inputs = handle_on(method, name), inputs_for(method, name)
    plain_inputs = {key: value for key, value in inputs.items() if key != "task_ids"}
    with torch.no_grad():
        plain = tiny.main_output(tiny.make(name)(**plain_inputs))
        adapted = tiny.main_output(handle(**inputs))
        assert (adapted[:, -plain.shape[1] :] - plain).abs().max() > 1e-4
        with handle.disable_adapter():
            assert torch.equal(tiny.main_output(handle(**plain_inputs)), plain)
        handle.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny.make(name), tmp_path).eval()
        assert torch.equal(tiny.main_output(again(**inputs)), adapted)


@pytest.mark.each_value_once
@each
def test_all_of_it_trains_and_nothing_of_the_base(method, name):
    handle, inputs = handle_on(method, name), inputs_for(method, name)
    loss_of(handle, name, inputs).backward()
    assert all(p.grad is None for p in handle.bare_base.parameters())
    silent = [n for n, p in handle.adapters.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # Parts without influence on these losses: the features' pooler; whatever moves all keys alike (softmax does not see a
    # constant), be it a key's bias or the head of answer spans; rows of an embedding whose tokens do not occur.
    unread = ("pooler", "key._biases", "k_proj._biases", "query_key_value._biases", "qa_outputs", "embedding_A")
    assert not [n for n in silent if not any(part in n for part in unread)], silent


@pytest.mark.each_value_once
@pytest.mark.parametrize("reentrant", [True, False])
@each
def test_gradient_checkpointing_gives_the_same_gradients(method, name, reentrant):
    handle, inputs = handle_on(method, name, torch.float64), inputs_for(method, name)
    handle.train()

    def gradients() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)  # the bases drop out, and recomputing draws the same
        handle.zero_grad()
        loss_of(handle, name, inputs).backward()
        return {n: p.grad for n, p in handle.adapters.named_parameters() if p.grad is not None}

    expected = gradients()
    handle.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients()
    assert found.keys() == expected.keys()
    for n, gradient in found.items():
        torch.testing.assert_close(gradient, expected[n], rtol=1e-5, atol=1e-9, msg=n)
