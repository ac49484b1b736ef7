"""Bases in 8-bit floats: the handle computes what one on the decoded base does, and its merged form is dense.

On a CPU the kernels of these layers do not run, so the modules here are subclasses that decode their weight.
"""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations import finegrained_fp8

from tests import tiny
from tests.handles import assert_same_state, gradients, lora, out, state
from tunesmith import (
    IA3Config,
    LoraConfig,
    OFTConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)  # fmt: skip
from tunesmith.bases.quantised import dense_module, quantised_views
from tunesmith.bases.view import view_of
from tunesmith.errors import TargetError, UsageError

INPUTS = tiny.inputs_for("llama")
FP8 = torch.float8_e4m3fn


class Blocks(finegrained_fp8.FP8Linear):
    """Decodes in plain loops, independently of the view."""

    gradient = True

    def dense(self):
        weight, scale = self.weight.detach().float(), self.weight_scale_inv.detach().float()
        if self.block_size is None:
            return weight * scale
        m, n = self.block_size
        weight = weight.clone()
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                weight[i * m : (i + 1) * m, j * n : (j + 1) * n] *= scale[i, j]
        return weight

    def forward(self, x):
        with torch.set_grad_enabled(self.gradient and torch.is_grad_enabled()):
            return F.linear(x, self.dense().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class WithoutGradient(Blocks):
    """Its kernel is a black box to autograd, as those of older releases are."""

    gradient = False


def stored(linear: nn.Linear, block, kind=Blocks) -> nn.Module:
    out_features, inner = linear.weight.shape
    new = kind(inner, out_features, block_size=block, has_bias=linear.bias is not None)
    with torch.no_grad():
        m, n = block or (out_features, inner)
        scale = torch.empty(-(-out_features // m), -(-inner // n))
        codes = linear.weight.detach().clone()
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                part = codes[i * m : (i + 1) * m, j * n : (j + 1) * n]
                scale[i, j] = part.abs().max() / 448
                part /= scale[i, j]
        new.weight.copy_(codes.to(FP8))
        new.weight_scale_inv.copy_(scale.view(new.weight_scale_inv.shape))
        if linear.bias is not None:
            new.bias.copy_(linear.bias)
    return new.requires_grad_(False)


def make(block=(8, 16), kind=Blocks, name="llama", dtype=torch.float32):
    base = tiny.make(name).to(dtype)
    for path, module in list(base.named_modules()):
        if type(module) is nn.Linear and "layers." in path:
            base.set_submodule(path, stored(module, block, kind))
    return base.eval()


def dense_of(base):
    for path, view in list(quantised_views(base)):
        dense = dense_module(view, torch.float32)
        with torch.no_grad():
            assert torch.equal(dense.weight, view.module.dense())
        base.set_submodule(path, dense)
    return base


def step(handle):
    handle.train()
    loss = handle(**INPUTS, labels=INPUTS["input_ids"]).loss
    loss.backward()
    return gradients(handle)


@pytest.mark.parametrize("kind", [Blocks, WithoutGradient])
@pytest.mark.parametrize("block", [(8, 16), (5, 7), None])
def test_values_and_gradients_are_those_on_the_decoded_base(block, kind):
    fields = {"target_modules": ["q_proj", "down_proj"]}
    base = make(block, kind)
    before = state(base)
    handle, plain = lora(base, 1, **fields), lora(dense_of(make(block)), 1, **fields)
    assert {p.dtype for p in handle.adapters.parameters()} == {torch.float32}
    torch.testing.assert_close(out(handle, INPUTS), out(plain, INPUTS))
    found, expected = step(handle), step(plain)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    assert_same_state({**before, "parameters": {}}, {**state(base), "parameters": {}})
    assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize("cast", [True, False])
def test_adapters_are_of_a_type_that_trains(cast):
    handle = get_peft_model(make(dtype=torch.bfloat16), LoraConfig(target_modules=["q_proj"]), autocast_adapter_dtype=cast)
    assert {p.dtype for p in handle.adapters.parameters()} == {torch.float32}
    assert out(handle, INPUTS).dtype == torch.bfloat16


CONFIGS = {
    "pissa": lambda: LoraConfig(init_lora_weights="pissa", r=4, target_modules=["q_proj", "up_proj"]),
    "olora": lambda: LoraConfig(init_lora_weights="olora", r=4, target_modules=["q_proj", "up_proj"]),
    "loftq": lambda: LoraConfig(init_lora_weights="loftq", r=4, target_modules=["q_proj", "up_proj"]),
    "dora": lambda: LoraConfig(use_dora=True, init_lora_weights=False, target_modules=["q_proj", "up_proj"]),
    "dora with dropout": lambda: LoraConfig(
        use_dora=True, lora_dropout=1e-9, init_lora_weights=False, target_modules=["q_proj"]
    ),
    "ia3": lambda: IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
    "oft": lambda: OFTConfig(oft_block_size=8, init_weights=False, target_modules=["q_proj"]),
    "vera": lambda: VeraConfig(r=4, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_methods_that_read_the_weight_read_the_decoded_one(name):
    handles = []
    for base in (make(), dense_of(make())):
        torch.manual_seed(3)
        handles.append(get_peft_model(base, CONFIGS[name]()))
    torch.testing.assert_close(out(handles[0], INPUTS), out(handles[1], INPUTS), rtol=1e-4, atol=1e-5)
    for found, expected in zip(step(handles[0]).values(), step(handles[1]).values()):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("block", [(8, 16), (5, 7), None])
def test_merging_gives_a_dense_model(block, copy):
    handle = lora(make(block), 1, target_modules=["q_proj", "down_proj"]).eval()
    expected = out(handle, INPUTS)
    merged = handle.merge_and_unload(copy=copy)
    assert not list(quantised_views(merged)) and {p.dtype for p in merged.parameters()} == {torch.float32}
    torch.testing.assert_close(out(merged, INPUTS), expected, rtol=1e-4, atol=1e-5)


def test_the_dense_model_has_the_type_of_the_rest():
    handle = lora(make(dtype=torch.bfloat16), 1, target_modules=["q_proj"]).eval()
    merged = handle.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("block", [(8, 16), (5, 7), None])
def test_merging_in_place_is_refused_unless_rounding_is_accepted(block, caplog):
    base = make(block)
    before, handle = state(base), lora(base, 1, target_modules=["q_proj"]).eval()
    expected = out(handle, INPUTS)
    with pytest.raises(UsageError, match="quantised"):
        handle.merge_adapter()
    with caplog.at_level(logging.WARNING):
        handle.merge_adapter(requantize=True)
    layer = base.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype == FP8 and "requantised 2 weights" in caplog.text
    target = view_of(layer).weight_as(torch.float32)
    torch.testing.assert_close(target, layer.dense())
    error = (out(base, INPUTS) - expected).norm() / (expected - out(make(block), INPUTS)).norm()
    assert error < 0.2  # 3 bits of mantissa
    handle.unmerge_adapter()
    assert state(base)["parameters"].keys() == before["parameters"].keys()
    assert {n: i for n, (i, _) in before["parameters"].items()} == {n: i for n, (i, _) in state(base)["parameters"].items()}
    torch.testing.assert_close(out(handle, INPUTS), expected)


def test_scales_that_are_powers_of_two():
    base = make()
    layer = base.model.layers[0].self_attn.q_proj
    rounded = layer.weight_scale_inv.detach().log2().ceil().exp2().to(torch.float8_e8m0fnu)
    layer.weight_scale_inv = nn.Parameter(rounded, requires_grad=False)
    handle = lora(base, 1, target_modules=["q_proj"]).eval()
    expected = out(handle, INPUTS)
    handle.merge_adapter(requantize=True)
    assert layer.weight_scale_inv.dtype == torch.float8_e8m0fnu
    assert torch.isfinite(layer.dense()).all()
    handle.unmerge_adapter()
    torch.testing.assert_close(out(handle.merge_and_unload(), INPUTS), expected, rtol=1e-4, atol=1e-5)


class Upcasting(nn.Linear):
    """Stores its weight in 8 bits without scales."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias)


def unscaled():
    base = tiny.make("llama")
    for layer in base.model.layers:
        layer.self_attn.q_proj.__class__ = Upcasting
        layer.self_attn.q_proj.weight.data = layer.self_attn.q_proj.weight.data.to(FP8)
    return base


@pytest.mark.parametrize("name", ["pissa", "dora", "oft"])
def test_without_scales_the_values_are_the_codes(name):
    plain = unscaled()
    for layer in plain.model.layers:
        layer.self_attn.q_proj.weight.data = layer.self_attn.q_proj.weight.data.float()
    handles = []
    for base in (unscaled(), plain):
        torch.manual_seed(3)
        config = CONFIGS[name]()
        config.target_modules = {"q_proj"}
        handles.append(get_peft_model(base, config).eval())
    torch.testing.assert_close(out(handles[0], INPUTS), out(handles[1], INPUTS))
    for found, expected in zip(step(handles[0]).values(), step(handles[1]).values()):
        torch.testing.assert_close(found, expected)
    before = state(handles[0].base_model)
    for merge in (handles[0].merge_adapter, handles[0].merge_and_unload):
        with pytest.raises(UsageError, match=r"stored as torch.float8_e4m3fn.*\.to\(torch.bfloat16\)"):
            merge()
    assert before["modules"] == state(handles[0].base_model)["modules"]


class OwnScales(Upcasting):
    def __init__(self, linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        self.weight = nn.Parameter(linear.weight.detach().to(FP8), requires_grad=False)
        self.register_buffer("outer_scale", torch.ones(()))


def test_forms_that_cannot_be_decoded_are_refused():
    base = tiny.make("llama")
    base.model.layers[0].self_attn.q_proj = OwnScales(base.model.layers[0].self_attn.q_proj)
    with pytest.raises(TargetError, match=r"layers\.0\.self_attn\.q_proj: .*outer_scale beside it"):
        lora(base, target_modules=["q_proj"])
    lora(base, target_modules=["k_proj"])


def test_what_must_train_in_its_own_type_is_refused():
    base = make()
    with pytest.raises(TargetError, match="do not train"):
        lora(base, target_modules=["q_proj"], modules_to_save=["down_proj"])
    with pytest.raises(TargetError, match="float8"):
        lora(base, target_parameters=["q_proj.weight"])
    base.model.embed_tokens.weight.data = base.model.embed_tokens.weight.data.to(FP8)
    base.model.embed_tokens.register_buffer("weight_scale", torch.ones(1))
    with pytest.raises(TargetError, match="weight_scale beside it"):
        get_peft_model(base, TrainableTokensConfig(token_indices=[3]))


def test_grouped_maps_are_refused():
    kind = getattr(finegrained_fp8, "FP8GroupedLinear", None)
    if kind is None:
        pytest.skip("not in this release of transformers")
    base = nn.Sequential(kind(8, 16, n_groups=2, block_size=(4, 4)))
    with pytest.raises(TargetError, match="several groups"):
        lora(base, target_modules=["0"])


def test_preparing_leaves_the_stored_form():
    base = prepare_model_for_kbit_training(make(dtype=torch.bfloat16))
    q = base.model.layers[0].self_attn.q_proj
    assert q.weight.dtype == FP8 and base.model.norm.weight.dtype == torch.float32
    handle = lora(base, 1, target_modules=["q_proj"]).eval()
    assert {p.dtype for p in handle.merge_and_unload().parameters()} == {torch.bfloat16}
