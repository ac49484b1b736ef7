"""Adapters combined into new ones, beside the reference: same members, same result."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from torch import nn

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import output, quiet, read_by_peft, shapes, tensors, written_by_peft
from tests.parity.test_files import IMAGE, ConvNet
from tunesmith.combine.arithmetic import TYPES

DENSITY = {"density": 0.4}
RANDOM = [kind for kind in TYPES if kind.startswith("dare")]


def options_of(kind: str) -> dict:
    return {"combination_type": kind, **(DENSITY if kind not in ("linear", "cat", "svd") else {})}


def with_members(base: nn.Module, task: str | None, *fields: dict, config=ts.LoraConfig) -> ts.PeftModel:
    """A handle with one random adapter per set of fields: "a", "b", ..."""
    handle = None
    for i, (name, options) in enumerate(zip("abc", fields)):
        torch.manual_seed(10 + i)
        defaults = {"init_lora_weights": False} if config is ts.LoraConfig else {}
        made = config(task_type=task, **{**defaults, **options})
        if handle is None:
            handle = ts.get_peft_model(base, made, name)
        else:
            handle.add_adapter(name, made)
        with torch.no_grad():
            for parameter in handle.tree(name).parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return handle.eval()


def theirs_of(handle: ts.PeftModel, folder) -> peft.PeftModel:
    """The reference's model with the same members."""
    handle.save_pretrained(folder)
    names = list(handle.peft_config)
    model = read_by_peft(handle.bare_base, folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(folder / name), name)
    return model.eval()


class same_draws:
    """Inside, the n-th random mask is the same whatever was drawn before for other ends."""

    def __enter__(self) -> None:
        self.real, self.generator = torch.bernoulli, torch.Generator().manual_seed(3)
        torch.bernoulli = lambda shares: self.real(shares, generator=self.generator)

    def __exit__(self, *_: object) -> None:
        torch.bernoulli = self.real


def both(base, task, folder, weights, *fields, config=ts.LoraConfig, **options):
    """Our handle and the reference's model, after the same combination of the same members."""
    ours = with_members(base, task, *fields, config=config)
    theirs = theirs_of(ours, folder)
    names = list(ours.peft_config)
    for model in (ours, theirs):
        with quiet(), same_draws():
            model.add_weighted_adapter(names, weights, "new", **options)
        model.set_adapter("new")
    return ours.eval(), theirs.eval()


def assert_same(ours, theirs, inputs, folder, same_factors=True) -> None:
    plain = output(ours.bare_base, inputs)
    assert (output(theirs, inputs) - plain).abs().max() > 1e-3, "the combination does nothing; this proves nothing"
    torch.testing.assert_close(output(ours, inputs), output(theirs, inputs), atol=1e-5, rtol=1e-5)
    ours.save_pretrained(folder / "ours", selected_adapters=["new"])
    written_by_peft(theirs, folder / "theirs", selected_adapters=["new"])
    assert shapes(folder / "ours" / "new") == shapes(folder / "theirs" / "new")
    if same_factors:
        reference = tensors(folder / "theirs" / "new")
        for key, value in tensors(folder / "ours" / "new").items():
            torch.testing.assert_close(value, reference[key], atol=1e-5, rtol=1e-5)
    back = read_by_peft(ours.bare_base, folder / "ours" / "new")
    torch.testing.assert_close(output(back, inputs), output(theirs, inputs), atol=1e-5, rtol=1e-5)
    again = ts.PeftModel.from_pretrained(copy.deepcopy(ours.bare_base), folder / "theirs" / "new").eval()
    torch.testing.assert_close(output(again, inputs), output(theirs, inputs), atol=1e-5, rtol=1e-5)


TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "t5": ["q", "wo"]}


@pytest.mark.each_value_once
@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.5, -0.6]], ids=str)
@pytest.mark.parametrize(
    ("name", "kind"),  # under "_svd" Conv1D is transposed there, so equal draws drop other values
    [(name, kind) for name in TARGETS for kind in TYPES if (name, kind) not in [("gpt2", f"{k}_svd") for k in RANDOM]],
)
def test_every_type_gives_the_references_adapter(name, kind, weights, tmp_path):
    fields = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[name]}
    ours, theirs = both(tiny.make(name), tiny.task_of(name), tmp_path, weights, fields, fields, **options_of(kind))
    assert_same(ours, theirs, tiny.inputs_for(name), tmp_path, same_factors=not kind.endswith("svd"))


CASES = {
    "ranks differ, side by side": ([{"r": 4}, {"r": 2, "lora_alpha": 32}], {"combination_type": "cat"}),
    "ranks differ, nearest": ([{"r": 4}, {"r": 2}], {"combination_type": "svd"}),
    "a smaller rank is asked for": ([{"r": 4}, {"r": 4}], {"combination_type": "svd", "svd_rank": 2}),
    "a larger rank is asked for": ([{"r": 2}, {"r": 2}], {"combination_type": "svd", "svd_rank": 6}),
    "cut off": ([{"r": 4}, {"r": 4}], {"combination_type": "svd", "svd_clamp": 0.9}),
    "thin decomposition": ([{"r": 4}, {"r": 4}], {"combination_type": "ties_svd", "svd_full_matrices": False, **DENSITY}),
    "signs by frequency": ([{"r": 4}] * 3, {"combination_type": "ties", "majority_sign_method": "frequency", **DENSITY}),
    "signs by frequency, whole": (
        [{"r": 4}] * 3,
        {"combination_type": "ties_svd", "majority_sign_method": "frequency", **DENSITY},
    ),
    "other targets": (
        [{"r": 4, "target_modules": ["q_proj"]}, {"r": 4, "target_modules": ["v_proj"]}],
        {"combination_type": "cat"},
    ),
    "other targets, linear": (
        [{"r": 4, "target_modules": ["q_proj", "o_proj"]}, {"r": 4, "target_modules": ["v_proj", "o_proj"]}],
        {"combination_type": "linear"},
    ),
    "by regular expression": (
        [{"r": 4, "target_modules": r".*\.0\..*q_proj"}, {"r": 4, "target_modules": r".*v_proj"}],
        {"combination_type": "cat"},
    ),
    "patterns": (
        [{"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}, {"r": 4}],
        {"combination_type": "svd"},
    ),
    "embedding": ([{"r": 4, "target_modules": ["embed_tokens"]}] * 2, {"combination_type": "linear"}),
    "embedding, side by side": ([{"r": 4, "target_modules": ["embed_tokens", "q_proj"]}] * 2, {"combination_type": "cat"}),
    "embedding, nearest": ([{"r": 4, "target_modules": ["embed_tokens"]}] * 2, {"combination_type": "svd"}),
    "embedding, signs": ([{"r": 4, "target_modules": ["embed_tokens"]}] * 2, {"combination_type": "ties_svd", **DENSITY}),
    "one adapter": ([{"r": 4}], {"combination_type": "svd"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_case_gives_the_references_adapter(case, tmp_path):
    fields, options = CASES[case]
    weights = [0.8, -0.5, 0.9][: len(fields)]
    ours, theirs = both(tiny.make("llama"), "CAUSAL_LM", tmp_path, weights, *fields, **options)
    assert_same(ours, theirs, tiny.inputs_for("llama"), tmp_path, same_factors=not options["combination_type"].endswith("svd"))


@pytest.mark.parametrize("kind", ["linear", "svd", "ties_svd", "cat"])
def test_convolutions(kind, tmp_path):
    fields = {"r": 4, "target_modules": ["plain", "strided", "head"]}
    ours, theirs = both(ConvNet().eval(), None, tmp_path, [0.7, -0.4], fields, fields, **options_of(kind))
    assert_same(ours, theirs, IMAGE, tmp_path, same_factors=not kind.endswith("svd"))


def test_a_pattern_of_smaller_ranks_under_linear_keeps_one_rank_everywhere(tmp_path):
    """The reference stores factors of rank 2 beside `r: 4`, which neither library can load again; ours fill up with zeros."""
    fields = {"r": 4, "rank_pattern": {"q_proj": 2}}
    ours, theirs = both(tiny.make("llama"), "CAUSAL_LM", tmp_path, [0.7, 0.4], fields, fields, combination_type="linear")
    inputs = tiny.inputs_for("llama")
    torch.testing.assert_close(output(ours, inputs), output(theirs, inputs), atol=1e-5, rtol=1e-5)
    written_by_peft(theirs, tmp_path / "theirs", selected_adapters=["new"])
    with pytest.raises(ts.AdapterFileError, match="shape"):
        ts.PeftModel.from_pretrained(tiny.make("llama"), tmp_path / "theirs" / "new")
    ours.save_pretrained(tmp_path / "ours", selected_adapters=["new"])
    back = read_by_peft(tiny.make("llama"), tmp_path / "ours" / "new")
    torch.testing.assert_close(output(back, inputs), output(ours, inputs), atol=1e-5, rtol=1e-5)


def test_rank_stabilised_members_keep_their_strength(tmp_path):
    """The reference leaves `use_rslora` on in the new config, whose scale is then sqrt(r) where the values need 1."""
    fields = {"r": 4, "use_rslora": True}
    ours, theirs = both(tiny.make("llama"), "CAUSAL_LM", tmp_path, [1.0], fields, combination_type="linear")
    inputs = tiny.inputs_for("llama")
    combination = output(ours, inputs)
    ours.set_adapter("a")
    torch.testing.assert_close(combination, output(ours, inputs), atol=1e-5, rtol=1e-5)
    assert (output(theirs, inputs) - combination).abs().max() > 1e-3


def test_modules_of_other_layers_are_kept(tmp_path):
    """The reference takes `layers_to_transform` from the first member and loses the other's modules."""
    fields = [{"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [i]} for i in (0, 1)]
    ours, theirs = both(tiny.make("llama"), "CAUSAL_LM", tmp_path, [1.0, 1.0], *fields, combination_type="cat")
    assert {path for path, _ in ours.tree("new").items()} == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    combination = output(ours, tiny.inputs_for("llama"))
    ours.set_adapter(["a", "b"])
    torch.testing.assert_close(combination, output(ours, tiny.inputs_for("llama")), atol=1e-5, rtol=1e-5)
    lost = [n for n, _ in theirs.named_parameters() if ".lora_A.new." in n and ".1." in n]
    assert not lost
    ours.save_pretrained(tmp_path / "ours", selected_adapters=["new"])
    back = read_by_peft(tiny.make("llama"), tmp_path / "ours" / "new")
    torch.testing.assert_close(output(back, tiny.inputs_for("llama")), combination, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", [[0.25, 0.75], [1.0, -0.5]], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_ia3_gives_the_references_factors(name, weights, tmp_path):
    ours, theirs = both(tiny.make(name), tiny.task_of(name), tmp_path, weights, {}, {}, config=ts.IA3Config)
    assert_same(ours, theirs, tiny.inputs_for(name), tmp_path)


def test_ia3_on_other_modules_counts_an_absent_factor_as_one(tmp_path):
    """The reference counts it as zero: half of each of two adapters on different modules halves keys and values."""
    fields = [{"target_modules": [n], "feedforward_modules": [], "init_ia3_weights": True} for n in ("k_proj", "v_proj")]
    ours = with_members(tiny.make("llama"), "CAUSAL_LM", *fields, config=ts.IA3Config)
    ours.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new")
    path = "model.layers.0.self_attn.k_proj"
    mine, new = (ours.tree(name).node(path)._adapter.ia3_l for name in ("a", "new"))
    torch.testing.assert_close(new, 0.5 * mine + 0.5)


# --- what has no reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_side_by_side_is_the_sum_of_changes_and_so_is_the_nearest_of_that_rank(kind):
    fields = {"r": 3, "target_modules": ["q_proj", "down_proj"]}
    ours = with_members(tiny.make("llama").double(), "CAUSAL_LM", fields, {**fields, "lora_alpha": 2})
    weights = [0.7, -1.2]
    ours.add_weighted_adapter(["a", "b"], weights, "new", kind, **({"svd_rank": 6} if kind == "svd" else {}))
    for path, adapter in ours.tree("new").items():
        members = [(ours.tree(name).node(path)._adapter, weight) for name, weight in zip("ab", weights)]
        expected = sum(w * m.scale * m.lora_B @ m.lora_A for m, w in members)
        torch.testing.assert_close(adapter.scale * adapter.lora_B @ adapter.lora_A, expected, atol=1e-5, rtol=1e-5)


def test_random_drops_keep_the_share_and_the_mean():
    from tunesmith.combine.sparsify import drop_randomly, keep_largest

    torch.manual_seed(0)
    values = torch.randn(400, 500)
    dropped = drop_randomly(values, 0.3)
    kept = dropped != 0
    assert abs(kept.double().mean().item() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / values.numel())
    torch.testing.assert_close(dropped[kept], values[kept] / 0.3)
    largest = keep_largest(values, 0.3)
    assert (largest != 0).sum() == int(0.3 * values.numel())
    assert largest[largest != 0].abs().min() >= values[largest == 0].abs().max()


def test_ties_by_hand():
    from tunesmith.combine.sums import agreed_mean

    changes = [torch.tensor([1.0, -2.0, 0.0, 4.0]), torch.tensor([3.0, 1.0, 0.0, -1.0]), torch.tensor([-9.0, 1.5, 0.0, 2.0])]
    assert agreed_mean(changes, [1.0, 1.0, 2.0], "total").tolist() == [-18.0, (1.0 + 3.0) / 2, 0.0, (4.0 + 4.0) / 2]
    assert agreed_mean(changes, [1.0, 1.0, 2.0], "frequency").tolist() == [2.0, 2.0, 0.0, 4.0]


def test_prompts_are_averaged_token_by_token():
    fields = {"num_virtual_tokens": 3}
    ours = with_members(tiny.make("llama"), "CAUSAL_LM", fields, fields, config=ts.PromptTuningConfig)
    ours.add_weighted_adapter(["a", "b"], [0.25, 0.75], "new")
    a, b, new = (ours.tree(name).prompt.embedding for name in ("a", "b", "new"))
    torch.testing.assert_close(new, 0.25 * a + 0.75 * b)
    ours.set_adapter("new")
    assert output(ours, tiny.inputs_for("llama")).isfinite().all()


def test_the_new_adapter_waits_and_then_is_as_any_other(tmp_path):
    ours = with_members(tiny.make("llama"), "CAUSAL_LM", {}, {})
    before = output(ours, tiny.inputs_for("llama"))
    ours.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", "cat")
    assert ours.active_adapters == ["a"] and torch.equal(output(ours, tiny.inputs_for("llama")), before)
    assert not any(p.requires_grad for p in ours.tree("new").parameters())
    ours.set_adapter("new")
    assert all(p.requires_grad for p in ours.tree("new").parameters())
    combination = output(ours, tiny.inputs_for("llama"))
    ours.merge_adapter()
    torch.testing.assert_close(output(ours, tiny.inputs_for("llama")), combination, atol=1e-5, rtol=1e-5)
    ours.unmerge_adapter()
    ours.delete_adapter(["a", "b"])
    assert list(ours.peft_config) == ["new"] and torch.equal(output(ours, tiny.inputs_for("llama")), combination)
    ours.delete_adapter("new")
    assert ours.active_adapters == [] and torch.equal(
        output(ours, tiny.inputs_for("llama")), output(tiny.make("llama"), tiny.inputs_for("llama"))
    )


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
@pytest.mark.parametrize(("full", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_beside_a_16_bit_base_the_new_adapter_has_its_members_type(kind, full, dtype):
    ours = ts.get_peft_model(
        tiny.make("llama").bfloat16(), ts.LoraConfig(init_lora_weights=False), "a", autocast_adapter_dtype=full
    )
    ours.add_weighted_adapter(["a", "a"], [0.5, 0.5], "new", kind)
    assert {p.dtype for p in ours.tree("new").parameters()} == {dtype}
    for path, new in ours.tree("new").items():
        old = ours.tree("a").node(path)._adapter
        # linear: both factors are sqrt(1/2) + sqrt(1/2) of the old ones, so the change doubles
        expected = old.scale * old.lora_B.float() @ old.lora_A.float() * (2 if kind == "linear" else 1)
        step = 2.0**-8 if dtype == torch.bfloat16 else 1e-6  # relative rounding of each factor's values
        close = (new.scale * new.lora_B.float() @ new.lora_A.float() - expected).abs().max()
        assert close <= 8 * step * expected.abs().max()


def test_the_one_members_trained_head_is_taken_over():
    """The reference gives the combination a fresh copy of the base's."""
    ours = with_members(tiny.make("llama"), "CAUSAL_LM", {}, {"modules_to_save": ["lm_head"]})
    ours.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", "cat")
    mine, new = (ours.tree(name).node("lm_head")._copy.module.weight for name in ("b", "new"))
    assert torch.equal(mine, new) and not torch.equal(mine, ours.bare_base.lm_head.weight)


def test_biases_of_one_member_are_taken_over():
    ours = with_members(tiny.make("opt"), "CAUSAL_LM", {"bias": "lora_only"}, {})
    ours.add_weighted_adapter(["b", "a"], [0.5, 0.5], "new", "cat")
    path = "model.decoder.layers.0.self_attn.q_proj"
    assert torch.equal(*(ours.tree(name).node(path)._biases.bias for name in ("a", "new")))


def _mixed():
    handle = with_members(tiny.make("llama"), "CAUSAL_LM", {"r": 4}, {"r": 2})
    handle.add_adapter("scaling", ts.IA3Config(task_type="CAUSAL_LM"))
    handle.add_adapter("blocks", ts.BottleneckConfig(task_type="CAUSAL_LM"))
    for name in ("head", "other-head"):
        handle.add_adapter(name, ts.LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    for n in (3, 4):
        handle.add_adapter(f"prompt{n}", ts.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=n))
    return handle


BAD = [
    (["a", "x"], [1, 1], {}, ts.AdapterNameError, 'no adapter "x"'),
    (["a"], [1], {"adapter_name": "b"}, ts.AdapterNameError, '"b" is taken'),
    ([], [], {}, ts.ConfigError, "adapters is empty"),
    (["a", "b"], [1], {}, ts.ConfigError, "as many weights, got 1"),
    (["a", "b"], [1, float("nan")], {}, ts.ConfigError, "finite numbers, got nan"),
    (["a", "b"], [1, 1], {"combination_type": "tie"}, ts.ConfigError, "did you mean 'ties'"),
    (["a", "b"], [1, 1], {"combination_type": "linear"}, ts.ConfigError, 'one rank, but "a" has 4, "b" has 2; use "cat"'),
    (["a", "b"], [1, 1], {"combination_type": "ties_svd"}, ts.ConfigError, "needs density"),
    (["a", "b"], [1, 1], {"combination_type": "ties_svd", "density": 0}, ts.ConfigError, "density=0"),
    (["a", "b"], [1, 1], {"combination_type": "ties_svd", "density": 1.1}, ts.ConfigError, "density=1.1"),
    (["a", "b"], [1, 1], {"svd_rank": 0}, ts.ConfigError, "svd_rank=0"),
    (["a", "b"], [1, 1], {"svd_clamp": 1.5}, ts.ConfigError, "svd_clamp=1.5"),
    (["a", "b"], [1, 1], {"majority_sign_method": "most"}, ts.ConfigError, '"total" or "frequency"'),
    (["a", "scaling"], [1, 1], {"combination_type": "linear"}, ts.UsageError, "got IA3, Lora"),
    (["blocks", "blocks"], [1, 1], {}, ts.UsageError, '"blocks" holds Bottleneck .* plain LoRA, IA3 and prompt tuning'),
    (["head", "other-head"], [1, 1], {"combination_type": "cat"}, ts.UsageError, '"head", "other-head" each have modules'),
    (
        ["scaling", "scaling"],
        [1, 1],
        {"combination_type": "ties", **DENSITY},
        ts.ConfigError,
        'only by combination_type="linear"',
    ),
    (["prompt3", "prompt4"], [1, 1], {}, ts.UsageError, '"prompt3" has 3, "prompt4" has 4'),
]


@pytest.fixture(scope="module")
def mixed():
    return _mixed()


@pytest.mark.parametrize(("adapters", "weights", "options", "error", "message"), BAD, ids=[case[4][:40] for case in BAD])
def test_what_cannot_be_combined_says_why_and_leaves_no_trace(mixed, adapters, weights, options, error, message):
    names, active = list(mixed.peft_config), mixed.active_adapters
    with pytest.raises(error, match=message):
        mixed.add_weighted_adapter(adapters, weights, **{"adapter_name": "new", **options})
    assert list(mixed.peft_config) == names and list(mixed.adapters) == names and mixed.active_adapters == active


def test_a_grouped_convolution_is_refused():
    fields = {"r": 4, "target_modules": ["grouped"]}
    ours = with_members(ConvNet().eval(), None, fields, fields)
    with pytest.raises(ts.UsageError, match=r"grouped: .*cannot be combined"):
        ours.add_weighted_adapter(["a", "b"], [1, 1], "new", "cat")
