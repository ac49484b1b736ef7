"""Generation and padding: the reference's results where they are right, each row's own result everywhere."""

from __future__ import annotations

import pytest
import torch

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import ours_on, output, read_by_peft

LENGTHS = (3, 7, 5)  # of the rows of uneven batches
NEW = 6  # tokens made; as a minimum too, so that no row ends early
TELLING_PADDING = [name for name in tiny.GENERATING if name != "mt5"]  # mt5 is t5's code


def both(name, kind, folder):
    """Our handle and the reference's model with the same adapter."""
    base = tiny.make(name)
    ours = ours_on(base, kind, tiny.task_of(name))
    ours.save_pretrained(folder)
    return ours, read_by_peft(base, folder)


def prompt_of(name):
    inputs = tiny.inputs_for(name)
    inputs.pop("decoder_input_ids", None)
    return inputs


def uneven(side: str) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Rows of uneven lengths, alone and as one padded batch."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(2, tiny.VOCAB, (1, length), generator=generator) for length in LENGTHS]
    width = max(LENGTHS)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = real(i, side)
        ids[i, place], mask[i, place] = row[0], 1
    return rows, {"input_ids": ids, "attention_mask": mask}


def real(i: int, side: str, before: int = 0) -> slice:
    """Where row i's own tokens are, behind `before` positions more."""
    width = max(LENGTHS)
    start = before + (width - LENGTHS[i] if side == "left" else 0)
    return slice(start, start + LENGTHS[i])


WAYS = {
    "greedy": {},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "beams": {"num_beams": 3},
    "beams with penalties": {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "length_penalty": 0.7},
    "several beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "sampling several": {"do_sample": True, "num_return_sequences": 2},
    "min_new_tokens": {"min_new_tokens": NEW},
    "without cache": {"use_cache": False},
}


@pytest.mark.each_value_once
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["prompt", "lora"])
@pytest.mark.parametrize("name", tiny.GENERATING)
def test_generation_equals_the_references_token_for_token(name, kind, way, tmp_path):
    ours, theirs = both(name, kind, tmp_path)
    made = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        made.append(model.generate(**prompt_of(name), max_new_tokens=NEW, **WAYS[way]))
    assert made[0].tolist() == made[1].tolist()


@pytest.mark.each_value_once
@pytest.mark.parametrize("kind", ["prompt", "lora"])
@pytest.mark.parametrize("name", tiny.GENERATING)
def test_max_length_counts_no_virtual_tokens(name, kind, tmp_path):
    ours, theirs = both(name, kind, tmp_path)
    inputs = prompt_of(name)
    made = ours.generate(**inputs, max_length=12, min_length=12)
    assert made.shape[1] == 12
    assert made.tolist() == theirs.generate(**inputs, max_length=12, min_length=12).tolist()


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_result_begins_with_the_prompt_and_never_holds_virtual_tokens(name, tmp_path):
    ours = ours_on(tiny.make(name), "prompt", "CAUSAL_LM")
    ids = prompt_of(name)["input_ids"]
    made = ours.generate(input_ids=ids, max_new_tokens=NEW, min_new_tokens=NEW)
    assert made.shape == (2, ids.shape[1] + NEW)
    assert torch.equal(made[:, : ids.shape[1]], ids)


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_repetition_penalty_sees_the_prompts_own_words(name):
    """A huge penalty bans every word of the prompt, which the model itself gets only as embeddings."""
    ours = ours_on(tiny.make(name), "prompt", "CAUSAL_LM")
    ids = prompt_of(name)["input_ids"]
    made = ours.generate(input_ids=ids, max_new_tokens=NEW, repetition_penalty=1e9)
    for row, new in zip(ids.tolist(), made[:, ids.shape[1] :].tolist()):
        assert not set(row) & set(new)


# --- padding --------------------------------------------------------------------------------------------------------


@pytest.mark.each_value_once
@pytest.mark.parametrize("kind", ["prompt", "lora"])
@pytest.mark.parametrize("name", TELLING_PADDING)
def test_left_padded_batch_generates_each_rows_own_text(name, kind):
    """The reference puts virtual tokens before the padding, so its rows depend on their neighbours; ours do not."""
    ours = ours_on(tiny.make(name), kind, tiny.task_of(name))
    rows, batch = uneven("left")
    way = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    together = ours.generate(**batch, **way)
    start = 0 if name == "t5" else max(LENGTHS)
    for i, row in enumerate(rows):
        alone = ours.generate(input_ids=row, attention_mask=torch.ones_like(row), **way)
        assert together[i, start:].tolist() == alone[0, 0 if name == "t5" else row.shape[1] :].tolist()


@pytest.mark.parametrize("name", TELLING_PADDING)
def test_left_padded_beams_are_each_rows_own(name):
    ours = ours_on(tiny.make(name), "prompt", tiny.task_of(name))
    rows, batch = uneven("left")
    way = {"max_new_tokens": NEW, "min_new_tokens": NEW, "num_beams": 3}
    together = ours.generate(**batch, **way)
    start = 0 if name == "t5" else max(LENGTHS)
    for i, row in enumerate(rows):
        alone = ours.generate(input_ids=row, attention_mask=torch.ones_like(row), **way)
        assert together[i, start:].tolist() == alone[0, 0 if name == "t5" else row.shape[1] :].tolist()


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_padding_is_told_from_ids_when_no_mask_is_given(name):
    ours = ours_on(tiny.make(name), "prompt", "CAUSAL_LM")
    _, batch = uneven("left")
    way = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    assert torch.equal(ours.generate(batch["input_ids"], **way), ours.generate(**batch, **way))


def virtual_tokens(kind: str, name: str) -> int:
    return 4 if kind == "prompt" and name != "t5" else 0


@pytest.mark.each_value_once
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["prompt", "lora"])
@pytest.mark.parametrize("name", TELLING_PADDING)
def test_logits_of_real_tokens_do_not_depend_on_padding(name, kind, side):
    ours = ours_on(tiny.make(name), kind, tiny.task_of(name))
    rows, batch = uneven(side)
    more, decoder = {}, name == "t5"
    if decoder:
        more = {"decoder_input_ids": torch.tensor([[0, 5, 9, 11]]).expand(len(rows), -1)}
    elif kind == "lora":  # without virtual tokens positions are the caller's business
        more = {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)} if name in ("llama", "gpt2") else {}
    together = output(ours, {**batch, **more})
    n = virtual_tokens(kind, name)
    for i, row in enumerate(rows):
        alone = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        if decoder:
            own = output(ours, {**alone, "decoder_input_ids": more["decoder_input_ids"][:1]})
            torch.testing.assert_close(together[i], own[0], atol=1e-5, rtol=0)
        else:
            own = output(ours, alone)
            torch.testing.assert_close(together[i, real(i, side, before=n)], own[0, n:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_loss_of_a_batch_does_not_depend_on_padding(name):
    ours = ours_on(tiny.make(name), "prompt", "CAUSAL_LM")
    losses = []
    for side in ("left", "right"):
        _, batch = uneven(side)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        losses.append(ours(**batch, labels=labels).loss)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_unpadded_logits_equal_the_references_with_and_without_mask(name, tmp_path):
    ours, theirs = both(name, "prompt", tmp_path)
    inputs = tiny.inputs_for(name)
    torch.testing.assert_close(output(ours, inputs), output(theirs, inputs), atol=1e-5, rtol=0)
    bare = {"input_ids": inputs["input_ids"]}
    torch.testing.assert_close(output(ours, bare), output(theirs, inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_right_padded_logits_of_real_tokens_equal_the_references(name, tmp_path):
    ours, theirs = both(name, "prompt", tmp_path)
    _, batch = uneven("right")
    mine, reference = output(ours, batch), output(theirs, batch)
    for i, length in enumerate(LENGTHS):
        torch.testing.assert_close(mine[i, : 4 + length], reference[i, : 4 + length], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "side"),
    [("llama-classifier", "left"), ("llama-classifier", "right"), ("bert-classifier", "right")],  # BERT pads at the right
)
@pytest.mark.parametrize("kind", ["prompt", "lora"])
def test_classification_of_a_padded_row_is_that_of_the_row_alone(name, kind, side):
    """The reference's is not, for virtual tokens before Llama.

    Its classifier gets embeddings without ids, takes the last position for the end of every row and so reads padding.
    """
    base = tiny.make(name)
    ours = ours_on(base, kind, "SEQ_CLS")
    rows, batch = uneven(side)
    if kind == "lora" and side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    together = output(ours, batch)
    for i, row in enumerate(rows):
        own = output(ours, {"input_ids": row, "attention_mask": torch.ones_like(row)})
        torch.testing.assert_close(together[i], own[0], atol=1e-5, rtol=0)


def test_the_reference_misreads_right_padded_rows_before_llamas_classifier(tmp_path):
    """Should this fail one day, the reference has been mended and the difference above is none any more."""
    ours, theirs = both("llama-classifier", "prompt", tmp_path)
    rows, batch = uneven("right")
    alone = output(theirs, {"input_ids": rows[0], "attention_mask": torch.ones_like(rows[0])})
    torch.testing.assert_close(output(ours, batch)[:1], alone, atol=1e-5, rtol=0)
    assert (output(theirs, batch)[:1] - alone).abs().max() > 1e-2


# --- decoding by hand -----------------------------------------------------------------------------------------------


def generated(handle, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Text that `generate` makes and the logits of every step, `(steps, rows, words)`."""
    way = {"max_new_tokens": NEW, "min_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True}
    made = handle.generate(**batch, **way)
    return made.sequences, torch.stack(made.logits)


def decoded_by_hand(handle, batch, text, with_mask=True) -> torch.Tensor:
    """Logits of every step of a plain decoding loop that is led along `text`."""
    width = batch["input_ids"].shape[1]
    mask, steps, cache = batch["attention_mask"], [], None
    with torch.no_grad():
        for i in range(NEW):
            step = batch["input_ids"] if i == 0 else text[:, width + i - 1 : width + i]
            given = {"attention_mask": mask} if with_mask else {}
            result = handle(input_ids=step, past_key_values=cache, use_cache=True, **given)
            cache = result.past_key_values
            steps.append(result.logits[:, -1])
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return torch.stack(steps)


@pytest.mark.each_value_once
@pytest.mark.parametrize("with_mask", [True, False], ids=["with mask", "without mask"])
@pytest.mark.parametrize("kind", ["prompt", "lora"])
@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_decoding_by_hand_with_a_cache_equals_generate(name, kind, with_mask):
    """The caller's mask counts real tokens only; virtual ones are in the cache after the first step."""
    ours = ours_on(tiny.make(name), kind, "CAUSAL_LM")
    text, logits = generated(ours, prompt_of(name))
    torch.testing.assert_close(decoded_by_hand(ours, prompt_of(name), text, with_mask), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_decoding_a_left_padded_batch_by_hand_equals_generate(name):
    ours = ours_on(tiny.make(name), "prompt", "CAUSAL_LM")
    _, batch = uneven("left")
    text, logits = generated(ours, batch)
    torch.testing.assert_close(decoded_by_hand(ours, batch, text), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_position_ids_count_the_callers_tokens_in_every_step_of_a_loop(name):
    ours = ours_on(tiny.make(name), "prompt", "CAUSAL_LM")
    ids = prompt_of(name)["input_ids"]
    everything = output(ours, {"input_ids": ids})[:, -2:]
    with torch.no_grad():
        first = ours(input_ids=ids[:, :-2], position_ids=torch.arange(5)[None], use_cache=True)
        rest = ours(
            input_ids=ids[:, -2:],
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(5, 7)[None].expand(2, -1),
            past_key_values=first.past_key_values,
        )
    torch.testing.assert_close(rest.logits, everything, atol=1e-5, rtol=0)


def test_first_step_of_a_loop_equals_the_references(tmp_path):
    ours, theirs = both("llama", "prompt", tmp_path)
    ids = prompt_of("llama")["input_ids"]
    with torch.no_grad():
        steps = [m(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).logits[:, -1] for m in (ours, theirs)]
    torch.testing.assert_close(steps[0], steps[1], atol=1e-5, rtol=0)


def test_prompt_as_long_as_max_length_is_an_error_that_says_so():
    ours = ours_on(tiny.make("llama"), "prompt", "CAUSAL_LM")
    with pytest.raises(ValueError, match=r"is 7, but .max_length. is set to 7"):  # the base's own words
        ours.generate(**prompt_of("llama"), max_length=7)
    with pytest.raises(ts.UsageError, match=r"7 tokens, which reaches.*increase max_length"):
        ours.generate(**prompt_of("llama"), max_length=7, cache_implementation="static")


def test_input_that_leaves_no_positions_for_virtual_tokens_is_an_error_that_says_so():
    ours = ours_on(tiny.make("gpt2"), "prompt", "CAUSAL_LM")
    ids = torch.full((1, 62), 5)
    with pytest.raises(ts.UsageError, match=r"66 positions, but the base has 64; truncate the input to 60 tokens"):
        ours(input_ids=ids)
