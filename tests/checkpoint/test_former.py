"""Adapter files of transformers 4: exactly the change that they stand for, or one error that says what has no place."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as tf

import tunesmith as ts
from tests import experts, tiny
from tests.bad_input import Snapshot, one_error
from tests.parity.oracle import read_by_peft
from tunesmith import AdapterFileError, ConfigError
from tunesmith.bases.architecture import FormerNames

INPUTS = tiny.inputs_for("llama")
QWEN, MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")


def loaded(base, folder, **kwargs):
    return ts.PeftModel.from_pretrained(base, str(folder), **kwargs).eval()


def agrees(name, maps, held, folder, scale=lambda path: 2.0, **fields):
    """The handle that reads the file answers as the base whose weights were changed by hand; so does what it saves."""
    reference = experts.make(name)
    experts.change(maps(reference), held, scale)
    want = reference(**INPUTS).logits
    model = loaded(experts.make(name), experts.write(folder / "then", held, **fields))
    assert torch.allclose(model(**INPUTS).logits, want, atol=2e-5)
    model.save_pretrained(folder / "now")
    assert torch.equal(loaded(experts.make(name), folder / "now")(**INPUTS).logits, model(**INPUTS).logits)
    return model, want


def mixtral(base):
    routers = {
        f"model.layers.{i}.block_sparse_moe.gate": experts.weight_of(base, f"model.layers.{i}.mlp.gate") for i in range(2)
    }
    return experts.expert_maps(base, MIXTRAL, "block_sparse_moe") | routers


def qwen(base):
    return experts.expert_maps(base, QWEN)


def test_experts_and_routers(tmp_path):
    held = experts.factors(mixtral(experts.make("mixtral")))
    model, want = agrees("mixtral", mixtral, held, tmp_path, target_modules=["w1", "w2", "w3", "gate"])
    assert torch.allclose(read_by_peft(experts.make("mixtral"), tmp_path / "now")(**INPUTS).logits, want, atol=2e-5)
    config = model.peft_config["default"]
    assert config.rank_pattern == {r"experts\.gate_up_proj": 8}
    assert config.alpha_pattern == {r"experts\.gate_up_proj": 16}


def test_modules_of_the_same_names_load_beside_experts(tmp_path):
    def maps(base):
        dense = [f"model.layers.{block}.{name}" for block in ("0.mlp", "1.mlp.shared_experts") for name in QWEN]
        return experts.expert_maps(base, QWEN) | {path: experts.weight_of(base, path) for path in dense}

    agrees("deepseek-v3", maps, experts.factors(maps(experts.make("deepseek-v3"))), tmp_path, target_modules=list(QWEN))


def of_rank(path):
    return 2 if "gate_proj" in path else 6 if ".1.up" in path else 4


CASES = {
    "rank-stabilised": ({"use_rslora": True}, lambda path: 4, lambda path: 4.0),
    "ranks that differ": (
        {"rank_pattern": {"gate_proj": 2, r"experts\.1\.up_proj": 6}},
        of_rank,
        lambda path: 8 / of_rank(path),
    ),
    "by an expression": ({"target_modules": r"model\.layers\.\d\.mlp\.experts\.\d\..*_proj"}, lambda path: 4, lambda path: 2.0),
    "trained with dropout": ({"lora_dropout": 0.1}, lambda path: 4, lambda path: 2.0),
}


@pytest.mark.parametrize("case", CASES)
def test_settings(case, tmp_path):
    fields, rank, scale = CASES[case]
    held = experts.factors(qwen(experts.make("qwen3-moe")), rank)
    agrees("qwen3-moe", qwen, held, tmp_path, scale, **{"target_modules": list(QWEN), **fields})


@pytest.mark.parametrize(
    "kept, fields",
    [
        (lambda path: "up_proj" not in path, {"target_modules": ["gate_proj", "down_proj"]}),
        (lambda path: "layers.1" in path, {"target_modules": list(QWEN), "layers_to_transform": [1]}),
        (lambda path: "experts.0" in path, {"target_modules": list(QWEN), "exclude_modules": r".*experts\.[123]\..*"}),
    ],
)
def test_a_part_of_the_experts(kept, fields, tmp_path):
    some = {path: weight for path, weight in qwen(experts.make("qwen3-moe")).items() if kept(path)}
    agrees("qwen3-moe", qwen, experts.factors(some), tmp_path, **fields)


GATE = "base_model.model.model.layers.1.mlp.experts.2.gate_proj"
FAULTY = {
    "a tensor is missing": (lambda held: held.pop(f"{GATE}.lora_A.weight"), [f'"{GATE}.lora_A.weight" is missing']),
    "a shape": (
        lambda held: held.update({f"{GATE}.lora_B.weight": torch.zeros(7, 4)}),
        [r"shape \(7, 4\), the base needs \(24, 4\)"],
    ),
    "a tensor without counterpart": (
        lambda held: held.update({f"{GATE}.lora_magnitude_vector": torch.ones(24)}),
        ["magnitude_vector", "no counterpart"],
    ),
}


@pytest.mark.parametrize("case", FAULTY)
def test_refused(case, tmp_path):
    spoil, words = FAULTY[case]
    base = experts.make("qwen3-moe")
    held = experts.factors(qwen(base))
    spoil(held)
    before = Snapshot(base)
    with one_error(AdapterFileError, "not all of it can be mapped", *words):
        loaded(base, experts.write(tmp_path, held, target_modules=list(QWEN)))
    before.check()


def test_an_expert_that_the_base_does_not_have(tmp_path):
    base = experts.make("qwen3-moe")
    held = experts.factors(qwen(base)) | {f"{GATE.replace('.2.', '.7.')}.lora_A.weight": torch.ones(4, 32)}
    with one_error(AdapterFileError, 'experts.7.gate_proj.lora_A.weight" belongs to no part'):
        loaded(base, experts.write(tmp_path, held, target_modules=list(QWEN)))


def test_a_layer_that_is_missing_is_an_error(tmp_path):
    base = experts.make("qwen3-moe")
    held = {key: tensor for key, tensor in experts.factors(qwen(base)).items() if "layers.1" not in key}
    with one_error(AdapterFileError, r"layers.1.mlp.experts.0.gate_proj.lora_A.weight\" is missing"):
        loaded(base, experts.write(tmp_path, held, target_modules=list(QWEN)))


def test_other_methods_on_experts_are_refused(tmp_path):
    held = {f"{GATE}.hada_w1_a": torch.ones(24, 4)}
    with one_error(AdapterFileError, "LOHA cannot adapt", "hada_w1_a"):
        loaded(
            experts.make("qwen3-moe"), experts.write(tmp_path, held, peft_type="LOHA", alpha=8, target_modules=["gate_proj"])
        )


# --- renamed modules ---


def vit():
    torch.manual_seed(0)
    sizes = {**tiny.SIZES, "image_size": 8, "patch_size": 4}
    sizes.pop("vocab_size")
    return tf.ViTForImageClassification(tf.ViTConfig(**sizes, num_labels=3)).eval()


def llava():
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 8}
    text = tf.LlamaConfig(**experts.SIZES)
    config = tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(**vision, patch_size=4), text_config=text, image_token_id=95)
    return tf.LlavaForConditionalGeneration(config).eval()


PIXELS = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))}


def test_a_vision_transformer(tmp_path):
    """Its names differ from transformers 4's in some releases only, so today's are asked for those of then."""
    base, names = vit(), FormerNames(vit())
    now = [path for path, module in base.named_modules() if isinstance(module, torch.nn.Linear) and "layer" in path]
    then = {names.former(f"{path}.weight")[0].removesuffix(".weight"): path for path in now}
    assert any(path.endswith("attention.attention.query") for path in then)
    held = experts.factors({path: experts.weight_of(base, there) for path, there in then.items()})
    held |= {"base_model.model.classifier.weight": torch.ones(3, 32), "base_model.model.classifier.bias": torch.zeros(3)}
    folder = experts.write(tmp_path, held, target_modules=["query", "key", "value", "dense"], modules_to_save=["classifier"])
    reference = vit()
    experts.change({path: experts.weight_of(reference, there) for path, there in then.items()}, held)
    with torch.no_grad():
        reference.classifier.weight.fill_(1)
        reference.classifier.bias.zero_()
    assert torch.allclose(loaded(base, folder)(**PIXELS).logits, reference(**PIXELS).logits, atol=1e-4)


@pytest.mark.parametrize("config", [ts.LoraConfig(target_modules=["query"], rank_pattern={"query": 2}), ts.LoHaConfig()])
def test_new_adapters_by_former_names(config):
    model = ts.get_peft_model(vit(), config)
    assert len(model.tree("default").adapted()) == (2 if config.target_modules else 4)
    assert model(**PIXELS).logits.requires_grad
    if config.target_modules:
        assert {adapter.lora_A.shape[0] for adapter in model.tree("default").adapted().values()} == {2}


def llava_file(folder, prefix, **fields):
    """LoRA on a language model whose layers the file keeps at `prefix`, and the logits with it."""
    base = llava()
    paths = [f"layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")]
    now = {f"{prefix}.{path}": experts.weight_of(base, f"model.language_model.{path}") for path in paths}
    held = experts.factors(now)
    experts.change(now, held)
    return experts.write(folder, held, **fields), base(**INPUTS).logits


OLD = "language_model.model"


@pytest.mark.parametrize(
    "prefix, target", [(OLD, rf"{OLD}\..*_proj"), ("model.language_model", r".*language_model.*(q|v)_proj")]
)
def test_a_vision_language_model(prefix, target, tmp_path):
    if prefix == OLD:
        target = r"language_model\.model\.layers\.\d\.self_attn\.[qv]_proj"
    folder, want = llava_file(tmp_path, prefix, target_modules=target)
    assert torch.allclose(loaded(llava(), folder)(**INPUTS).logits, want, atol=1e-5)


def test_key_mapping(tmp_path, caplog):
    folder, want = llava_file(tmp_path, "tower.decoder", target_modules=r"tower\.decoder.*_proj")
    mapping = {r"^nothing\.": "x.", r"^tower\.(decoder)\.": "model.language_model."}
    with one_error(ts.TargetError, "no module matches the regular expression"):
        loaded(llava(), folder)
    assert torch.allclose(loaded(llava(), folder, key_mapping=mapping)(**INPUTS).logits, want, atol=1e-5)
    model = loaded(llava(), folder, key_mapping=mapping)
    model.load_adapter(str(folder), "second", key_mapping=mapping)
    model.set_adapter("second")
    assert torch.allclose(model(**INPUTS).logits, want, atol=1e-5)
    model.save_pretrained(tmp_path / "now")
    with caplog.at_level(logging.WARNING):
        again = loaded(llava(), tmp_path / "now", key_mapping=mapping)
    assert torch.allclose(again(**INPUTS).logits, want, atol=1e-5)
    assert "has no effect" in caplog.text


@pytest.mark.parametrize("mapping", [{"(": "x"}, {"x": r"\2"}, {"x": 1}, ["x"], "x"])
def test_a_key_mapping_that_is_none(mapping, tmp_path):
    folder, _ = llava_file(tmp_path, OLD, target_modules=r".*q_proj")
    with one_error(ConfigError, "key_mapping"):
        loaded(llava(), folder, key_mapping=mapping)
