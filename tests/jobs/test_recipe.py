"""Settings from defaults, recipe, environment and flags."""

from __future__ import annotations

import pytest

from tunesmith import ConfigError
from tunesmith.jobs.recipe import as_yaml, read_recipe, resolve
from tunesmith.jobs.settings import Settings


@pytest.fixture
def recipe(tmp_path):
    def write(text: str):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_later_places_win(recipe):
    path = recipe("learning_rate: 1e-1\nseed: 1\nlora_r: 4\nmax_length: 64\n")
    environment = {"TUNESMITH_SEED": "2", "TUNESMITH_LORA_R": "5", "HOME": "/", "TUNESMITH_MAX_LENGTH": "32"}
    found = resolve(path, environment, {"lora_r": "6"})
    assert found.values == {"learning_rate": 0.1, "seed": 2, "lora_r": 6, "max_length": 32} and not found.warnings


def test_values_become_what_their_fields_hold(recipe):
    path = recipe(
        "learning_rate: 1e-4\npacking: no\nlora_target_modules: [q_proj, v_proj]\ncolumns: {instruction: question}\n"
        "options: {r: 3, use_dora: true}\nepochs: 2\nmodel_name_or_path: sprout\ndataset: a.csv\ntext-column: 5\n"
    )
    assert resolve(path, {}, {"options": ["bias=all", 'target-modules=["a","b"],init=x,y']}).values == {
        "learning_rate": 1e-4, "packing": False, "lora_target_modules": "q_proj,v_proj", "columns": {"instruction": "question"},
        "options": {"r": 3, "use_dora": True, "bias": "all", "target_modules": ["a", "b"], "init": "x,y"},
        "num_train_epochs": 2.0, "base": "sprout", "data": "a.csv", "text_column": "5",
    }  # fmt: skip


def test_a_null_leaves_the_default(recipe):
    assert resolve(recipe("learning_rate: null\nseed:\n"), {}, {"seed": None}).values == {}


def test_old_names_are_taken_with_a_warning(recipe):
    path = recipe("warmup_ratio: 0.03\ngroup_by_length: true\nevaluation_strategy: steps\ntrain_on_inputs: true\n")
    found = resolve(path, {}, {})
    assert found.values == {"warmup_steps": 0.03, "eval_strategy": "steps", "completion_only_loss": False}
    assert len(found.warnings) == 4 and "warmup_ratio is called warmup_steps here" in found.warnings[0]
    assert "group_by_length has no effect here: rows of similar lengths" in found.warnings[1]


def test_all_faults_are_told_at_once(recipe):
    path = recipe("learning_rat: 1e-4\nlora_r: four\npacking: maybe\nseed: 1.5\n")
    with pytest.raises(ConfigError) as error:
        resolve(path, {"TUNESMITH_LEARNING_RATES": "1"}, {"max_length": "long"})
    for words in (
        "6 settings are invalid", f"{path}: learning_rat is not a setting; did you mean 'learning_rate'",
        "'four' is not a number", "packing='maybe' is neither true nor false", "seed=1.5 is not a whole number",
        "TUNESMITH_LEARNING_RATES is not a setting", "--max-length='long' is not a number",
    ):  # fmt: skip
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: [", "malformed yaml"),
        ("- a\n- b\n", "holds a list"),
        ("seed: 1\nlora_r: 2\nseed: 3\n", 'recipe.yaml:3: "seed" appears twice .first on line 1'),
        ("just words", "holds a str"),
    ],
)
def test_a_recipe_that_is_none(text, words, recipe):
    with pytest.raises(ConfigError, match=words):
        read_recipe(recipe(text))


def test_one_setting_under_two_names_is_refused(recipe):
    with pytest.raises(ConfigError, match="given twice"):
        resolve(recipe("epochs: 1\nnum_train_epochs: 2\n"), {}, {})


def test_what_is_written_is_what_is_read(recipe):
    settings = Settings("lora", lora_r=3, options={"use_dora": True}, columns={"instruction": "frage"}, packing=False)
    path = recipe(as_yaml(settings))
    again = Settings(**resolve(path, {}, {}).values)
    assert again == Settings(**{**vars(settings), "learning_rate": settings.rate})


def test_warmup_is_steps_or_a_share_of_them():
    assert [Settings(warmup_steps=value).warmup(200) for value in (None, 0, 0.03, 50)] == [10, 0, 6, 50]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_steps": 0}, "max_steps=0 must be above 0, or -1"),
        ({"lr_scheduler_type": "cosin"}, "did you mean 'cosine'"),
        ({"warmup_steps": -1}, "at least 0"),
        ({"save_steps": 0}, "save_steps=0 must be above 0"),
        ({"gradient_accumulation_steps": 0}, "above 0"),
    ],
)
def test_values_are_checked_when_made(values, words):
    with pytest.raises(ConfigError, match=words):
        Settings(**values)
