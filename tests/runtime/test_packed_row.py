"""Packed rows: for every architecture and adapter offered, a text among others is the text alone."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers as tf

import tunesmith
from tests import handles, tiny
from tests.methods.test_contract import METHODS, make_config
from tunesmith import (
    AdaptionPromptConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    UsageError,
    get_peft_model,
)
from tunesmith.data.packing import PackedCollator
from tunesmith.data.text import PadRight
from tunesmith.handle.packing import can_pack, packing_fault
from tunesmith.runtime.packed_attention import ATTENTION
from tunesmith.runtime.packed_row import PROVED
from tunesmith.runtime.site import site_of
from tunesmith.train import shared_virtual_tokens
from tunesmith.train.fused_loss import FusedLoss

# Before transformers 5.13 Nemotron's attention is a class of its own; it is refused then (REFUSED).
OLD = tuple(map(int, tf.__version__.split(".")[:2])) < (5, 13)
KINDS = sorted(PROVED - {"nemotron"} if OLD else PROVED)

LENGTHS = (5, 9, 1, 9, 3)
WINDOW = 4  # shorter than the longest text, so a window that is not kept shows

SIZES = {
    **tiny.SIZES, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
GPT_SIZES = {
    "vocab_size": tiny.VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
WINDOWED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
SPECIAL = {
    "cohere2": WINDOWED,
    "exaone4": WINDOWED,
    "gemma2": {**WINDOWED, "attn_implementation": "eager", "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**WINDOWED, "query_pre_attn_scalar": 8},
    "gpt2": GPT_SIZES,
    "gpt_bigcode": GPT_SIZES,
    "mistral": {"sliding_window": WINDOW},
    "gpt_neox": {"num_key_value_heads": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "num_key_value_heads": 4},  # their tests give 2, which they do not read
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {**WINDOWED, "use_sliding_window": True},
    "qwen3": {**WINDOWED, "use_sliding_window": True},
    "smollm3": {**WINDOWED, "use_sliding_window": True, "no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": WINDOW},
}


def lora_config() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules="all-linear")


def base_of(kind: str, **kwargs) -> torch.nn.Module:
    """A tiny model of the architecture, in which every text matters: no zero weights, no dropout."""
    sizes = {} if kind.startswith("gpt_big") or kind == "gpt2" else SIZES
    config = tf.AutoConfig.for_model(kind, **{**sizes, **SPECIAL.get(kind, {}), **kwargs})
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def handle_of(kind: str, config=None, **kwargs):
    torch.manual_seed(1)
    return get_peft_model(base_of(kind, **kwargs), config or lora_config()).eval()


def examples(lengths=LENGTHS, seed: int = 2) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(2, tiny.VOCAB, (n,), generator=generator).tolist()} for n in lengths]


def gradients(handle, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    handle.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in handle.named_parameters() if p.grad is not None}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = max(expected.abs().max().item(), 1.0)
    assert (found - expected).abs().max().item() <= 2e-5 * scale, (found - expected).abs().max().item() / scale


def check_texts_are_alone(handle, virtual: int = 0, **of_texts: torch.Tensor) -> None:
    """Logits, loss and gradients of a pack are those of its texts, each run by itself (and with its own `of_texts`)."""
    texts = examples()
    batch = PackedCollator(first_tokens=virtual > 0)(texts)
    result = handle(**batch, **of_texts)
    packed_gradients = gradients(handle, result.loss)

    summed, live = 0.0, 0
    for i, (text, logits) in enumerate(zip(texts, result.logits.split([virtual + n for n in LENGTHS], dim=1))):
        ids = torch.tensor([text["input_ids"]])
        alone = handle(input_ids=ids, **{name: values[i : i + 1] for name, values in of_texts.items()}).logits
        assert_close(logits, alone)
        first = 0 if virtual else 1  # of the tokens that are predicted
        predicted = alone[0, max(virtual - 1, 0) : -1]
        summed = summed + torch.nn.functional.cross_entropy(predicted, ids[0, first:], reduction="sum")
        live += ids.shape[1] - first
    assert_close(result.loss, summed / live)
    alone_gradients = gradients(handle, summed / live)
    assert packed_gradients.keys() == alone_gradients.keys() and packed_gradients
    for name, gradient in packed_gradients.items():
        assert_close(gradient, alone_gradients[name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_among_others_is_the_text_alone(kind):
    check_texts_are_alone(handle_of(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_sees_another_text(kind):
    """Any token of one text is changed: not one bit of another text's logits changes, and some bit of its own does."""
    handle = handle_of(kind)
    batch = PackedCollator()(examples((4, 6, 3)))
    before = handle(**batch).logits.split((4, 6, 3), dim=1)
    for place, changed in [(0, 0), (3, 0), (4, 1), (9, 1), (10, 2), (12, 2)]:
        ids = batch["input_ids"].clone()
        ids[0, place] = (ids[0, place] - 2 + 1) % (tiny.VOCAB - 2) + 2
        after = handle(**{**batch, "input_ids": ids}).logits.split((4, 6, 3), dim=1)
        assert [torch.equal(old, new) for old, new in zip(before, after)] == [text != changed for text in range(3)]


# Module methods, and LLaMA-Adapter, whose trained tokens stand beside each attention's own.
OF_MODULES = [*METHODS, "ADAPTION_PROMPT"]


@pytest.mark.parametrize("method", [name for name in OF_MODULES if name != "BITFIT"])
def test_every_method_of_modules_acts_on_texts_as_on_rows(method):
    if method == "ADAPTION_PROMPT":
        handle = handle_of("llama", AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2))
    else:
        handle = get_peft_model(base_of("llama"), make_config(method, "linear")).eval()
    with torch.no_grad():
        for parameter in handle.adapters.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    check_texts_are_alone(handle)


def test_biases_act_on_texts_as_on_rows():
    check_texts_are_alone(handle_of("gpt2", make_config("BITFIT", "conv1d")))


VIRTUAL = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "P-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=7, encoder_hidden_size=16),
    "multitask": MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=4, num_ranks=2),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "projected prefix": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=7, prefix_projection=True, encoder_hidden_size=16
    ),
}


def virtual_handle(kind: str, method: str):
    handle = handle_of(kind, copy.deepcopy(VIRTUAL[method]))
    with torch.no_grad():
        for parameter in handle.adapters.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return handle


@pytest.mark.each_value_once
@pytest.mark.parametrize("method", ["prompt tuning", "prefix"])
@pytest.mark.parametrize("kind", KINDS)
def test_virtual_tokens_stand_before_each_text(kind, method):
    handle = virtual_handle(kind, method)
    check_texts_are_alone(handle, 0 if method == "prefix" else 3)


@pytest.mark.each_value_once
@pytest.mark.parametrize("method", ["P-tuning", "multitask", "projected prefix"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_every_kind_of_virtual_tokens_stands_before_each_text(kind, method):
    handle = virtual_handle(kind, method)
    tasks = {"task_ids": torch.tensor([3, 0, 1, 1, 2])} if method == "multitask" else {}
    check_texts_are_alone(handle, {"P-tuning": 7, "multitask": 3}.get(method, 0), **tasks)


def test_virtual_tokens_stand_before_texts_that_are_given_as_embeddings_and_without_positions():
    handle, batch = virtual_handle("llama", "prompt tuning"), PackedCollator(first_tokens=True)(examples())
    expected = handle(**batch)
    ids, _ = batch.pop("input_ids"), batch.pop("position_ids")
    found = handle(**batch, inputs_embeds=handle.bare_base.get_input_embeddings()(ids))
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)


def test_as_many_task_ids_as_texts():
    handle = virtual_handle("llama", "multitask")
    with pytest.raises(UsageError, match="2 task_ids for 5 texts"):
        handle(**PackedCollator()(examples()), task_ids=torch.tensor([0, 1]))


@pytest.mark.parametrize("method", ["prompt tuning", "prefix"])
def test_the_longest_text_needs_positions_beside_virtual_tokens_and_not_the_row(method):
    handle = handle_of("gpt2", copy.deepcopy(VIRTUAL[method]))  # 64 positions
    handle(**PackedCollator()(examples((61, 60, 59))))
    with pytest.raises(UsageError, match="62 tokens and 3 virtual tokens need 65 positions"):
        handle(**PackedCollator()(examples((4, 62))))


@pytest.mark.each_value_once
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("method", ["lora", "prompt tuning", "prefix"])
def test_recomputed_layers_keep_texts_apart(method, kind, reentrant):
    handle = (handle_of(kind) if method == "lora" else virtual_handle(kind, method)).double().train()
    for module in handle.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    batch = PackedCollator()(examples())
    plain = gradients(handle, handle(**batch).loss)
    handle.gradient_checkpointing_enable({"use_reentrant": reentrant})
    recomputed = gradients(handle, handle(**batch).loss)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-9, atol=1e-14)


def test_16_bit_bases_take_packed_rows():
    handle = handle_of("llama").to(torch.bfloat16)
    texts = examples()
    found = handle(**PackedCollator()(texts)).logits.split(LENGTHS, dim=1)
    for text, logits in zip(texts, found):
        alone = handle(input_ids=torch.tensor([text["input_ids"]])).logits
        assert (logits - alone).abs().max() <= 2**-8 * 8 * alone.abs().max()  # 8 roundings of 8 bits on the way


def test_the_base_is_as_before_and_serves_others_meanwhile():
    """While one thread's packed calls run, the base and another handle go on computing their own, bit for bit."""
    base = base_of("llama")
    before = handles.state(base)
    handle, other = handles.lora(base), handles.lora(base, seed=5)
    batch, inputs = PackedCollator()(examples()), tiny.inputs_for("llama")
    handle.eval(), other.eval()
    with torch.no_grad():
        expected = [handle(**batch).logits, base(**inputs).logits, other(**inputs).logits]
    wrong = []

    def repeat(call, answer):
        with torch.no_grad():
            wrong.extend("other" for _ in range(100) if not torch.equal(call().logits, answer))

    calls = [lambda: handle(**batch), lambda: base(**inputs), lambda: other(**inputs)]
    threads = [threading.Thread(target=repeat, args=pair) for pair in zip(calls, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert base.config._attn_implementation == "sdpa" != ATTENTION
    handles.assert_same_state(before, handles.state(base))


def test_an_unloaded_base_has_no_sites_left():
    handle = handle_of("llama")
    handle(**PackedCollator()(examples()))
    base = handle.unload()
    assert not [path for path, module in base.named_modules() if site_of(module) is not None]


def test_generate_refuses_a_packed_row():
    batch = PackedCollator()(examples())
    with pytest.raises(UsageError, match="one text per row"):
        handle_of("llama").generate(batch["input_ids"], cu_seq_lens_q=batch["cu_seq_lens_q"], max_new_tokens=1)


def test_disabled_adapters_leave_texts_apart():
    handle, texts = handle_of("llama"), examples()
    with torch.no_grad(), handle.disable_adapter():
        found = handle(**PackedCollator()(texts)).logits.split(LENGTHS, dim=1)
        for text, logits in zip(texts, found):
            assert_close(logits, handle.bare_base(input_ids=torch.tensor([text["input_ids"]])).logits)


def test_eager_bases_take_packed_rows():
    base = base_of("llama")
    base.set_attn_implementation("eager")
    check_texts_are_alone(get_peft_model(base, lora_config()).eval())
    assert base.config._attn_implementation == "eager"


REFUSED = {
    "linear biases": (lambda: get_peft_model(tiny.make("bloom"), LoraConfig()), "no test proves that BloomForCausalLM"),
    "encoder-decoder": (lambda: get_peft_model(tiny.make("t5"), LoraConfig()), "T5ForConditionalGeneration"),
    "classifier": (lambda: get_peft_model(tiny.make("llama-classifier"), LoraConfig()), "not a causal language model"),
    "private attention": (
        lambda: handles.lora(tiny.make("llama"), target_modules=["down_proj"], modules_to_save=["self_attn"]),
        "private copy of an attention",
    ),
    "private layer": (lambda: handles.lora(tiny.make("llama"), modules_to_save=["layers.1"]), "private copy of an attention"),
    "positions by length": (
        lambda: handle_of("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "length of the longest",
    ),
    "both directions": (lambda: handle_of("gemma3_text", use_bidirectional_attention=True), "both directions"),
    "cross-attention": (lambda: handle_of("gpt2", add_cross_attention=True), "also has cross-attention"),
    **({"own attention": (lambda: handle_of("nemotron"), "has its own attention implementation")} if OLD else {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_keep_texts_apart_says_why(case):
    make, words = REFUSED[case]
    handle = make()
    assert not can_pack(handle) and words in packing_fault(handle)
    with pytest.raises(UsageError, match="several texts") as error:
        handle(**PackedCollator()(examples()))
    assert words in str(error.value)


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"opt"}))
def test_a_bare_base_keeps_texts_apart_too(kind):
    """By transformers' own mask; of OPT it makes none, so there only handles keep texts apart."""
    base, batch = base_of(kind), PackedCollator()(examples((4, 6, 3)))
    ids = batch["input_ids"].clone()
    ids[0, 1] += 1 if ids[0, 1] == 2 else -1
    before, after = base(**batch).logits, base(**{**batch, "input_ids": ids}).logits
    assert torch.equal(before[:, 4:], after[:, 4:]) and not torch.equal(before[:, :4], after[:, :4])


def test_a_private_copy_of_the_head_is_packed():
    check_texts_are_alone(handles.lora(base_of("llama"), modules_to_save=["lm_head"]).eval())


def test_can_pack_answers_for_the_effective_adapters():
    handle = handles.lora(base_of("llama"), target_modules=["down_proj"], modules_to_save=["self_attn"])
    assert can_pack(handle.bare_base) and not can_pack(handle)
    handle.disable_adapters()
    assert can_pack(handle)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_mask": torch.ones(1, 27)}, "attention_mask out"),
        ({"past_key_values": tf.DynamicCache()}, "past_key_values out"),
        ({"output_attentions": True}, "output_attentions"),
        ({"input_ids": torch.ones(2, 27, dtype=torch.long)}, "a single row"),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 26])}, "from 0 to 27"),
        ({"cu_seq_lens_q": torch.tensor([1, 5, 27])}, "from 0 to 27"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 5, 27])}, "from 0 to 27"),
        ({"adapter_names": ["default"]}, None),
        ({"adapter_names": ["default", "__base__"]}, "names for 1 rows"),
    ],
)
def test_packed_rows_that_do_not_fit_are_refused(change, words):
    handle, batch = handle_of("llama"), {**PackedCollator()(examples()), **change}
    if words is None:
        assert torch.equal(handle(**batch).logits, handle(**PackedCollator()(examples())).logits)
        return
    with pytest.raises(UsageError, match=words):
        handle(**batch)


def test_positions_are_counted_where_none_are_given():
    handle, batch = handle_of("llama"), PackedCollator()(examples())
    expected = handle(**batch).logits
    for name in ("position_ids", "cu_seq_lens_k", "max_length_q", "max_length_k"):
        del batch[name]
    ids = batch.pop("input_ids")
    assert torch.equal(handle(ids, **batch).logits, expected)


def test_the_trainer_takes_the_same_steps_packed_as_padded(tmp_path):
    """Same batches and `num_items_in_batch`, same losses and adapter; gradients are accumulated, only answers have labels."""
    rows = examples([3 + n % 7 for n in range(24)])
    for row in rows:
        row["labels"] = [-100] * 2 + row["input_ids"][2:]

    def padded(batch):
        out = PadRight(0)([{"input_ids": row["input_ids"]} for row in batch])
        live = torch.arange(out["labels"].shape[1]) >= 2
        return {**out, "labels": torch.where(live, out["labels"], -100)}

    def train(collator):
        counts = []

        class Counting(tunesmith.Trainer):
            def _get_num_items_in_batch(self, *args, **kwargs):
                counts.append(int(super()._get_num_items_in_batch(*args, **kwargs)))
                return torch.tensor(counts[-1])

        arguments = tf.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=6, logging_steps=1,
            learning_rate=1e-3, optim="sgd", report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", seed=3,
        )  # fmt: skip
        trainer = Counting(model=handle_of("llama"), args=arguments, train_dataset=rows, data_collator=collator)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        return counts, losses, trainer.model.adapters.state_dict()

    expected, found = train(padded), train(PackedCollator())
    assert found[0] == expected[0] and len(found[0]) == 6
    assert found[1] == pytest.approx(expected[1], rel=1e-4)  # as logged, rounded to 4 places
    for name, value in expected[2].items():
        assert_close(found[2][name], value)


@pytest.mark.parametrize("kind", ["llama", "opt"])  # of OPT transformers makes no block mask, so a wrong way shows
def test_the_loss_on_live_labels_keeps_texts_apart(kind):
    handle, batch = handle_of(kind), PackedCollator()(examples())
    own = handle(**batch).loss
    expected = gradients(handle, own)
    fused = FusedLoss(handle)(batch)
    assert fused is not None, "the loss was left to the model"
    assert_close(fused, own)
    for name, gradient in gradients(handle, fused).items():
        assert_close(gradient, expected[name])


@pytest.mark.each_value_once
@pytest.mark.parametrize("method", ["prompt tuning", "P-tuning"])
@pytest.mark.parametrize("kind", KINDS)
def test_virtual_tokens_run_once_for_all_texts_with_the_same_loss_and_gradients(kind, method, monkeypatch):
    """7 virtual tokens are more than a window sees."""
    handle, batch = virtual_handle(kind, method), PackedCollator(first_tokens=True)(examples())
    own = handle(**batch).loss
    expected = gradients(handle, own)
    shared, run = [], shared_virtual_tokens.run
    monkeypatch.setattr(shared_virtual_tokens, "run", lambda *given: shared.append(1) or run(*given))
    for worth, runs in ((1000, 0), (-1000, 1)):
        monkeypatch.setattr(shared_virtual_tokens, "WORTH", worth)
        fused = FusedLoss(handle)(batch)
        if fused is None:
            assert kind in ("cohere", "cohere2", "gemma2", "granite"), "the loss was left to the model"
            continue
        assert len(shared) == runs
        assert_close(fused, own)
        for name, gradient in gradients(handle, fused).items():
            assert_close(gradient, expected[name])


@pytest.mark.parametrize("collator", [PackedCollator(first_tokens=True), PadRight(0)])
def test_virtual_tokens_that_run_once_need_positions_beside_the_longest_text(collator, monkeypatch):
    monkeypatch.setattr(shared_virtual_tokens, "WORTH", -1000)
    handle = handle_of("gpt2", copy.deepcopy(VIRTUAL["prompt tuning"]))  # 64 positions
    loss = FusedLoss(handle)
    assert loss(collator(examples((61, 60)))) is not None
    with pytest.raises(UsageError, match="62 tokens and 3 virtual tokens need 65 positions"):
        loss(collator(examples((4, 62))))
