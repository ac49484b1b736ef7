"""Weights that a model reads instead of calling their module act as merged ones, or are refused (`runtime/reads.py`)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

import tunesmith as ts
from tests.handles import assert_same_state, lora, state
from tunesmith import LoraConfig, UsageError, get_peft_model

WORDS, DIM = 12, 8
IDS = torch.tensor([[1, 5, 7, 2], [0, 5, 11, 3]])


class Reads(nn.Module):
    """Embeds with a module and reads its weight, and another module's weight and bias."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(WORDS, DIM)
        self.h = nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, ids):
        x = self.wte(ids)
        x = torch.tanh(F.linear(x, self.h.weight, self.h.bias))
        x = F.layer_norm(x, (DIM,), self.norm.weight, self.norm.bias)
        return x.to(self.wte.weight.dtype) @ self.wte.weight.T


class Nested(nn.Module):
    """Reads what is inside a block, and calls a part of it past the block."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)
        self.block = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM))

    def forward(self, x):
        return self.block[2](F.linear(self.inner(x), self.block[0].weight))


class Doubled(torch.autograd.Function):
    """Stands for a fused kernel."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.saved_tensors[0], None


class Own(nn.Module):
    """What a test wants to do with a module beside it."""

    def __init__(self, do):
        super().__init__()
        self.h = nn.Linear(DIM, DIM)
        self.other = nn.Linear(DIM, DIM)
        self.do = do

    def forward(self, x):
        return self.do(self, self.other(x))


X = torch.randn(3, DIM, generator=torch.Generator().manual_seed(0))


def scrambled(handle):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in handle.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return handle.eval()


def make(kind=Reads):
    torch.manual_seed(0)
    return kind().eval()


CONFIGS = {
    "lora on both": LoraConfig(target_modules=["wte", "h"]),
    "dora": LoraConfig(target_modules=["wte", "h"], use_dora=True),
    "pissa": LoraConfig(target_modules=["h"], init_lora_weights="pissa"),
    "saved": LoraConfig(target_modules=["h"], modules_to_save=["wte", "norm"]),
    "rows": LoraConfig(target_modules=["h"], trainable_token_indices={"wte": [5, 2]}),
    "biases": LoraConfig(target_modules=["wte"], bias="all"),
    "bias of B": LoraConfig(target_modules=["h"], lora_bias=True),
    "parameters": LoraConfig(target_parameters=["h.weight", "wte.weight"]),
    "norms": ts.LNTuningConfig(target_modules=["norm"]),
    "loha": ts.LoHaConfig(target_modules=["h"]),
    "lokr": ts.LoKrConfig(target_modules=["h"]),
    "oft": ts.OFTConfig(target_modules=["h", "wte"], oft_block_size=4),
    "boft": ts.BOFTConfig(target_modules=["h"], boft_block_size=4),
    "hra": ts.HRAConfig(target_modules=["h"]),
    "ia3": ts.IA3Config(target_modules=["h"], feedforward_modules=[]),
    "vera": ts.VeraConfig(target_modules=["h"]),
    "adalora": ts.AdaLoraConfig(target_modules=["h"], total_step=10),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_reads_are_what_merging_makes_of_them(name):
    base = make()
    before, plain = state(base), base(IDS)
    handle = scrambled(get_peft_model(base, CONFIGS[name]))
    adapted = handle(IDS)
    assert (adapted - plain).abs().max() > 1e-3
    torch.testing.assert_close(handle.merge_and_unload(copy=True)(IDS), adapted, atol=1e-5, rtol=1e-5)
    assert torch.equal(base(IDS), plain), "the bare base is bare"
    handle.train()(IDS).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in handle.named_parameters() if p.requires_grad), name
    handle.unload()
    assert_same_state(before, state(base))
    assert all(type(module._parameters) is dict for module in base.modules())


def test_gradients_are_those_of_the_changed_weight():
    base = make()
    handle = scrambled(lora(base, target_modules=["h"], r=2)).train()
    adapter = handle.tree("default").node("h").own
    handle(IDS).square().sum().backward()
    a, b = (value.detach().clone().requires_grad_() for value in (adapter.lora_A, adapter.lora_B))
    weights = {"h.weight": base.h.weight + adapter.scale * b @ a}
    torch.func.functional_call(base, weights, (IDS,)).square().sum().backward()
    torch.testing.assert_close((adapter.lora_A.grad, adapter.lora_B.grad), (a.grad, b.grad))


def test_two_adapters_and_switching_act_in_a_read():
    handle = scrambled(lora(make(), target_modules=["h"]))
    handle.add_adapter("second", LoraConfig(target_modules=["h", "wte"], init_lora_weights=False))
    first = handle(IDS)
    handle.set_adapter("second")
    second = handle(IDS)
    handle.set_adapter(["default", "second"])
    both = handle(IDS)
    assert len({value.sum().item() for value in (first, second, both)}) == 3
    torch.testing.assert_close(handle.merge_and_unload(copy=True)(IDS), both, atol=1e-5, rtol=1e-5)
    with handle.disable_adapter():
        assert torch.equal(handle(IDS), handle.bare_base(IDS))


def test_a_tied_module_that_is_called_keeps_the_bases_weight_as_after_merging():
    base = make()
    base.head = nn.Linear(DIM, WORDS, bias=False)
    base.head.weight = base.wte.weight
    base.forward = lambda ids: base.head(base.wte(ids))
    handle = scrambled(lora(base, target_modules=["wte"]))
    torch.testing.assert_close(handle.merge_and_unload(copy=True).wte(IDS) @ base.wte.weight.T, handle(IDS))


def test_what_is_inside_a_saved_block_acts_past_the_block():
    base = make(Nested)
    handle = scrambled(get_peft_model(base, LoraConfig(target_modules=["inner"], modules_to_save=["block"])))
    handle.train()(X).sum().backward()
    copied = handle.tree("default").node("block").at("_copy").module
    assert copied[0].weight.grad is not None and copied[2].bias.grad is not None
    torch.testing.assert_close(handle.merge_and_unload(copy=True)(X), handle(X), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_reads_have_the_same_gradients(reentrant):
    def read(module, x):
        return torch.tanh(F.linear(x, module.h.weight, module.h.bias))

    def recomputed(module, x):
        return checkpoint(lambda x: read(module, x), x, use_reentrant=reentrant)

    gradients = []
    for do in (read, recomputed):
        torch.manual_seed(0)
        handle = scrambled(lora(Own(do), target_modules=["h", "other"])).train()
        handle(X).square().sum().backward()
        gradients.append([p.grad for p in handle.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients)


def test_a_compiled_handle_reads_the_same_in_one_graph():
    handle = scrambled(get_peft_model(make(), CONFIGS["saved"]))
    handle.add_adapter("second", LoraConfig(target_modules=["h", "wte"], init_lora_weights=False))
    graphs = []
    compiled = torch.compile(handle, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    for name in ("default", "second", "default"):
        handle.set_adapter(name)
        torch.testing.assert_close(compiled(IDS), handle(IDS))
    assert len(graphs) == 2


def test_looking_at_a_weight_does_not_merge(monkeypatch):
    def look(module, x):
        weight = module.h.weight
        assert weight.dtype == x.dtype and weight.shape == (DIM, DIM) and weight.device == x.device and len(weight) == DIM
        assert isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dim() == 2
        return x.to(weight.dtype)

    handle = lora(Own(look), target_modules=["h", "other"]).eval()
    monkeypatch.setattr("tunesmith.runtime.reads.changed_parameters", lambda *_: pytest.fail("merged"))
    handle(X)


def test_rows_with_different_adapters_are_refused_where_one_weight_serves_them_all():
    handle = scrambled(lora(Own(lambda m, x: F.linear(x, m.h.weight)), target_modules=["h"]))
    handle.add_adapter("second", LoraConfig(target_modules=["other"], init_lora_weights=False))
    names = ["default", "second", "__base__"]
    with pytest.raises(UsageError, match=r"weight of a Linear .* rows with different adapters"):
        handle(X, adapter_names=names)
    assert torch.equal(handle(X, adapter_names=["default"] * 3), handle(X))


def test_a_change_that_is_none_of_the_weight_is_refused():
    handle = lora(Own(lambda m, x: F.linear(x, m.h.weight)), target_modules=["h"], lora_bias=True)
    handle.bare_base.h.bias = None
    with pytest.raises(UsageError, match=r"instead of calling the module.*lora_bias"):
        handle(X)
    bottleneck = get_peft_model(Own(lambda m, x: F.linear(x, m.h.weight)), ts.BottleneckConfig(target_modules=["h"]))
    with pytest.raises(UsageError, match="changes what the module computes"):
        bottleneck(X)


def test_a_fused_kernel_acts_in_evaluation_and_is_refused_in_training():
    handle = scrambled(lora(Own(lambda m, x: Doubled.apply(x, m.h.weight)), target_modules=["h", "other"]))
    with torch.no_grad():
        adapted = handle(X)
        torch.testing.assert_close(handle.merge_and_unload(copy=True)(X), adapted)
    with pytest.raises(UsageError, match="fused kernel"):
        handle.train()(X)


@pytest.mark.parametrize("write", [lambda w: w.mul_(2), lambda w: w.data.clamp_(-1, 1), lambda w: w.__setitem__(0, 1.0)])
def test_writing_into_an_adapted_weight_is_refused(write):
    def do(module, x):
        with torch.no_grad():
            write(module.h.weight)
        return x

    base = Own(do)
    before = base.h.weight.clone()
    with pytest.raises(UsageError, match="would write"):
        lora(base, target_modules=["h", "other"])(X)
    assert torch.equal(base.h.weight, before)


def test_swapping_parameters_inside_a_call_puts_the_bases_back():
    def do(module, x):
        return torch.func.functional_call(module.h, {"weight": torch.eye(DIM)}, (x,))

    base = Own(do)
    before = state(base)
    lora(base, target_modules=["h", "other"]).eval()(X)
    assert_same_state(before, state(base))


def test_a_weight_kept_elsewhere_is_refused():
    base = Own(lambda m, x: F.linear(x, m.kept[0]))
    base.kept = [base.h.weight]
    handle = lora(base, target_modules=["h", "other"])
    for mode in (True, False):
        with pytest.raises(UsageError, match=r"(?s)keeps them elsewhere.*- h"):
            handle.train(mode)(X)


def test_copies_and_pickles_of_a_base_are_plain():
    base = make()
    scrambled(lora(base, target_modules=["h", "wte"]))
    for other in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert type(other.h._parameters) is dict
        assert torch.equal(other(IDS), base(IDS))


def test_generation_that_reads_weights_is_the_merged_models():
    """Mamba multiplies with `dt_proj.weight` by itself."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4)
    base = transformers.MambaForCausalLM(config).eval()
    handle = lora(base, target_modules=["dt_proj", "x_proj", "out_proj"]).eval()
    ids = torch.randint(3, 50, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    merged = handle.merge_and_unload(copy=True)
    assert torch.equal(handle.generate(ids, **options), merged.generate(ids, **options))


@pytest.mark.parametrize("targets", [["out_proj"], ["linear1"], ["self_attn"], ["norm1", "linear2"]], ids=str)
def test_torchs_encoder_layer_takes_its_plain_path(targets):
    base, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 3, 8)
    fields = {"modules_to_save": [targets.pop(0)]} if targets[0] == "norm1" else {}
    handle = scrambled(lora(base, target_modules=targets, **fields))
    with torch.no_grad():
        adapted = handle(x)
        assert (adapted - base(x)).abs().max() > 1e-2
        torch.testing.assert_close(handle.merge_and_unload(copy=True)(x), adapted, atol=1e-5, rtol=1e-5)


class Standardised(nn.Conv2d):
    """A convolution that standardises its weight, which no change beside it is a change of."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, self.stride, self.padding)


def test_a_parametrized_weight_acts_when_read_and_when_called():
    for do in (lambda m, x: F.linear(x, m.h.weight, m.h.bias), lambda m, x: m.h(x)):
        torch.manual_seed(0)
        base = Own(do)
        nn.utils.parametrizations.weight_norm(base.h)
        plain = base(X)
        handle = scrambled(lora(base, target_modules=["h"]))
        adapter = handle.tree("default").node("h").own
        expected = F.linear(base.other(X), base.h.weight + adapter.scale * adapter.lora_B @ adapter.lora_A, base.h.bias)
        torch.testing.assert_close(handle(X), expected)
        handle(X).sum().backward()
        assert adapter.lora_A.grad is not None
        assert torch.equal(base(X), plain) and torch.equal(copy.deepcopy(base)(X), plain)
        with pytest.raises(UsageError, match="computed from other parameters"):
            handle.merge_adapter()
        handle.unload()
        assert "forward" not in vars(base.h.parametrizations.weight)


def test_a_standardised_convolution_acts_in_calls_and_is_refused_elsewhere():
    image = torch.randn(1, 3, 6, 6)
    base = nn.Sequential(Standardised(3, 4, 3))
    handle = lora(base, target_modules=["0"]).eval()
    assert (handle(image) - base(image)).abs().max() > 1e-2
    with pytest.raises(UsageError, match="forward computes something else"):
        handle.merge_adapter()
    base.forward = lambda x: F.conv2d(x, base[0].weight)
    with pytest.raises(UsageError, match="forward computes something else"):
        handle.train()(image)
