"""Multitask prompt tuning against the reference library, with each row its task."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import ours_on, output, quiet, read_by_peft, shapes, theirs_on, written_by_peft
from tests.parity.test_files import moved_behind_virtual_tokens, with_labels
from tests.parity.test_generation import NEW, WAYS, both, prompt_of, uneven
from tunesmith import ConfigError, MultitaskPromptTuningConfig, UsageError

TASKS = torch.tensor([2, 0])
NAMES = ["llama", "gpt2", "opt", "bloom", "t5", "mt5", "bert-classifier", "bert-tagger", "llama-classifier"]


def _inputs(name):
    """With labels for an encoder-decoder: given decoder inputs alone, the reference loses them on the way."""
    inputs = with_labels(name) if tiny.task_of(name) == "SEQ_2_SEQ_LM" else tiny.inputs_for(name)
    return {**inputs, "task_ids": TASKS}


@pytest.mark.parametrize("name", NAMES)
def test_files_go_both_ways(name, tmp_path):
    base, task, inputs = tiny.make(name), tiny.task_of(name), _inputs(name)
    ours, theirs = ours_on(base, "multitask", task), theirs_on(base, "multitask", task)
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    ours.save_pretrained(tmp_path / "ours")
    written_by_peft(theirs, tmp_path / "theirs")
    assert shapes(tmp_path / "ours") == shapes(tmp_path / "theirs")
    swapped = {**inputs, "task_ids": TASKS.flip(0)}
    for mine, reference in (
        (ours, read_by_peft(base, tmp_path / "ours")),
        (ts.PeftModel.from_pretrained(base, tmp_path / "theirs").eval(), theirs),
    ):
        torch.testing.assert_close(output(mine, inputs), output(reference, inputs), atol=1e-5, rtol=0)
        assert (output(mine, inputs) - output(mine, swapped)).abs().max() > 1e-4, "the tasks make no difference"


@pytest.mark.parametrize("name", ["bert-answers", "bert-features"])
def test_tasks_to_which_the_reference_cannot_pass_its_tasks_on(name, tmp_path):
    """Question answering and feature extraction: each row is that of its task."""
    base, task = tiny.make(name), tiny.task_of(name)
    ours = ours_on(base, "multitask", task, num_transformer_submodules=None)
    inputs = _inputs(name)
    together = output(ours, inputs)
    for i in range(2):
        torch.testing.assert_close(
            output(ours, {k: v[i : i + 1] for k, v in inputs.items()})[0], together[i], atol=1e-5, rtol=0
        )
    ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="task_ids cannot be None"):
        output(read_by_peft(base, tmp_path), inputs)


def test_names_and_shapes_are_those_of_the_format(tmp_path):
    ours_on(tiny.make("llama"), "multitask", "CAUSAL_LM").save_pretrained(tmp_path)
    assert {key: tuple(t.shape) for key, t in load_file(tmp_path / "adapter_model.safetensors").items()} == {
        "prompt_embeddings": (4, 32),
        "prefix_task_cols": (3, 4, 2),
        "prefix_task_rows": (3, 2, 32),
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_gradient_equals_the_references(name, tmp_path):
    base, task = tiny.make(name), tiny.task_of(name)
    theirs = theirs_on(base, "multitask", task)
    ours = ts.PeftModel.from_pretrained(base, written_by_peft(theirs, tmp_path), is_trainable=True).eval()
    batch = with_labels(name)
    ours(**batch, task_ids=TASKS).loss.backward()
    theirs(**moved_behind_virtual_tokens(batch, 4, task), task_ids=TASKS).loss.backward()
    prompt, reference = ours.tree("default").prompt, theirs.prompt_encoder["default"]
    pairs = {
        "embedding": (prompt.embedding, reference.embedding.weight),
        "cols": (prompt.prefix_task_cols, reference.prefix_task_cols),
        "rows": (prompt.prefix_task_rows, reference.prefix_task_rows),
    }
    for key, (mine, other) in pairs.items():
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
        assert mine.grad.abs().max() > 1e-6
    assert not prompt.prefix_task_cols.grad[1].any(), "a task that no row has learns nothing"


@pytest.mark.each_value_once
@pytest.mark.parametrize("way", ["greedy", "beams", "sampling", "repetition_penalty"])
@pytest.mark.parametrize("name", tiny.GENERATING)
def test_generation_equals_the_references_token_for_token(name, way, tmp_path):
    made = []
    for model in both(name, "multitask", tmp_path):
        torch.manual_seed(3)
        made.append(model.generate(**prompt_of(name), task_ids=TASKS, max_new_tokens=NEW, **WAYS[way]))
    assert made[0].tolist() == made[1].tolist()


def test_an_encoder_decoder_gets_its_prompt_before_the_encoder_in_training_and_generation_alike(tmp_path):
    """By default (two submodules) the reference trains decoder tokens, too, and generates without them."""
    base, inputs = tiny.make("t5"), _inputs("t5")
    ours = ours_on(base, "multitask", "SEQ_2_SEQ_LM", num_transformer_submodules=None)
    assert ours.tree("default").prompt.embedding.shape == (8, 32)
    assert output(ours, inputs).shape[1] == inputs["labels"].shape[1]
    ours.save_pretrained(tmp_path)
    theirs = read_by_peft(base, tmp_path)
    assert output(theirs, inputs).shape[1] == inputs["labels"].shape[1] + 4
    made = [model.generate(**prompt_of("t5"), task_ids=TASKS, max_new_tokens=NEW) for model in (ours, theirs)]
    assert made[0].tolist() == made[1].tolist()


def test_left_padded_batch_generates_each_rows_own_text():
    ours = ours_on(tiny.make("llama"), "multitask", "CAUSAL_LM")
    rows, batch = uneven("left")
    tasks, way = torch.tensor([1, 2, 0]), {"max_new_tokens": NEW, "min_new_tokens": NEW}
    together = ours.generate(**batch, task_ids=tasks, **way)
    for i, row in enumerate(rows):
        alone = ours.generate(input_ids=row, task_ids=tasks[i : i + 1], **way)
        assert together[i, -NEW:].tolist() == alone[0, -NEW:].tolist()


def test_later_steps_of_a_loop_and_disabled_adapters_need_no_tasks():
    base, ids = tiny.make("llama"), prompt_of("llama")["input_ids"]
    ours = ours_on(base, "multitask", "CAUSAL_LM")
    with torch.no_grad():
        whole = ours(input_ids=ids, task_ids=TASKS).logits[:, -1:]
        first = ours(input_ids=ids[:, :-1], task_ids=TASKS, use_cache=True)
        rest = ours(input_ids=ids[:, -1:], past_key_values=first.past_key_values)
        torch.testing.assert_close(rest.logits, whole, atol=1e-5, rtol=0)
        with ours.disable_adapter():
            assert torch.equal(ours(input_ids=ids, task_ids=TASKS).logits, base(input_ids=ids).logits)


def test_gradient_checkpointing_copies_and_bf16():
    batch, found = with_labels("llama"), []
    for checkpointing in (False, True):
        handle = ours_on(tiny.make("llama").double(), "multitask", "CAUSAL_LM").train()
        if checkpointing:
            tiny.enable_recomputing(handle, {"use_reentrant": True})
        handle(**batch, task_ids=TASKS).loss.backward()
        found.append([p.grad for p in handle.adapters.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9)
    handle = ours_on(tiny.make("llama").to(torch.bfloat16), "multitask", "CAUSAL_LM")
    assert output(handle, _inputs("llama")).dtype == torch.bfloat16
    assert torch.equal(output(copy.deepcopy(handle), _inputs("llama")), output(handle, _inputs("llama")))


# --- starting from source tasks -------------------------------------------------------------------------------------


@pytest.mark.each_value_once
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("init", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_values_of_source_tasks_initialize_a_new_adapter_as_in_the_reference(init, suffix, tmp_path):
    import peft

    base = tiny.make("llama")
    ours_on(base, "multitask", "CAUSAL_LM").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    if suffix == "bin":
        torch.save(load_file(path), tmp_path / "values.bin")
        path = tmp_path / "values.bin"
    fields = {
        "task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "num_tasks": 1, "num_ranks": 2, "prompt_tuning_init": init,
        "prompt_tuning_init_state_dict_path": str(path), "prompt_tuning_init_task": 2,
    }  # fmt: skip
    mine = ts.get_peft_model(base, MultitaskPromptTuningConfig(**fields)).tree("default").prompt
    with quiet():
        other = peft.get_peft_model(copy.deepcopy(base), peft.MultitaskPromptTuningConfig(**fields)).prompt_encoder["default"]
    assert torch.equal(mine.embedding, other.embedding.weight)
    same = [torch.equal(getattr(mine, name), getattr(other, name)) for name in ("prefix_task_cols", "prefix_task_rows")]
    assert same == [init != "ONLY_SOURCE_SHARED"] * 2


def _starting_from(path, **fields):
    made = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "num_ranks": 2, "prompt_tuning_init": "EXACT_SOURCE_TASK"}
    return MultitaskPromptTuningConfig(**{**made, "prompt_tuning_init_state_dict_path": str(path), **fields})


def test_files_that_hold_no_such_values_are_refused(tmp_path):
    base = tiny.make("llama")
    ours_on(base, "multitask", "CAUSAL_LM").save_pretrained(tmp_path / "source")
    ours_on(base, "prompt", "CAUSAL_LM").save_pretrained(tmp_path / "prompt")
    torch.save({"prompt_embeddings": TASKS, "code": Code()}, tmp_path / "code.bin")
    source = tmp_path / "source" / "adapter_model.safetensors"
    for config, message in (
        (_starting_from(tmp_path / "gone.safetensors"), "gone.safetensors cannot be read"),
        (_starting_from(tmp_path / "code.bin"), "contains more than tensors"),
        (_starting_from(tmp_path / "prompt" / "adapter_model.safetensors"), 'has no "prefix_task_cols"'),
        (_starting_from(source, prompt_tuning_init_task=3), r"prompt_tuning_init_task=3, but .* holds tasks 0 to 2"),
        (_starting_from(source, num_ranks=5), r'"prefix_task_cols" of the shape \(4, 2\), expected \(4, 5\)'),
        (_starting_from(source, num_virtual_tokens=3), r'"prompt_embeddings" of the shape \(4, 32\), expected \(3, 32\)'),
    ):
        with pytest.raises(ConfigError, match=message):
            ts.get_peft_model(base, config)


class Code:
    """An object, which unpickling would have to make."""


def test_an_adapter_loads_without_its_source_being_there(tmp_path):
    base = tiny.make("llama")
    ours_on(base, "multitask", "CAUSAL_LM").save_pretrained(tmp_path / "source")
    source = tmp_path / "source" / "adapter_model.safetensors"
    handle = ts.get_peft_model(base, _starting_from(source, num_tasks=2)).eval()
    cols = handle.tree("default").prompt.prefix_task_cols
    assert torch.equal(cols[0], cols[1])
    handle.save_pretrained(tmp_path / "made")
    source.unlink()
    again = ts.PeftModel.from_pretrained(base, tmp_path / "made").eval()
    inputs = {**tiny.inputs_for("llama"), "task_ids": [0, 1]}
    assert torch.equal(output(again, inputs), output(handle, inputs))


# --- bad input ------------------------------------------------------------------------------------------------------

BAD = {
    "num_ranks=0 must be a whole number": {"num_ranks": 0},
    "num_tasks=0 must be a whole number": {"num_tasks": 0},
    "prompt_tuning_init_task=-1 must be": {"prompt_tuning_init_task": -1},
    "prompt_tuning_init=EXACT_SOURCE_TASK needs": {"prompt_tuning_init": "EXACT_SOURCE_TASK"},
    "prompt_tuning_init='SAMPLE_VOCAB' must be one of TEXT, RANDOM": {"prompt_tuning_init": "SAMPLE_VOCAB"},
    "prompt_tuning_init=TEXT needs prompt_tuning_init_text": {"prompt_tuning_init": "TEXT"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_values_are_refused(message):
    with pytest.raises(ConfigError, match=message):
        MultitaskPromptTuningConfig(**{"num_virtual_tokens": 4, "task_type": "CAUSAL_LM", **BAD[message]})


def test_rows_without_a_task_or_with_an_unknown_one_are_refused():
    handle, inputs = ours_on(tiny.make("llama"), "multitask", "CAUSAL_LM"), tiny.inputs_for("llama")
    for call in (handle, handle.generate):
        with pytest.raises(UsageError, match="needs task_ids, one per row"):
            call(**inputs)
        for wrong in (3, -1):
            with pytest.raises(UsageError, match="must be numbers from 0 to 2"):
                call(**inputs, task_ids=torch.tensor([0, wrong]))
        with pytest.raises(UsageError, match="3 task_ids for 2 rows"):
            call(**inputs, task_ids=torch.tensor([0, 1, 2]))
