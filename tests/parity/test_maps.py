"""Methods that map weights, against the reference library: files in both directions, outputs, gradients, counts."""

from __future__ import annotations

from functools import partial

import peft
import pytest
import torch
from peft.utils import constants
from torch import nn

import tunesmith as ts
from tests import tiny
from tests.parity.oracle import CONFIGS, agree, ours_on, output, own_names, read_by_peft, tensors, theirs_on, written_by_peft
from tests.parity.test_files import IMAGE, ConvNet, with_labels
from tunesmith.checkpoint.names import named_tensors

CONFIGS.update(
    {
        "vera": (ts.VeraConfig, peft.VeraConfig, {"r": 16, "init_weights": False}),
        "loha": (ts.LoHaConfig, peft.LoHaConfig, {"r": 4, "init_weights": False}),
        "lokr": (ts.LoKrConfig, peft.LoKrConfig, {"r": 2, "alpha": 2, "init_weights": False}),
        "oft": (ts.OFTConfig, peft.OFTConfig, {"oft_block_size": 8}),
        "hra": (ts.HRAConfig, peft.HRAConfig, {"r": 4}),
        "adalora": (
            ts.AdaLoraConfig,
            peft.AdaLoraConfig,
            {"init_r": 4, "target_r": 2, "total_step": 10, "orth_reg_weight": 0.0},
        ),
        "ia3": (ts.IA3Config, peft.IA3Config, {"init_ia3_weights": False}),
        "ln": (ts.LNTuningConfig, peft.LNTuningConfig, {}),
        "boft": (ts.BOFTConfig, peft.BOFTConfig, {"boft_block_size": 4}),
    }
)
LINEAR_ONLY = ("loha", "lokr", "oft", "hra", "boft")  # the reference has no Conv1D for these
BASES = ["llama", "gpt2", "opt", "bloom", "t5", "mt5", "bert-classifier"]
KINDS = ["vera", "loha", "lokr", "oft", "hra", "boft", "ln", "adalora", "ia3"]
CASES = [(kind, name) for kind in KINDS for name in BASES if not (name == "gpt2" and kind in LINEAR_ONLY)]
CASES = [case for case in CASES if case not in (("ln", "opt"), ("ln", "bert-classifier"))]  # no default norms there


@pytest.mark.each_value_once
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_files_with_default_targets_go_both_ways(kind, name, tmp_path):
    agree(tiny.make(name), kind, tiny.task_of(name), tiny.inputs_for(name), tmp_path)


OPTIONS = {
    "vera: wide and narrow modules": ("vera", "llama", {"target_modules": ["q_proj", "v_proj", "down_proj", "up_proj"]}),
    "vera: bias vera_only": ("vera", "opt", {"bias": "vera_only"}),
    "vera: bias all": ("vera", "opt", {"bias": "all"}),
    "vera: layers": ("vera", "llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "vera: Conv1D": ("vera", "gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    "loha: patterns": ("loha", "llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}),
    "loha: all-linear": ("loha", "llama", {"target_modules": "all-linear", "alpha": 3}),
    "lokr: patterns": ("lokr", "llama", {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"v_proj": 32}}),
    "lokr: both low-rank": ("lokr", "llama", {"decompose_both": True, "r": 1, "target_modules": ["q_proj", "down_proj"]}),
    "lokr: both low-rank where it does not help": ("lokr", "llama", {"decompose_both": True, "r": 32}),
    "lokr: factor that divides": ("lokr", "llama", {"decompose_factor": 4}),
    "lokr: factor above the root": ("lokr", "llama", {"decompose_factor": 16}),
    "lokr: factor that does not divide": ("lokr", "llama", {"decompose_factor": 5}),
    "lokr: exclude": ("lokr", "llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "oft: number of blocks": ("oft", "llama", {"r": 4, "oft_block_size": 0}),
    "oft: size that does not divide": ("oft", "llama", {"oft_block_size": 7, "target_modules": "all-linear"}),
    "oft: size between two divisors": ("oft", "llama", {"oft_block_size": 12}),
    "oft: size beyond the input": ("oft", "llama", {"oft_block_size": 100}),
    "oft: number that does not divide": ("oft", "llama", {"r": 5, "oft_block_size": 0}),
    "oft: exact inverse": ("oft", "llama", {"use_cayley_neumann": False}),
    **{f"oft: {n} terms": ("oft", "llama", {"num_cayley_neumann_terms": n}) for n in (2, 3, 4, 6, 9)},
    "oft: one block for all": ("oft", "llama", {"block_share": True}),
    "oft: constrained": ("oft", "llama", {"coft": True, "eps": 0.3}),
    "oft: constrained, one block for all": ("oft", "llama", {"coft": True, "eps": 0.3, "block_share": True}),
    "oft: embedding": ("oft", "llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "oft: bias oft_only": ("oft", "opt", {"bias": "oft_only"}),
    "hra: odd": ("hra", "llama", {"r": 3}),
    "hra: Gram-Schmidt": ("hra", "llama", {"apply_GS": True, "init_weights": False}),
    "hra: bias hra_only": ("hra", "opt", {"bias": "hra_only"}),
    "hra: wide": ("hra", "llama", {"r": 6, "target_modules": ["down_proj", "q_proj"]}),
    "adalora: alpha": ("adalora", "llama", {"lora_alpha": 3, "target_modules": "all-linear"}),
    "adalora: no alpha": ("adalora", "llama", {"lora_alpha": 0}),
    "adalora: bias lora_only": ("adalora", "opt", {"bias": "lora_only"}),
    "adalora: random init": ("adalora", "llama", {"init_lora_weights": False}),
    "adalora: Conv1D": ("adalora", "gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    "ia3: no feed-forward": ("ia3", "llama", {"feedforward_modules": []}),
    "ia3: targets, the usual feed-forward": ("ia3", "llama", {"target_modules": ["q_proj", "down_proj"]}),
    "ia3: a feed-forward of one's own": ("ia3", "opt", {"target_modules": ["q_proj", "fc1"], "feedforward_modules": ["fc1"]}),
    "ia3: Conv1D both ways": (
        "ia3",
        "gpt2",
        {"target_modules": ["c_attn", "mlp.c_proj", "c_fc"], "feedforward_modules": ["c_attn", "mlp.c_proj"]},
    ),
    "ia3: regular expressions": (
        "ia3",
        "gpt2",
        {"target_modules": r".*(c_attn|mlp\.c_proj)", "feedforward_modules": r".*c_proj"},
    ),
    "ln: names": ("ln", "opt", {"target_modules": ["final_layer_norm"]}),
    "ln: a head beside": ("ln", "bert-classifier", {"target_modules": ["output.LayerNorm"]}),
    "ln: regular expression": ("ln", "llama", {"target_modules": r".*layers\.1\..*norm"}),
    "ln: exclude": ("ln", "gpt2", {"exclude_modules": ["ln_f"]}),
    "boft: number of blocks": ("boft", "llama", {"boft_block_size": 0, "boft_block_num": 2}),
    "boft: odd size": ("boft", "opt", {"boft_block_size": 0, "boft_block_num": 32}),
    "boft: bias boft_only": ("boft", "opt", {"bias": "boft_only"}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_option_means_the_same_in_both(case, tmp_path):
    kind, name, options = OPTIONS[case]
    agree(tiny.make(name), kind, tiny.task_of(name), tiny.inputs_for(name), tmp_path, **options)


CONVOLUTIONS = {
    "loha": ("loha", ["plain", "strided", "grouped", "head"], {}),
    "loha by cores": ("loha", ["plain", "strided", "grouped"], {"use_effective_conv2d": True, "alpha": 2000}),
    "lokr": ("lokr", ["plain", "strided", "grouped", "dilated", "head"], {"r": 1}),
    "lokr by a core": ("lokr", ["plain", "strided", "grouped"], {"r": 1, "use_effective_conv2d": True, "alpha": 200}),
    "lokr whole": ("lokr", ["plain", "strided"], {"r": 64, "alpha": 640}),
    "lokr both low-rank": ("lokr", ["plain", "grouped"], {"r": 1, "decompose_both": True}),
    "adalora": ("adalora", ["plain", "strided", "dilated", "head"], {"init_lora_weights": False, "lora_alpha": 0.2}),
    "ia3 on outputs": ("ia3", ["plain", "strided", "grouped", "head"], {"feedforward_modules": []}),
    "ia3 on inputs": ("ia3", ["strided", "grouped", "head"], {"feedforward_modules": ["strided", "grouped", "head"]}),
    "hra": ("hra", ["plain", "head"], {"r": 3}),
    "boft": ("boft", ["plain", "head"], {"boft_block_size": 0, "boft_block_num": 1}),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv2d_files_go_both_ways(case, tmp_path):
    kind, targets, options = CONVOLUTIONS[case]
    agree(ConvNet().eval(), kind, None, IMAGE, tmp_path, target_modules=targets, **options)


GRADIENTS = [*((kind, name, {}) for kind, name in CASES), *OPTIONS.values()]


@pytest.mark.each_value_once
@pytest.mark.parametrize(("kind", "name", "options"), GRADIENTS)
def test_every_gradient_equals_the_references(kind, name, options, tmp_path):
    base = tiny.make(name)
    theirs = theirs_on(base, kind, tiny.task_of(name), **options)
    ours = ts.PeftModel.from_pretrained(base, written_by_peft(theirs, tmp_path), is_trainable=True).eval()
    check_gradients(ours, theirs, with_labels(name))


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_every_gradient_of_convolutions_equals_the_references(case, tmp_path):
    kind, targets, options = CONVOLUTIONS[case]
    base = ConvNet().eval()
    theirs = theirs_on(base, kind, None, target_modules=targets, **options)
    ours = ts.PeftModel.from_pretrained(base, written_by_peft(theirs, tmp_path), is_trainable=True).eval()
    check_gradients(ours, theirs, IMAGE, wrong_there=("hada_w1_a", "hada_w2_a") if case == "loha by cores" else ())


def test_gradients_of_loha_by_cores_are_the_slopes_of_the_loss():
    """The reference's handwritten backward takes the other pair's core for `hada_w1_a` and `hada_w2_a`; ours is exact."""
    options = {"use_effective_conv2d": True, "alpha": 2000, "target_modules": ["plain", "strided", "grouped"]}
    handle = ours_on(ConvNet().double().eval(), "loha", None, **options)
    image = IMAGE["x"].double()

    def loss() -> torch.Tensor:
        return handle(image)["logits"].cos().mean()

    loss().backward()
    for name, parameter in handle.tree("default").named_parameters():
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            values = []
            for step in (1e-6, -1e-6):
                parameter.add_(direction, alpha=step)
                values.append(loss())
                parameter.sub_(direction, alpha=step)
        slope = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close((parameter.grad * direction).sum(), slope, rtol=1e-5, atol=1e-8, msg=name)


def check_gradients(
    ours: ts.PeftModel, theirs: peft.PeftModel, batch: dict[str, torch.Tensor], wrong_there: tuple[str, ...] = ()
) -> None:
    """Assert equal losses and, tensor by tensor, gradients equal up to 1e-5 of the largest."""
    losses = []
    for model in (ours, theirs):
        result = model(**batch)
        loss = result["loss"] if "loss" in result else result["logits"].cos().mean()
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)
    trained = own_names(theirs)
    named = named_tensors(ours.tree("default"), ours.peft_config["default"], ours.bare_base)
    mine = {name: tensor for name, _, tensor in named if tensor.requires_grad}
    assert mine.keys() == trained.keys()
    for key, tensor in mine.items():
        if key.endswith(wrong_there or ("?",)):
            continue
        expected = trained[key].grad
        if expected is None or tensor.grad is None:  # a bias that the loss does not reach
            assert expected is None and tensor.grad is None, key
            continue
        torch.testing.assert_close(tensor.grad, expected, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert any(tensor.grad is not None and tensor.grad.abs().max() > 1e-4 for tensor in mine.values())
    assert all(p.grad is None for p in ours.bare_base.parameters())


@pytest.mark.each_value_once
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["vera", "loha", "lokr", "oft", "hra", "boft", "adalora", "ia3", "ia3 on inputs"])
def test_merged_convolution_equals_the_unmerged_one(kind, groups):
    base = nn.Sequential(nn.Conv2d(4, 8, (3, 2), padding=1, dilation=2, groups=groups, padding_mode="reflect")).double()
    inputs = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    options = {"feedforward_modules": ["0"]} if kind == "ia3 on inputs" else {}
    if kind == "vera" or (groups > 1 and kind in ("oft", "hra", "boft")):
        with pytest.raises(ts.TargetError, match=r"only|grouped convolution"):
            ours_on(base, kind, None, target_modules=["0"])
        return
    handle = ours_on(base, kind.split()[0], None, target_modules=["0"], **options)
    expected = handle(inputs)
    assert (expected - base(inputs)).abs().max() > 1e-3
    handle.merge_adapter()
    torch.testing.assert_close(handle(inputs), expected, rtol=1e-10, atol=1e-10)


SPATIAL = ["lora", "dora", "loha", "lokr", "oft", "hra", "boft", "adalora", "ia3", "ia3 on inputs"]


@pytest.mark.each_value_once
@pytest.mark.parametrize("dimensions", [1, 3])
@pytest.mark.parametrize("kind", SPATIAL)
def test_convolutions_of_other_dimensions_merge_to_the_same(kind, dimensions):
    module = {1: nn.Conv1d, 3: nn.Conv3d}[dimensions]
    base = nn.Sequential(module(4, 8, 3, padding=1, stride=2, padding_mode="circular")).double()
    inputs = torch.randn(2, 4, *[6] * dimensions, dtype=torch.float64)
    options = {"ia3 on inputs": {"feedforward_modules": ["0"]}, "dora": {"use_dora": True}, "boft": {"boft_block_size": 2}}
    name = "lora" if kind == "dora" else kind.split()[0]
    handle = ours_on(base, name, None, target_modules=["0"], **options.get(kind, {}))
    expected = handle(inputs)
    assert (expected - base(inputs)).abs().max() > 1e-3
    handle.train()(inputs).sum().backward()
    handle.eval().merge_adapter()
    torch.testing.assert_close(handle(inputs), expected, rtol=1e-10, atol=1e-10)


class Convolutions(nn.Module):
    def __init__(self, dimensions):
        super().__init__()
        module = {1: nn.Conv1d, 3: nn.Conv3d}[dimensions]
        self.plain, self.strided, self.grouped = (
            module(3, 8, 3, padding=1),
            module(8, 8, 3, stride=2),
            module(8, 4, 1, groups=2),
        )

    def forward(self, x):
        return {"logits": self.grouped(torch.relu(self.strided(torch.relu(self.plain(x))))).flatten(1)}


@pytest.mark.parametrize(
    ("kind", "dimensions", "options"),
    [
        ("lora", 1, {}),
        ("lora", 3, {"target_modules": ["plain", "strided"], "lora_bias": True}),
        ("lora", 1, {"target_modules": ["plain", "strided"], "use_dora": True}),
        ("lora", 3, {"target_modules": ["plain", "strided"], "use_dora": True}),
        ("ia3", 3, {"target_modules": ["plain", "strided"], "feedforward_modules": ["strided"]}),
        ("loha", 1, {"target_modules": ["plain", "strided"]}),
        ("loha", 1, {"target_modules": ["plain", "strided"], "use_effective_conv2d": True}),
        ("lokr", 1, {"target_modules": ["plain", "strided"]}),
        ("lokr", 1, {"target_modules": ["plain", "strided"], "r": 1}),
    ],
    ids=str,
)
def test_files_of_convolutions_of_other_dimensions_go_both_ways(kind, dimensions, options, tmp_path):
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 3, *[9] * dimensions)}
    agree(
        Convolutions(dimensions).eval(),
        kind,
        None,
        inputs,
        tmp_path,
        **{"target_modules": ["plain", "strided", "grouped"], **options},
    )


MAPPINGS = {
    "IA3": (ts.IA3Config, constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING),
    "LN": (ts.LNTuningConfig, constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING),
    "AdaLoRA": (
        partial(ts.AdaLoraConfig, total_step=10), constants.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING,
    ),
    "VeRA": (ts.VeraConfig, constants.TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING),
    "OFT": (ts.OFTConfig, constants.TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING),
}  # fmt: skip
UNTAKEN = {"gemma4", "btlm", "rwkv", "rwkv7", "nemotron_h", "llava"}  # remote code, state space models, not only norms


@pytest.mark.parametrize("method", MAPPINGS)
def test_usual_targets_are_the_ecosystems(method):
    make, mapping = MAPPINGS[method]
    for model_type in mapping.keys() - UNTAKEN:
        config = make()
        config.resolve_targets(model_type)
        assert config.target_modules == set(mapping[model_type]), model_type
        if method == "IA3":
            usual = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
            assert config.feedforward_modules == set(usual[model_type]), model_type


# --- VeRA -----------------------------------------------------------------------------------------------------------


def test_vera_projections_follow_from_the_key_as_in_the_reference(tmp_path):
    base, options = tiny.make("llama"), {"projection_prng_key": 7, "target_modules": ["q_proj", "down_proj"]}
    ours_on(base, "vera", "CAUSAL_LM", **options).save_pretrained(tmp_path / "ours")
    written_by_peft(theirs_on(base, "vera", "CAUSAL_LM", **options), tmp_path / "theirs")
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    for name, shape in (("base_model.vera_A", (16, 64)), ("base_model.vera_B", (32, 16))):
        assert ours[name].shape == shape and torch.equal(ours[name], theirs[name])


def test_vera_files_without_projections_go_both_ways(tmp_path):
    base, inputs = tiny.make("llama"), tiny.inputs_for("llama")
    agree(base, "vera", "CAUSAL_LM", inputs, tmp_path, save_projection=False, projection_prng_key=3)
    assert all("vera_lambda_" in name for name in tensors(tmp_path / "ours"))


def test_vera_projections_are_read_from_the_file_where_it_has_them(tmp_path):
    """A file's projections are taken as they are, whatever its key would give."""
    base, inputs = tiny.make("llama"), tiny.inputs_for("llama")
    handle = ours_on(base, "vera", "CAUSAL_LM")
    with torch.no_grad():
        handle.tree("default").shared.vera_A.mul_(-2)
    handle.save_pretrained(tmp_path)
    again = ts.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(output(again, inputs), output(handle, inputs))
    torch.testing.assert_close(output(read_by_peft(base, tmp_path), inputs), output(handle, inputs), atol=1e-5, rtol=0)


# --- OFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"oft_block_size": 9}, {"oft_block_size": 3, "block_share": True}], ids=str)
def test_oft_of_a_larger_kernel_is_what_the_references_merged_weight_computes(options, tmp_path):
    """The reference's forward folds overlapping patches back into an image, which adds them up: not even R = I is the base.

    Its merged weights are right, and ours equal them before and after merging.
    """
    base, image = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), IMAGE["x"]
    ours = ours_on(base, "oft", None, target_modules=["0"], **options)
    ours.save_pretrained(tmp_path)
    adapted = ours(image)
    theirs = read_by_peft(base, tmp_path).merge_and_unload()
    torch.testing.assert_close(adapted, theirs(image), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.merge_and_unload(copy=True)(image), adapted, atol=1e-5, rtol=0)
    assert (adapted - base(image)).abs().max() > 1e-2


def test_constrained_oft_trains_on_from_the_constrained_values():
    base, inputs = tiny.make("llama"), with_labels("llama")
    options = {"coft": True, "eps": 0.1}
    ours, theirs = ours_on(base, "oft", "CAUSAL_LM", **options).train(), theirs_on(base, "oft", "CAUSAL_LM", **options).train()
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
    trained = own_names(theirs)
    named = named_tensors(ours.tree("default"), ours.peft_config["default"], base)
    for name, _, tensor in named:
        torch.testing.assert_close(tensor, trained[name], atol=1e-5, rtol=0)


# --- BOFT -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def boft_without_cuda(monkeypatch):
    """The reference takes one factor without its CUDA extension; this gives it the extension's result."""
    from peft.tuners.boft import layer

    def block_diagonal(blocks):
        return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer.FastBlockDiag, "apply", block_diagonal)


@pytest.mark.parametrize("options", [
    {"boft_n_butterfly_factor": 2},
    {"boft_n_butterfly_factor": 3, "boft_block_size": 2, "target_modules": ["q_proj", "down_proj"]},
    {"boft_n_butterfly_factor": 4, "boft_block_size": 0, "boft_block_num": 8},
], ids=str)  # fmt: skip
def test_boft_of_several_factors_goes_both_ways(options, boft_without_cuda, tmp_path):
    base, inputs = tiny.make("llama"), tiny.inputs_for("llama")
    agree(base, "boft", "CAUSAL_LM", inputs, tmp_path, **options)
    theirs = read_by_peft(base, tmp_path / "theirs", is_trainable=True)
    ours = ts.PeftModel.from_pretrained(base, tmp_path / "theirs", is_trainable=True).eval()
    check_gradients(ours, theirs, with_labels("llama"))
