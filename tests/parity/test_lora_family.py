"""DoRA, a bias on B and the inits that take parts of the weight, against the reference library."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import agree, ours_on, output, own_names, read_by_peft, scrambled, tensors, theirs_on, written_by_peft
from tests.parity.test_files import IMAGE, ConvNet, with_labels
from tunesmith.checkpoint.names import current_name, named_tensors
from tunesmith.inits.loftq import loftq, normal_float, quantise
from tunesmith.inits.pissa import pissa

DORA = {"use_dora": True}
OPTIONS = {
    **{f"dora on {name}": (name, DORA) for name in tiny.MODELS},
    "dora, rslora and patterns": (
        "llama",
        {**DORA, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ),
    "dora from no change": ("llama", {**DORA, "init_lora_weights": True}),
    "dora, gaussian": ("gpt2", {**DORA, "init_lora_weights": "gaussian"}),
    "dora of an embedding": ("llama", {**DORA, "target_modules": ["embed_tokens", "q_proj"]}),
    "dora of an embedding tied to the head": ("gpt2", {**DORA, "target_modules": ["wte"]}),
    "dora of all linears": ("t5", {**DORA, "target_modules": "all-linear"}),
    "dora, biases trained": ("opt", {**DORA, "bias": "lora_only"}),
    "bias on B": ("opt", {"lora_bias": True}),
    "bias on B of Conv1D": ("gpt2", {"lora_bias": True}),
    "bias on B without a bias of the base": ("llama", {"lora_bias": True}),
    "bias on B, zero init": ("llama", {"lora_bias": True, "init_lora_weights": True}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "eva, before its weights are initialised": ("llama", {"init_lora_weights": "eva"}),
    **{f"pissa on {name}": (name, {"init_lora_weights": "pissa"}) for name in tiny.MODELS},
    "pissa, scaled": ("llama", {"init_lora_weights": "pissa", "lora_alpha": 32, "alpha_pattern": {"q_proj": 3}}),
    "pissa, rslora": ("llama", {"init_lora_weights": "pissa", "use_rslora": True, "target_modules": ["down_proj"]}),
    "olora": ("llama", {"init_lora_weights": "olora", "target_modules": ["q_proj", "down_proj", "up_proj"]}),
    "olora, scaled": ("bert-classifier", {"init_lora_weights": "olora", "lora_alpha": 12, "rank_pattern": {"query": 2}}),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_option_means_the_same_in_both(case, tmp_path):
    name, options = OPTIONS[case]
    agree(tiny.make(name), "lora", tiny.task_of(name), tiny.inputs_for(name), tmp_path, **options)


@pytest.mark.parametrize("options", [DORA, {"lora_bias": True}], ids=["dora", "bias on B"])
def test_convolutions_go_both_ways(options, tmp_path):
    agree(ConvNet().eval(), "lora", None, IMAGE, tmp_path, target_modules=["plain", "head"], **options)


@pytest.mark.parametrize("case", [*(c for c in OPTIONS if "Conv1D" not in c and "before" not in c), "bias on B of Conv1D"])
def test_every_gradient_equals_the_references(case, tmp_path):
    name, options = OPTIONS[case]
    base, batch = tiny.make(name), with_labels(name)
    theirs = theirs_on(base, "lora", tiny.task_of(name), **options)
    ours = ts.PeftModel.from_pretrained(base, written_by_peft(theirs, tmp_path), is_trainable=True).eval()
    for model in (ours, theirs):
        result = model(**batch)
        loss = result.loss if getattr(result, "loss", None) is not None else result.last_hidden_state.cos().mean()
        loss.backward()
    expected = {current_name(key): tensor.grad for key, tensor in own_names(theirs).items()}
    found = {key: t.grad for key, _, t in named_tensors(ours.adapters.default, ours.peft_config["default"], base)}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        if gradient is None:
            assert found[key] is None, key
            continue
        torch.testing.assert_close(found[key], gradient, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert any(gradient is not None and gradient.abs().max() > 1e-4 for gradient in found.values())


# --- DoRA -----------------------------------------------------------------------------------------------------------


def materialised(adapter, weight: torch.Tensor) -> torch.Tensor:
    """DoRA's weight as the paper writes it, in fp64, its norm a constant to the gradient."""
    changed = weight.double() + adapter.scale * adapter.lora_B.double() @ adapter.lora_A.double()
    return adapter.lora_magnitude_vector.double()[:, None] * changed / changed.norm(dim=1, keepdim=True).detach()


def test_dora_equals_the_papers_weight_with_a_detached_norm():
    """The norm goes through r-sized products; fp32 sums of `in` terms, each rounded by half a step, are off by

    at most in * 2^-24 relative to the sum of sizes, and the norm by half of that.
    """
    base = torch.nn.Sequential(torch.nn.Linear(48, 24))
    handle = ts.get_peft_model(base, ts.LoraConfig(target_modules=["0"], use_dora=True, init_lora_weights=False))
    adapter, x = handle.tree("default").node("0")._adapter, torch.randn(5, 48)
    with torch.no_grad():
        adapter.lora_magnitude_vector.mul_(torch.rand(24) + 0.5)
    parameters = list(adapter.parameters())
    expected = x.double() @ materialised(adapter, base[0].weight).T + base[0].bias
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    found = torch.autograd.grad(handle(x).square().sum(), parameters)
    tolerance = 48 * 2.0**-24
    torch.testing.assert_close(handle(x).double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    for got, exact in zip(found, wanted):
        torch.testing.assert_close(got, exact, rtol=4 * tolerance, atol=4 * tolerance * exact.abs().max().item())


def test_dora_norm_is_no_part_of_the_gradient():
    base = torch.nn.Sequential(torch.nn.Linear(48, 24))
    handle = ts.get_peft_model(base, ts.LoraConfig(target_modules=["0"], use_dora=True, init_lora_weights=False))
    adapter, x = handle.tree("default").node("0")._adapter, torch.randn(5, 48)
    changed = base[0].weight + adapter.scale * adapter.lora_B @ adapter.lora_A
    through_norm = x @ (adapter.lora_magnitude_vector[:, None] * changed / changed.norm(dim=1, keepdim=True)).T
    other = torch.autograd.grad((through_norm + base[0].bias).square().sum(), adapter.lora_B)[0]
    found = torch.autograd.grad(handle(x).square().sum(), adapter.lora_B)[0]
    assert (found - other).abs().max() > 1e-2


def test_dora_drops_the_same_inputs_from_weight_and_change():
    """As the reference: with dropout, everything that DoRA adds to the base's output sees the dropped input."""
    base = torch.nn.Sequential(torch.nn.Linear(16, 8))
    config = ts.LoraConfig(target_modules=["0"], use_dora=True, init_lora_weights=False, lora_dropout=0.5)
    handle, x = ts.get_peft_model(base, config).train(), torch.randn(4, 16)
    adapter = handle.tree("default").node("0")._adapter
    with torch.no_grad():
        adapter.lora_magnitude_vector.mul_(1.5)
    weight = materialised(adapter, base[0].weight).float()
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(3)
    torch.testing.assert_close(handle(x), base(x) + dropped @ (weight - base[0].weight).T, atol=1e-5, rtol=0)


def test_dora_file_of_an_older_version_is_read(tmp_path):
    base, inputs = tiny.make("llama"), tiny.inputs_for("llama")
    handle = ours_on(base, "lora", "CAUSAL_LM", **DORA)
    handle.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    old = {f"{key}.weight" if key.endswith("vector") else key: tensor for key, tensor in load_file(file).items()}
    assert sum(key.endswith("lora_magnitude_vector.weight") for key in old) == 4
    save_file(old, file)
    assert torch.equal(output(ts.PeftModel.from_pretrained(base, tmp_path).eval(), inputs), output(handle, inputs))


def test_dora_beside_a_bf16_base_starts_as_the_base_bit_for_bit():
    base, inputs = tiny.make("llama").to(torch.bfloat16), tiny.inputs_for("llama")
    handle = ts.get_peft_model(base, ts.LoraConfig(task_type="CAUSAL_LM", **DORA)).eval()
    assert torch.equal(output(handle, inputs), output(base, inputs))


# --- a bias on B ----------------------------------------------------------------------------------------------------


def test_bias_on_B_merges_into_the_bias_and_nowhere_else(tmp_path):
    base, inputs = tiny.make("opt"), tiny.inputs_for("opt")
    handle = ours_on(base, "lora", "CAUSAL_LM", lora_bias=True)
    handle.save_pretrained(tmp_path)
    assert any(key.endswith("q_proj.lora_B.bias") for key in tensors(tmp_path))
    merged = handle.merge_and_unload(copy=True)
    torch.testing.assert_close(output(merged, inputs), output(handle, inputs), atol=1e-5, rtol=0)
    theirs = read_by_peft(base, tmp_path).merge_and_unload().state_dict()
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, theirs[key], atol=1e-6, rtol=0)
    with pytest.raises(ts.UsageError, match="the module has none to merge it into"):
        ours_on(tiny.make("llama"), "lora", "CAUSAL_LM", lora_bias=True).merge_adapter()


# --- inits ----------------------------------------------------------------------------------------------------------


def new(base, init, **options):
    return ts.get_peft_model(base, ts.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=init, **options)).eval()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_factors_are_initialized_as_the_references(init):
    """Products are compared: signs of singular vectors are free."""
    base = tiny.make("llama")
    options = {"r": 4, "lora_alpha": 12, "init_lora_weights": init, "target_modules": ["q_proj", "down_proj"]}
    ours = ts.get_peft_model(base, ts.LoraConfig(**options)).tree("default")
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
    for path, adapter in ours.items():
        layer = theirs.base_model.model.get_submodule(path)
        expected = layer.lora_B.default.weight @ layer.lora_A.default.weight
        torch.testing.assert_close(adapter.lora_B @ adapter.lora_A, expected, atol=1e-5, rtol=0)


@pytest.mark.each_value_once
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "loftq"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_trained_adapter_loads_exactly_and_changes_no_weight(name, init, tmp_path):
    """The reference's OLoRA fails on Conv1D (it takes the stored orientation); ours works in (out, in) everywhere."""
    base, inputs = tiny.make(name), tiny.inputs_for(name)
    handle = ours_on(base, "lora", "CAUSAL_LM", init_lora_weights=init)
    handle.save_pretrained(tmp_path)
    assert {key.rsplit(".", 2)[-2] for key in tensors(tmp_path)} == {"lora_A", "lora_B"}
    torch.manual_seed(99)
    again = ts.PeftModel.from_pretrained(tiny.make(name), tmp_path).eval()
    assert torch.equal(output(again, inputs), output(handle, inputs))
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), tiny.make(name).parameters()))
    draws = torch.random.get_rng_state()
    ts.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), draws), "loading drew random numbers"


def test_quick_pissa_comes_near_the_exact_one_with_each_round():
    weight = torch.randn(64, 48) * 0.9 ** torch.arange(48)
    a, b = pissa(weight, 4, 1.0)
    errors = [(quick[1] @ quick[0] - b @ a).norm() / (b @ a).norm() for quick in (pissa(weight, 4, 1.0, n) for n in (0, 4, 64))]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-2


def test_a_file_of_another_init_takes_the_place_of_this_one(tmp_path):
    base, inputs = tiny.make("llama"), tiny.inputs_for("llama")
    trained = scrambled(new(base, "pissa"))
    trained.save_pretrained(tmp_path)
    handle = new(base, True)
    handle.load_adapter(tmp_path)
    assert torch.equal(output(handle, inputs), output(trained, inputs))


def test_no_init_is_taken_from_weights_that_hold_an_adapter():
    handle = ours_on(tiny.make("llama"), "lora", "CAUSAL_LM")
    handle.merge_adapter()
    with pytest.raises(ts.UsageError, match="unmerge_adapter"):
        handle.add_adapter("second", ts.LoraConfig(r=4, init_lora_weights="pissa"))
    handle.unmerge_adapter()
    handle.add_adapter("second", ts.LoraConfig(r=4, init_lora_weights="pissa"))


def test_inits_in_bf16_stay_near_the_base():
    """Factors and frozen copies cancel in fp32; what is left are the roundings of both products to bf16, relative 2^-8."""
    base, inputs = tiny.make("llama").to(torch.bfloat16), tiny.inputs_for("llama")
    expected = output(base, inputs).float()
    for init in ("pissa", "olora"):
        torch.testing.assert_close(
            output(new(base, init), inputs).float(), expected, rtol=0, atol=16 * 2.0**-8 * expected.std().item()
        )


def test_orthogonal_factors_are_not_zero_and_their_product_is():
    for _, adapter in new(tiny.make("llama"), "orthogonal").tree("default").items():
        assert adapter.lora_A.abs().max() > 0.05 and adapter.lora_B.abs().max() > 0.05
        assert (adapter.lora_B @ adapter.lora_A).abs().max() < 1e-6


NF4 = [
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]  # fmt: skip


def test_normal_float_of_4_bits_is_the_published_table():
    torch.testing.assert_close(normal_float(4), torch.tensor(NF4), atol=1e-6, rtol=0)
    for bits in (2, 3):
        assert len(normal_float(bits)) == 2**bits and 0 in normal_float(bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantised_values_are_the_nearest_levels(bits):
    weight = torch.randn(6, 50)  # its last block is not full
    quantised = quantise(weight, bits)
    if bits == 8:
        levels = [torch.arange(-127, 128) / 127 * row.abs().max() for row in weight]
        expected = torch.stack([lv[(row[:, None] - lv).abs().argmin(1)] for row, lv in zip(weight, levels)])
    else:
        expected = torch.cat([
            (normal_float(bits) * block.abs().max())[(block[:, None] - normal_float(bits) * block.abs().max()).abs().argmin(1)]
            for block in weight.flatten().split(64)
        ]).view_as(weight)  # fmt: skip
    torch.testing.assert_close(quantised, expected, atol=1e-6, rtol=0)


def test_loftq_makes_up_for_quantising_whatever_the_scale():
    """The reference leaves `lora_alpha / r` out of account, so it makes up for the loss only where that is 1."""
    weight = torch.randn(64, 48)
    plain = (weight - quantise(weight, 4)).norm()
    for scale in (0.5, 1.0, 4.0):
        a, b, quantised = loftq(weight, 8, scale, bits=4, rounds=1)
        torch.testing.assert_close(quantised, quantise(weight, 4))
        assert (weight - quantised - scale * b @ a).norm() < 0.8 * plain
    errors = []
    for rounds in (1, 5):
        a, b, quantised = loftq(weight, 8, 1.0, bits=2, rounds=rounds)
        errors.append((weight - quantised - b @ a).norm())
    assert errors[1] < errors[0]


def test_loftq_computes_with_the_quantised_weight_and_merges_it():
    base, inputs = tiny.make("llama"), tiny.inputs_for("llama")
    handle = ours_on(base, "lora", "CAUSAL_LM", init_lora_weights="loftq", loftq_config={"loftq_bits": 2, "loftq_iter": 3})
    changed = copy.deepcopy(base)
    for path, adapter in handle.tree("default").items():
        weight = changed.get_submodule(path).weight
        _, _, quantised = loftq(weight.detach(), 4, adapter.scale, bits=2, rounds=3)
        weight.data = quantised + adapter.scale * (adapter.lora_B @ adapter.lora_A).detach()
    torch.testing.assert_close(output(handle, inputs), output(changed, inputs), atol=1e-5, rtol=0)
    torch.testing.assert_close(output(handle.merge_and_unload(copy=True), inputs), output(changed, inputs), atol=1e-5, rtol=0)


def test_options_of_an_init_are_in_the_file(tmp_path):
    new(tiny.make("llama"), "loftq", loftq_config=ts.LoftQConfig(loftq_bits=8)).save_pretrained(tmp_path / "loftq")
    assert json.loads((tmp_path / "loftq" / "adapter_config.json").read_text())["loftq_config"] == {
        "loftq_bits": 8, "loftq_iter": 1,
    }  # fmt: skip
    new(tiny.make("llama"), "eva", eva_config=ts.EvaConfig(rho=1.5)).save_pretrained(tmp_path / "eva")
    assert ts.PeftConfig.from_pretrained(tmp_path / "eva").eva_config == ts.EvaConfig(rho=1.5)
    assert peft.LoraConfig.from_pretrained(tmp_path / "eva").eva_config.rho == 1.5
