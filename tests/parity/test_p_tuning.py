"""P-tuning against the reference library, and its encoder, which the reference forgets when it saves."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import transformers

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import agree, ours_on, output, read_by_peft, tensors, theirs_on, written_by_peft
from tests.parity.test_files import moved_behind_virtual_tokens, with_labels
from tests.parity.test_generation import NEW, WAYS, prompt_of
from tunesmith import ConfigError, PromptEncoderConfig
from tunesmith.train.trainer import Trainer, load_all

OPTIONS = {
    "mlp": {},
    "lstm": {"encoder_reparameterization_type": "LSTM"},
    "deep lstm": {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3, "encoder_dropout": 0.3},
    "shallow lstm": {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1},
    "as wide as the base": {"encoder_hidden_size": None},
}
ENCODER = "adapter_encoder.safetensors"


@pytest.mark.parametrize("name", tiny.MODELS)
def test_files_of_every_task_go_both_ways(name, tmp_path):
    agree(tiny.make(name), "p-tuning", tiny.task_of(name), tiny.inputs_for(name), tmp_path)


@pytest.mark.parametrize("option", OPTIONS)
def test_files_of_every_option_go_both_ways(option, tmp_path):
    agree(tiny.make("llama"), "p-tuning", "CAUSAL_LM", tiny.inputs_for("llama"), tmp_path, **OPTIONS[option])


@pytest.mark.each_value_once
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert-tagger", "bert-answers"])
def test_every_gradient_equals_the_references(name, option):
    task, base = tiny.task_of(name), tiny.make(name)
    ours, theirs = (make(base, "p-tuning", task, **OPTIONS[option]) for make in (ours_on, theirs_on))
    reference = dict(theirs.prompt_encoder["default"].named_parameters())
    mine = dict(ours.tree("default").prompt.encoder.named_parameters())
    assert {key: p.shape for key, p in mine.items()} == {key: p.shape for key, p in reference.items()}
    with torch.no_grad():
        for key, parameter in mine.items():
            parameter.copy_(reference[key])
    for path, head in ours.tree("default").items():
        head.module.load_state_dict(theirs.base_model.get_submodule(path).modules_to_save["default"].state_dict())
    batch = with_labels(name)
    ours(**batch).loss.backward()
    theirs(**moved_behind_virtual_tokens(batch, 4, task)).loss.backward()
    for key, parameter in mine.items():
        torch.testing.assert_close(parameter.grad, reference[key].grad, atol=1e-5, rtol=0, msg=lambda text, key=key: key + text)
    assert all(parameter.grad.abs().max() > 0 for parameter in mine.values())


@pytest.mark.each_value_once
@pytest.mark.parametrize("way", ["greedy", "beams", "sampling", "repetition_penalty"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generation_equals_the_references_token_for_token(name, way, tmp_path):
    base = tiny.make(name)
    ours = ours_on(base, "p-tuning", tiny.task_of(name))
    ours.save_pretrained(tmp_path)
    made = []
    for model in (ours, read_by_peft(base, tmp_path)):
        torch.manual_seed(3)
        made.append(model.generate(**prompt_of(name), max_new_tokens=NEW, **WAYS[way]))
    assert made[0].tolist() == made[1].tolist()


# --- the encoder's own file -----------------------------------------------------------------------------------------


def _step(handle, optimizer) -> None:
    inputs = tiny.inputs_for("llama")
    handle(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _values(handle) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in handle.adapters.named_parameters()}


@pytest.mark.parametrize("option", ["mlp", "lstm"])
def test_training_goes_on_exactly_where_it_was_saved(option, tmp_path):
    handle = ours_on(tiny.make("llama"), "p-tuning", "CAUSAL_LM", **OPTIONS[option]).train()
    optimizer = torch.optim.SGD(handle.adapters.parameters(), lr=0.1)
    _step(handle, optimizer)
    handle.save_pretrained(tmp_path)
    again = ts.PeftModel.from_pretrained(tiny.make("llama"), tmp_path, is_trainable=True).train()
    assert _values(again).keys() == _values(handle).keys()
    _step(handle, optimizer)
    _step(again, torch.optim.SGD(again.adapters.parameters(), lr=0.1))
    for name, value in _values(handle).items():
        assert torch.equal(_values(again)[name], value), name


def test_the_trainer_resumes_to_the_values_of_an_uninterrupted_run(tmp_path):
    def trained(folder, steps, resume=None):
        handle = ours_on(tiny.make("llama"), "p-tuning", "CAUSAL_LM")
        rows = [{"input_ids": ids, "labels": ids} for ids in tiny.inputs_for("llama", rows=8)["input_ids"]]
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=4, learning_rate=1e-2, per_device_train_batch_size=2, report_to=[], save_steps=steps,
            use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", seed=5,
        )  # fmt: skip
        Trainer(handle, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        return handle

    whole = trained(tmp_path / "whole", 2)
    assert (tmp_path / "whole" / "checkpoint-2" / ENCODER).is_file()
    resumed = trained(tmp_path / "resumed", 4, resume=str(tmp_path / "whole" / "checkpoint-2"))
    start = _values(ours_on(tiny.make("llama"), "p-tuning", "CAUSAL_LM"))
    for name, value in _values(whole).items():
        assert torch.equal(_values(resumed)[name], value), name
        assert not torch.equal(start[name], value), name


def test_loading_for_inference_builds_no_encoder_and_computes_the_same(tmp_path):
    base, inputs = tiny.make("llama"), tiny.inputs_for("llama")
    handle = ours_on(base, "p-tuning", "CAUSAL_LM")
    handle.save_pretrained(tmp_path)
    loaded = ts.PeftModel.from_pretrained(base, tmp_path).eval()
    assert [name for name, _ in loaded.adapters.named_parameters()] == ["default._prompt.embedding"]
    assert loaded.get_nb_trainable_parameters()[0] == 0
    torch.testing.assert_close(output(loaded, inputs), output(handle, inputs), atol=1e-6, rtol=0)
    loaded.save_pretrained(tmp_path)
    assert not (tmp_path / ENCODER).exists(), "the encoder left over would be another adapter's one day"
    assert torch.equal(output(ts.PeftModel.from_pretrained(base, tmp_path).eval(), inputs), output(loaded, inputs))


def test_without_the_encoders_file_the_tokens_themselves_go_on_training(tmp_path, caplog):
    base = tiny.make("llama")
    theirs = theirs_on(base, "p-tuning", "CAUSAL_LM")
    written_by_peft(theirs, tmp_path)
    with caplog.at_level(logging.WARNING):
        loaded = ts.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    assert "without the encoder" in caplog.text
    before = _values(loaded)
    _step(loaded, torch.optim.SGD(loaded.adapters.parameters(), lr=0.1))
    assert list(before) == ["default._prompt.embedding"]
    assert not torch.equal(before["default._prompt.embedding"], _values(loaded)["default._prompt.embedding"])


def test_an_encoder_left_over_from_another_adapter_is_refused(tmp_path):
    base = tiny.make("llama")
    ours_on(base, "p-tuning", "CAUSAL_LM").save_pretrained(tmp_path)
    written_by_peft(theirs_on(tiny.make("llama", 3), "p-tuning", "CAUSAL_LM"), tmp_path)
    with pytest.raises(ts.AdapterFileError, match="does not compute the virtual tokens beside it"):
        ts.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    ts.PeftModel.from_pretrained(base, tmp_path)


def test_a_damaged_encoder_is_refused_and_nothing_is_loaded(tmp_path):
    handle = ours_on(tiny.make("llama"), "p-tuning", "CAUSAL_LM")
    handle.save_pretrained(tmp_path)
    before = _values(handle)
    ours_on(tiny.make("llama"), "p-tuning", "CAUSAL_LM", encoder_hidden_size=7).save_pretrained(tmp_path / "other")
    (tmp_path / ENCODER).write_bytes((tmp_path / "other" / ENCODER).read_bytes())
    with pytest.raises(ts.AdapterFileError, match=r'"mlp_head.0.weight" has the shape \(7, 32\)'):
        load_all(handle, str(tmp_path))
    assert all(torch.equal(value, _values(handle)[name]) for name, value in before.items())


def test_values_of_an_adapter_in_training_cannot_be_replaced_by_materialized_ones(tmp_path):
    handle = ours_on(tiny.make("llama"), "p-tuning", "CAUSAL_LM")
    handle.save_pretrained(tmp_path)
    (tmp_path / ENCODER).unlink()
    with pytest.raises(ts.AdapterFileError, match=r"adapter_encoder.safetensors is missing"):
        load_all(handle, str(tmp_path))


def test_saved_tokens_are_those_of_evaluation_whatever_the_mode(tmp_path):
    """The reference saves what the encoder computes in the mode it is in, so with dropout other tokens each time."""
    handle = ours_on(tiny.make("llama"), "p-tuning", "CAUSAL_LM", **OPTIONS["deep lstm"])
    handle.save_pretrained(tmp_path / "eval")
    handle.train().save_pretrained(tmp_path / "train")
    saved = [tensors(tmp_path / mode)["prompt_embeddings"] for mode in ("eval", "train")]
    assert torch.equal(*saved) and handle.tree("default").prompt.encoder.training


def test_copies_and_bf16_bases(tmp_path):
    handle = ours_on(tiny.make("llama").to(torch.bfloat16), "p-tuning", "CAUSAL_LM")
    inputs = tiny.inputs_for("llama")
    assert all(p.dtype == torch.float32 for p in handle.adapters.parameters())
    expected = output(handle, inputs)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(output(copy.deepcopy(handle), inputs), expected)


BAD = {
    "encoder_reparameterization_type='GRU' must be one of MLP, LSTM": {"encoder_reparameterization_type": "GRU"},
    "encoder_hidden_size=0 must be a whole number": {"encoder_hidden_size": 0},
    "encoder_num_layers=0 must be a whole number": {"encoder_num_layers": 0},
    "encoder_dropout=1.0 must be at least 0": {"encoder_dropout": 1.0},
    "num_virtual_tokens=0": {"num_virtual_tokens": 0},
    'no field "encoder_hidden"': {"encoder_hidden": 3},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_values_are_refused(message):
    with pytest.raises(ConfigError, match=message):
        PromptEncoderConfig(**{"num_virtual_tokens": 4, "task_type": "CAUSAL_LM", **BAD[message]})
