"""Templates and labels: what of a conversation is trained, and that generation meets what was trained."""

from __future__ import annotations

import pytest

from tunesmith import AdapterFileError, ConfigError, DataError, load_tokenizer
from tunesmith.data.encode import encode, encode_row, encode_text
from tunesmith.data.formats import Example
from tunesmith.data.templates import BUILT_IN, TEMPLATE_FILE, Piece, Template, chosen
from tunesmith.labels import IGNORED

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ASK = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1."}]
TALK = [
    {"role": "system", "content": "Be brief."},
    *ASK,
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("sprout")


def example(messages, where="rows.json:1"):
    return Example(where, messages)


def trained(pieces):
    return [piece.text for piece in pieces if piece.trained]


# --- templates --------------------------------------------------------------------------------------------------------


def test_the_form_of_the_chinese_article(tokenizer):
    row = {"instruction": "Name three tips.", "input": "", "output": "Eat, sleep, run."}
    asked = "\n".join(["Human: " + row["instruction"], row["input"]]).strip() + "\n\nAssistant: "  # as the article builds it
    messages = [{"role": "user", "content": "Name three tips."}, {"role": "assistant", "content": row["output"]}]
    pieces = Template("human-assistant", BUILT_IN["human-assistant"]).pieces(example(messages), tokenizer)
    assert pieces == [Piece(asked, False), Piece(row["output"], True)]
    ids, labels = encode_row(pieces, tokenizer)
    question, answer = tokenizer(asked)["input_ids"], tokenizer(row["output"] + tokenizer.eos_token)["input_ids"]
    assert ids == question + answer and labels == [IGNORED] * len(question) + answer


def test_the_form_of_the_spanish_article(tokenizer):
    user = {"role": "user", "content": "Suma.\n1 y 2", "instruction": "Suma.", "input": "1 y 2"}
    pieces = chosen("instruccion", "alpaca", tokenizer).pieces(
        example([user, {"role": "assistant", "content": "3"}]), tokenizer
    )
    assert [piece.trained for piece in pieces] == [False, True] and pieces[1].text == "3"
    assert pieces[0].text.startswith("### Instrucción:\nUtiliza la siguiente Tarea")
    assert pieces[0].text.endswith("### Tarea:\nSuma.\n\n### Entrada:\n1 y 2\n\n### Respuesta:\n")


@pytest.mark.parametrize("source", [CHATML, *BUILT_IN.values()], ids=["chat", *BUILT_IN])
@pytest.mark.parametrize("messages", [ASK, TALK], ids=["one", "several"])
def test_each_answer_is_trained_and_nothing_else(source, messages, tokenizer):
    template = Template("any", source)
    pieces = template.pieces(example(messages), tokenizer)
    assert "".join(piece.text for piece in pieces) == template.write(messages, tokenizer)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert len(trained(pieces)) == len(answers)
    for text, answer in zip(trained(pieces), answers):
        assert text.startswith(answer) and text.removeprefix(answer).strip() in ("", "<|im_end|>")


@pytest.mark.parametrize("source", [CHATML, *BUILT_IN.values()], ids=["chat", *BUILT_IN])
def test_generation_starts_from_the_tokens_that_training_had(source, tokenizer):
    template = Template("any", source)
    ids, labels = encode_row(template.pieces(example(ASK), tokenizer), tokenizer)
    asked = encode_text(template.write(ASK[:1], tokenizer, answer_next=True), tokenizer)
    first = next(place for place, label in enumerate(labels) if label != IGNORED)
    assert ids[:first] == asked
    assert tokenizer.eos_token_id in labels, "the model is never told to stop"


def test_everything_is_trained_when_asked_for(tokenizer):
    pieces = Template("any", CHATML).pieces(example(ASK), tokenizer, completion_only=False)
    ids, labels = encode_row(pieces, tokenizer)
    assert ids == labels


def test_a_template_that_rewrites_what_was_said_is_refused(tokenizer):
    forgets = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"rows.json:1: .*differently once it is answered.*--no-completion-only-loss"):
        Template("forgets", forgets).pieces(example(ASK), tokenizer)


def test_a_template_may_refuse_a_conversation(tokenizer):
    refuses = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match=r"rows.json:1: .*no system here"):
        Template("refuses", refuses).pieces(example(TALK), tokenizer)
    with pytest.raises(ConfigError, match='template "broken", line 1'):
        Template("broken", "{% for m in messages %}").pieces(example(ASK), tokenizer)


def test_a_template_cannot_reach_out_of_its_text(tokenizer):
    reaches = "{{ messages.__class__.__base__.__subclasses__() }}"
    with pytest.raises(DataError, match="unsafe"):
        Template("reaches", reaches).pieces(example(ASK), tokenizer)


def test_what_is_taken_where_none_is_named(tokenizer):
    assert chosen(None, "text", tokenizer).name == chosen(None, "prompt-completion", tokenizer).name == "none"
    assert chosen(None, "alpaca", tokenizer).name == "human-assistant"
    with pytest.raises(ConfigError, match="has no chat template"):
        chosen("chat", "alpaca", tokenizer)
    with_chat = load_tokenizer("sprout")
    with_chat.chat_template = CHATML
    assert chosen(None, "alpaca", with_chat) == chosen("chat", "text", with_chat) == Template("chat", CHATML)


def test_a_template_of_ones_own(tokenizer, tmp_path):
    path = tmp_path / "mine.jinja"
    turns = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    path.write_text(turns + "{% if add_generation_prompt %}[assistant] {% endif %}")
    mine = chosen(str(path), "alpaca", tokenizer)
    assert mine.name == "mine.jinja" and [text.strip() for text in trained(mine.pieces(example(ASK), tokenizer))] == ["1."]
    path.write_text("Question: {{ question }}")
    with pytest.raises(ConfigError, match="does not mention `messages`"):
        chosen(str(path), "alpaca", tokenizer)
    with pytest.raises(ConfigError, match=r"neither built in .* nor a file; did you mean 'instruction'"):
        chosen("instructin", "alpaca", tokenizer)


def test_a_template_is_kept_beside_its_adapter(tmp_path):
    Template("mine", CHATML).save(tmp_path)
    assert Template.of_adapter(str(tmp_path)) == Template("mine", CHATML)
    (tmp_path / TEMPLATE_FILE).write_text('{"name": "mine"}')
    with pytest.raises(AdapterFileError, match="is not a valid template"):
        Template.of_adapter(str(tmp_path))
    (tmp_path / TEMPLATE_FILE).unlink()
    assert Template.of_adapter(str(tmp_path)) is None


# --- ids and labels ---------------------------------------------------------------------------------------------------


def test_cut_rows_are_counted_and_those_without_an_answer_left_out(tokenizer):
    rows = [[Piece("a question of some length", False), Piece("yes", True)], [Piece("plain text, cut", True)]]
    length = len(tokenizer("a question of some length")["input_ids"])
    found = encode(rows, tokenizer, max_length=3)
    assert (found.cut, found.empty, len(found.examples)) == (2, 1, 1) and length > 3
    assert found.lengths[0] == length + len(tokenizer("yes")["input_ids"]) + 1


def test_a_beginning_token_comes_once():
    class Tokenizer:
        bos_token_id, eos_token_id = 7, 8

        def __call__(self, text, add_special_tokens=True):
            ids = [7 if part == "<s>" else len(part) + 10 for part in text.split()]
            return {"input_ids": [7, *ids] if add_special_tokens else ids}

    assert encode_text("one two", Tokenizer()) == encode_text("<s> one two", Tokenizer()) == [7, 13, 13]
    assert encode_row([Piece("one ", False), Piece("two", True)], Tokenizer()) == ([7, 13, 13, 8], [IGNORED, IGNORED, 13, 8])
