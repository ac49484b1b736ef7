"""Adapter files against the reference library, in both directions."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from safetensors import safe_open
from torch import nn

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import agree, ours_on, output, own_names, read_by_peft, tensors, theirs_on, written_by_peft
from tunesmith.checkpoint.names import named_tensors

BF16_STEP = 2.0**-7  # largest distance of neighbouring bf16 numbers, relative


@pytest.mark.each_value_once
@pytest.mark.parametrize("kind", ["lora", "prompt"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_files_of_every_task_go_both_ways(name, kind, tmp_path):
    base = tiny.make(name)
    agree(base, kind, tiny.task_of(name), tiny.inputs_for(name), tmp_path)
    assert torch.equal(output(base, tiny.inputs_for(name)), output(tiny.make(name), tiny.inputs_for(name)))


OPTIONS = {
    "bias all": ("opt", {"bias": "all"}),
    "bias all of Conv1D": ("gpt2", {"bias": "all"}),
    "bias all of a classifier": ("bert-classifier", {"bias": "all"}),
    "bias lora_only": ("opt", {"bias": "lora_only"}),
    "bias lora_only of Conv1D": ("gpt2", {"bias": "lora_only", "target_modules": ["c_attn", "c_fc"]}),
    "bias all where there is none": ("llama", {"bias": "all"}),
    "modules_to_save a linear": ("llama", {"modules_to_save": ["lm_head"]}),
    "modules_to_save an embedding": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "modules_to_save norms": ("llama", {"modules_to_save": ["input_layernorm", "model.norm"]}),
    "modules_to_save a classifier's head": ("bert-classifier", {"modules_to_save": ["classifier"]}),
    "modules_to_save a pooler": ("bert-features", {"modules_to_save": ["pooler"]}),
    "rslora": ("llama", {"use_rslora": True}),
    "rank_pattern by name": ("llama", {"rank_pattern": {"q_proj": 2}}),
    "alpha_pattern by name": ("llama", {"alpha_pattern": {"v_proj": 32}}),
    "both patterns, by regular expression": (
        "llama",
        {"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 6, "v_proj": 3}, "alpha_pattern": {r".*\.1\..*v_proj": 2}},
    ),
    "patterns with rslora": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
    "layers_to_transform one": ("llama", {"layers_to_transform": 1, "target_modules": ["q_proj"]}),
    "layers_to_transform a list": ("gpt2", {"layers_to_transform": [0], "target_modules": ["c_attn"]}),
    "layers_pattern": (
        "t5",
        {"layers_to_transform": [1], "layers_pattern": "block", "target_modules": ["q", "wo"]},
    ),
    "exclude_modules by name": ("llama", {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["o_proj"]}),
    "exclude_modules by path": (
        "llama",
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "exclude_modules by regular expression": (
        "llama",
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*\.1\..*"},
    ),
    "targets by regular expression": ("llama", {"target_modules": r".*\.(0|1)\.(self_attn|mlp)\.(k|down)_proj"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "all-linear Conv1D": ("gpt2", {"target_modules": "all-linear"}),
    "all-linear encoder-decoder": ("t5", {"target_modules": "all-linear"}),
    "all-linear classifier": ("llama-classifier", {"target_modules": "all-linear"}),
    "Conv1D, said to be transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens"]}),
    "embedding and linear": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding tied to the head": ("gpt2", {"target_modules": ["wte"]}),
    "embedding of positions": ("gpt2", {"target_modules": ["wpe", "c_attn"]}),
    "output head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "gaussian init": ("llama", {"init_lora_weights": "gaussian"}),
    "zero init": ("llama", {"init_lora_weights": True}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_lora_option_means_the_same_in_both(case, tmp_path):
    name, options = OPTIONS[case]
    agree(tiny.make(name), "lora", tiny.task_of(name), tiny.inputs_for(name), tmp_path, **options)


def test_extra_module_beside_virtual_tokens_goes_both_ways(tmp_path):
    name = "bert-classifier"
    options = {"modules_to_save": ["classifier"]}
    agree(tiny.make(name), "prompt", "SEQ_CLS", tiny.inputs_for(name), tmp_path, **options)


# --- a model that is not of transformers: convolutions --------------------------------------------------------------


class ConvNet(nn.Module):
    """Every kind of Conv2d: strided, dilated, grouped, padded by reflection."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 8, (3, 2), stride=2, bias=False)
        self.dilated = nn.Conv2d(8, 8, 3, dilation=2, padding="same")
        self.reflected = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        for conv in (self.plain, self.strided, self.dilated, self.reflected, self.grouped):
            x = torch.relu(conv(x))
        return {"logits": self.head(x.mean((2, 3)))}


ALIKE = ["plain", "strided", "grouped"]
BY_MERGE = ["plain", "strided", "dilated", "reflected", "head"]
IMAGE = {"x": torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))}


@pytest.mark.parametrize("targets", [*([name] for name in ALIKE), [*ALIKE, "head"]], ids="+".join)
def test_conv2d_files_go_both_ways(targets, tmp_path):
    agree(ConvNet().eval(), "lora", None, IMAGE, tmp_path, target_modules=targets)


def test_merged_conv2d_equals_the_references_merge(tmp_path):
    """Dilated and reflected convolutions included.

    There the reference's forward forgets dilation and padding mode in A, so it disagrees with its own merged weights;
    ours computes what the merged weights do, before and after merging.
    """
    base = ConvNet().eval()
    ours = ours_on(base, "lora", None, target_modules=BY_MERGE)
    ours.save_pretrained(tmp_path)
    adapted = output(ours, IMAGE)
    theirs = read_by_peft(base, tmp_path).merge_and_unload()
    merged = ours.merge_and_unload(copy=True)
    torch.testing.assert_close(adapted, output(theirs, IMAGE), atol=1e-5, rtol=0)
    torch.testing.assert_close(output(merged, IMAGE), adapted, atol=1e-5, rtol=0)
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], atol=1e-6, rtol=0)


def test_grouped_conv2d_cannot_be_merged_and_says_so():
    handle = ours_on(ConvNet().eval(), "lora", None, target_modules=["grouped"])
    before = output(handle, IMAGE)
    with pytest.raises(ts.UsageError, match=r"grouped cannot be merged.*grouped convolution"):
        handle.merge_and_unload()
    assert torch.equal(output(handle, IMAGE), before)


@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", ["q_proj", "embed_tokens"]), ("gpt2", ["c_attn", "c_proj"]), ("t5", "all-linear"), ("opt", "all-linear")],
)
def test_merged_weights_equal_the_references(name, targets, tmp_path):
    base, inputs = tiny.make(name), tiny.inputs_for(name)
    ours = ours_on(base, "lora", tiny.task_of(name), target_modules=targets)
    ours.save_pretrained(tmp_path)
    merged = ours.merge_and_unload(copy=True)
    theirs = read_by_peft(base, tmp_path).merge_and_unload()
    torch.testing.assert_close(output(merged, inputs), output(theirs, inputs), atol=1e-5, rtol=0)


def test_merging_a_tied_embedding_leaves_the_head_alone():
    """The reference merges into the shared tensor, so its head changes too and its outputs are others than before."""
    base, inputs = tiny.make("gpt2"), tiny.inputs_for("gpt2")
    handle = ours_on(base, "lora", "CAUSAL_LM", target_modules=["wte"])
    adapted = output(handle, inputs)
    merged = handle.merge_and_unload(copy=True)
    torch.testing.assert_close(output(merged, inputs), adapted, atol=1e-4, rtol=0)
    assert merged.config.tie_word_embeddings is False and base.config.tie_word_embeddings is True


# --- gradients ------------------------------------------------------------------------------------------------------


def with_labels(name: str) -> dict[str, torch.Tensor]:
    """A training batch: labels in the form the task wants, some of them masked."""
    inputs, task = tiny.inputs_for(name), tiny.task_of(name)
    ids = inputs["input_ids"]
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        inputs.pop("decoder_input_ids", None)
        labels = ids.flip(1) if task == "SEQ_2_SEQ_LM" else ids.clone()
        labels[0, :3] = -100
        return {**inputs, "labels": labels}
    if task == "SEQ_CLS":
        return {**inputs, "labels": torch.tensor([2, 0])}
    if task == "TOKEN_CLS":
        return {**inputs, "labels": ids % 3}
    if task == "QUESTION_ANS":
        return {**inputs, "start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 6])}
    return inputs


def moved_behind_virtual_tokens(inputs: dict[str, torch.Tensor], n: int, task: str) -> dict[str, torch.Tensor]:
    """What the reference must be given where it does not count its own virtual tokens.

    Its token classifiers fail on labels that are one per real token, and its answer spans point n tokens too early.
    """
    if task == "TOKEN_CLS":
        return {**inputs, "labels": torch.cat([torch.full((2, n), -100), inputs["labels"]], dim=1)}
    if task == "QUESTION_ANS":
        return {**inputs, **{name: inputs[name] + n for name in ("start_positions", "end_positions")}}
    return inputs


@pytest.mark.each_value_once
@pytest.mark.parametrize("kind", ["lora", "prompt"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_gradient_equals_the_references(name, kind, tmp_path):
    base = tiny.make(name)
    options = {"bias": "all"} if name in ("opt", "bert-classifier") and kind == "lora" else {}
    theirs = theirs_on(base, kind, tiny.task_of(name), **options)
    ours = ts.PeftModel.from_pretrained(base, written_by_peft(theirs, tmp_path), is_trainable=True).eval()

    batch = with_labels(name)
    moved = moved_behind_virtual_tokens(batch, 4 if kind == "prompt" else 0, tiny.task_of(name))
    losses = []
    for model, inputs in ((ours, batch), (theirs, moved)):
        result = model(**inputs)
        loss = result.loss if getattr(result, "loss", None) is not None else result.last_hidden_state.cos().mean()
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)

    trained = own_names(theirs)
    mine = {in_file: tensor for in_file, _, tensor in named_tensors(ours.adapters.default, ours.peft_config["default"], base)}
    assert mine.keys() == trained.keys()
    for key, tensor in mine.items():
        expected = trained[key].grad
        if expected is None or tensor.grad is None:  # a bias that the loss does not reach
            assert expected is None and tensor.grad is None, key
            continue
        torch.testing.assert_close(tensor.grad, expected, atol=1e-5, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
    assert any(tensor.grad is not None and tensor.grad.abs().max() > 1e-4 for tensor in mine.values())
    assert all(p.grad is None for p in base.parameters())


# --- what is in the folder ------------------------------------------------------------------------------------------


def test_saved_folder_holds_three_files_and_nothing_else(tmp_path):
    ours_on(tiny.make("llama"), "lora", "CAUSAL_LM").save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_further_adapters_get_folders_of_their_names(tmp_path):
    handle = ours_on(tiny.make("llama"), "lora", "CAUSAL_LM")
    handle.add_adapter("second", ts.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    handle.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "second",
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "second").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    handle.set_adapter("second")
    theirs = read_by_peft(handle.bare_base, tmp_path / "second")
    inputs = tiny.inputs_for("llama")
    torch.testing.assert_close(output(handle, inputs), output(theirs, inputs), atol=1e-5, rtol=0)


def test_selected_adapters_alone_are_saved(tmp_path):
    handle = ours_on(tiny.make("llama"), "lora", "CAUSAL_LM")
    handle.add_adapter("second", ts.LoraConfig(r=2, task_type="CAUSAL_LM"))
    handle.save_pretrained(tmp_path, selected_adapters=["second"])
    assert [p.name for p in tmp_path.iterdir()] == ["second"]


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_config_file_has_sorted_keys_indent_2_and_is_for_inference(kind, tmp_path):
    ours_on(tiny.make("llama"), kind, "CAUSAL_LM").save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    values = json.loads(text)
    assert text == json.dumps(values, indent=2, sort_keys=True) + "\n"
    assert values["inference_mode"] is True
    assert values["peft_type"] == {"lora": "LORA", "prompt": "PROMPT_TUNING"}[kind]
    reference = peft.LoraConfig() if kind == "lora" else peft.PromptTuningConfig(num_virtual_tokens=4)
    assert values.keys() <= reference.to_dict().keys()


def test_config_file_lists_targets_in_alphabetical_order(tmp_path):
    ours_on(tiny.make("llama"), "lora", "CAUSAL_LM", target_modules=["v_proj", "down_proj", "q_proj"]).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["down_proj", "q_proj", "v_proj"]


def test_weights_file_says_that_it_is_of_pytorch(tmp_path):
    ours_on(tiny.make("llama"), "lora", "CAUSAL_LM").save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


NAMES = {
    "linear": ("llama", "lora", {"target_modules": ["q_proj"], "layers_to_transform": 0}, {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (4, 32),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (32, 4),
    }),
    "embedding": ("llama", "lora", {"target_modules": ["embed_tokens"]}, {
        "base_model.model.model.embed_tokens.lora_embedding_A": (4, 96),
        "base_model.model.model.embed_tokens.lora_embedding_B": (32, 4),
        "base_model.model.model.embed_tokens.base_layer.weight": (96, 32),
    }),
    "module copy": ("llama", "lora", {"target_modules": ["v_proj"], "layers_to_transform": 1, "modules_to_save": ["lm_head"]}, {
        "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight": (4, 32),
        "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight": (16, 4),
        "base_model.model.lm_head.weight": (96, 32),
    }),
    "bias of a target": ("opt", "lora", {"target_modules": ["k_proj"], "layers_to_transform": 0, "bias": "lora_only"}, {
        "base_model.model.model.decoder.layers.0.self_attn.k_proj.lora_A.weight": (4, 32),
        "base_model.model.model.decoder.layers.0.self_attn.k_proj.lora_B.weight": (32, 4),
        "base_model.model.model.decoder.layers.0.self_attn.k_proj.base_layer.bias": (32,),
    }),
    "virtual tokens": ("llama", "prompt", {}, {"prompt_embeddings": (4, 32)}),
    "virtual tokens of an encoder-decoder": ("t5", "prompt", {}, {"prompt_embeddings": (8, 32)}),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_tensor_names_and_shapes_are_those_of_the_format(case, tmp_path):
    name, kind, options, expected = NAMES[case]
    ours_on(tiny.make(name), kind, tiny.task_of(name), **options).save_pretrained(tmp_path)
    assert {key: tuple(tensor.shape) for key, tensor in tensors(tmp_path).items()} == expected


# --- older and smaller files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("llama", "lora"), ("llama", "prompt"), ("bert-classifier", "lora")])
def test_legacy_bin_file_of_the_reference_is_read(name, kind, tmp_path):
    base, inputs = tiny.make(name), tiny.inputs_for(name)
    theirs = theirs_on(base, kind, tiny.task_of(name))
    written_by_peft(theirs, tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists() and not (tmp_path / "adapter_model.safetensors").exists()
    mine = ts.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(output(mine, inputs), output(theirs, inputs), atol=1e-5, rtol=0)


def test_safetensors_wins_over_a_bin_file_beside_it(llama, llama_inputs, tmp_path):
    handle = ours_on(llama, "lora", "CAUSAL_LM")
    handle.save_pretrained(tmp_path)
    torch.save({"nonsense": torch.zeros(1)}, tmp_path / "adapter_model.bin")
    again = ts.PeftModel.from_pretrained(llama, tmp_path).eval()
    assert torch.equal(output(again, llama_inputs), output(handle, llama_inputs))


def test_config_with_nothing_but_what_is_needed_loads(llama, llama_inputs, tmp_path):
    handle = ours_on(llama, "lora", None, r=8)
    handle.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}')
    again = ts.PeftModel.from_pretrained(llama, tmp_path).eval()
    theirs = read_by_peft(llama, tmp_path)
    torch.testing.assert_close(output(again, llama_inputs), output(theirs, llama_inputs), atol=1e-5, rtol=0)


# --- 16-bit bases ---------------------------------------------------------------------------------------------------


@pytest.mark.each_value_once
@pytest.mark.parametrize("kind", ["lora", "prompt"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_bf16_base_with_fp32_adapters_is_right_up_to_rounding(name, kind, tmp_path):
    """Ours and the reference's are both compared with fp32: about 12 rounded results a layer, 2 or 4 layers deep.

    Independent roundings of at most half a step each add up like sqrt(count), in the sense of the norm. (The largest single
    error is no criterion: by the seed it is more than twice its mean.)
    """
    base, inputs = tiny.make(name).to(torch.bfloat16), tiny.inputs_for(name)
    ours = ours_on(base, kind, tiny.task_of(name))
    assert all(p.dtype == torch.float32 for p in ours.adapters.parameters())
    ours.save_pretrained(tmp_path)
    assert all(tensor.dtype == torch.float32 for tensor in tensors(tmp_path).values())

    wide = ts.PeftModel.from_pretrained(copy.deepcopy(base).float(), tmp_path).eval()
    exact = output(wide, inputs)
    layers = 4 if name == "t5" else 2
    tolerance = (12 * layers) ** 0.5 * BF16_STEP / 2 * exact.norm()
    result = output(ours, inputs)
    assert result.dtype == torch.bfloat16
    assert (result - exact).norm() < tolerance
    assert (output(read_by_peft(base, tmp_path), inputs) - exact).norm() < tolerance


def test_adapters_in_the_bases_own_16_bit_type_are_saved_and_read_in_it(llama, llama_inputs, tmp_path):
    base = llama.to(torch.bfloat16)
    config = ts.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)
    handle = ts.get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    handle.save_pretrained(tmp_path)
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors(tmp_path).values())
    again = ts.PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False).eval()
    assert torch.equal(output(again, llama_inputs), output(handle, llama_inputs))


# --- nn.MultiheadAttention ------------------------------------------------------------------------------------------


class Attends(nn.Module):
    """Two of torch's attentions; the first one has a pattern of its own."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.second = nn.MultiheadAttention(8, 4, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x, x, x, need_weights=False)[0]
        return {"logits": self.head(self.second(x, x, x)[0])}


TOKENS = {"x": torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(4))}
ATTENTIONS = {"target_modules": ["first", "second", "head"]}


@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"first": 2}, "alpha_pattern": {"second": 3}}], ids=str)
def test_files_of_torchs_attention_go_both_ways(options, tmp_path):
    torch.manual_seed(0)
    agree(Attends().eval(), "lora", None, TOKENS, tmp_path, **ATTENTIONS, **options)


def test_torchs_attention_trains_and_merges_as_in_the_reference(tmp_path):
    torch.manual_seed(0)
    base = Attends().eval()
    ours = ours_on(base, "lora", None, **ATTENTIONS)
    ours.save_pretrained(tmp_path)
    theirs = read_by_peft(base, tmp_path, is_trainable=True)
    for model in (ours.train(), theirs.train()):
        model(**TOKENS)["logits"].square().sum().backward()
    expected = {name: parameter.grad for name, parameter in own_names(theirs).items()}
    found = {name: tensor.grad for name, _, tensor in named_tensors(ours.tree("default"), ours.peft_config["default"], base)}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        twice = 2 if "out_proj" in name else 1  # the reference adds that change twice, once past autograd
        torch.testing.assert_close(
            found[name], twice * gradient, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    adapted = output(ours.eval(), TOKENS)
    merged, reference = ours.merge_and_unload(copy=True), theirs.merge_and_unload()
    torch.testing.assert_close(output(merged, TOKENS), adapted, atol=1e-5, rtol=0)
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], atol=1e-6, rtol=0)


def test_torchs_attention_merges_in_place_and_back():
    base = Attends().eval()
    handle = ours_on(base, "lora", None, **ATTENTIONS)
    plain, adapted = output(base, TOKENS), output(handle, TOKENS)
    before = {name: (value, value.clone()) for name, value in base.state_dict(keep_vars=True).items()}
    handle.merge_adapter()
    torch.testing.assert_close(output(base, TOKENS), adapted, atol=1e-5, rtol=0)
    handle.unmerge_adapter()
    assert torch.equal(output(base, TOKENS), plain)
    assert all(value is before[name][0] for name, value in base.state_dict(keep_vars=True).items())


def test_rows_with_different_adapters_in_torchs_attention():
    base = Attends().eval()
    handle = ours_on(base, "lora", None, **ATTENTIONS)
    rows = handle(TOKENS["x"], adapter_names=["default", "__base__"])["logits"]
    torch.testing.assert_close(rows, torch.stack([output(handle, TOKENS)[0], output(base, TOKENS)[1]]), atol=1e-5, rtol=0)
    for module in (base.first, base.second):
        module.batch_first = False
    with pytest.raises(ts.UsageError, match="second dimension"):
        handle(TOKENS["x"], adapter_names=["default", "__base__"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
    ids=str,
)
def test_what_cannot_act_in_torchs_attention_is_refused(options, reason):
    with pytest.raises(ts.TargetError, match=f"first.*{reason}"):
        ours_on(Attends(), "lora", None, target_modules=["first"], **options)
    with pytest.raises(ts.TargetError, match="projections of their own"):
        ours_on(Attends(kdim=4), "lora", None, target_modules=["first"])
