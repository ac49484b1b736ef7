"""Templates: conversations to text, and which part of the text is trained.

A template is written as tokenizers' chat templates are: Jinja over `messages` and `add_generation_prompt`. It is kept
beside the adapter (`tunesmith_template.json`), so that generation uses the template of the training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import AdapterFileError, ConfigError, DataError, did_you_mean
from ..storage.folder import AdapterFolder, write_folder
from .formats import Example, Message

TEMPLATE_FILE = "tunesmith_template.json"

NONE = "{% for m in messages %}{{ m.content }}{% endfor %}"
HUMAN_ASSISTANT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n\\n' }}{% endif %}"
    "{% elif m.role == 'system' %}{{ m.content + '\\n\\n' }}"
    "{% else %}{{ 'Human: ' + m.content.strip() + '\\n\\nAssistant: ' }}{% endif %}{% endfor %}"
)


def _tasks(heading: str, asked: str, task: str, given: str, answer: str) -> str:
    """A template for programming tasks: a sentence, the task, its input, the answer."""
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% elif m.role == 'user' %}"
        f"{{{{ '### {heading}:\\n{asked}\\n\\n### {task}:\\n' + (m.instruction or m.content)"
        f" + '\\n\\n### {given}:\\n' + (m.input or '') + '\\n\\n### {answer}:\\n' }}}}"
        "{% endif %}{% endfor %}"
    )


BUILT_IN = {
    "none": NONE,
    "human-assistant": HUMAN_ASSISTANT,
    "instruction": _tasks(
        "Instruction",
        "Use the Task below and the Input given to write the Response, which solves the Task:",
        "Task", "Input", "Response",
    ),
    "instruccion": _tasks(
        "Instrucción",
        "Utiliza la siguiente Tarea y la Entrada dada para escribir la Respuesta, "
        "que es un código de programación que puede resolver la siguiente Tarea:",
        "Tarea", "Entrada", "Respuesta",
    ),
}  # fmt: skip


class Piece(NamedTuple):
    """A stretch of text, and whether its tokens are trained."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Template:
    """How conversations are written.

    Args:
        name: one of `BUILT_IN`, "chat" (the tokenizer's own), or the file that it came from.
        source: Jinja over `messages` and `add_generation_prompt`.
    """

    name: str = "none"
    source: str = NONE

    def write(self, messages: Sequence[Message], tokenizer: Any, answer_next: bool = False) -> str:
        """The text of a conversation; with `answer_next` up to where the assistant continues.

        Raises:
            ConfigError: the template is not valid Jinja.
            DataError: the template refuses the conversation.
        """
        from jinja2 import TemplateError, TemplateSyntaxError

        if not messages:
            return ""
        try:
            text = tokenizer.apply_chat_template(
                list(messages), chat_template=self.source, tokenize=False, add_generation_prompt=answer_next
            )
        except TemplateSyntaxError as error:
            raise ConfigError(f'template "{self.name}", line {error.lineno}: {error.message}') from error
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f'template "{self.name}" cannot render this conversation: {error}') from error
        return str(text)

    def pieces(self, example: Example, tokenizer: Any, completion_only: bool = True) -> list[Piece]:
        """The text of an example in pieces; each answer of the assistant is a trained one.

        Raises:
            DataError: the template refuses the conversation, or renders its start differently once it continues.
        """
        try:
            whole = self.write(example.messages, tokenizer)
            if not completion_only:
                return [Piece(whole, True)]
            pieces, done = [], 0
            for number, message in enumerate(example.messages):
                if message["role"] != "assistant":
                    continue
                before = self.write(example.messages[:number], tokenizer, answer_next=True)
                start, end = self._span(whole, before, self.write(example.messages[: number + 1], tokenizer), message)
                pieces += [Piece(whole[done:start], False), Piece(whole[start:end], True)]
                done = end
            return [piece for piece in [*pieces, Piece(whole[done:], False)] if piece.text]
        except DataError as error:
            raise DataError(f"{example.where}: {error}") from error

    def _span(self, whole: str, before: str, after: str, message: Message) -> tuple[int, int]:
        """Where an answer starts and ends in the whole text, its end-of-turn mark included."""
        if not whole.startswith(before):
            raise DataError(
                f'template "{self.name}" renders the start of a conversation differently once it is answered, so '
                "the answer cannot be separated from the question; train on the whole text (--no-completion-only-loss) or use "
                "another --template"
            )
        # Between turns a template may write what it omits at the end; what both share belongs to the answer.
        shared = next((i for i, (a, b) in enumerate(zip(whole, after)) if a != b), min(len(whole), len(after)))
        end = max(shared, len(before) + len(message["content"].strip()))
        return len(before), min(end, len(whole))

    def save(self, folder: str | Path) -> None:
        """Write the template beside an adapter, whole or not at all."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        write_folder(folder, {TEMPLATE_FILE: lambda path: path.write_text(text, encoding="utf-8")})

    @classmethod
    def of_adapter(cls, name_or_path: str) -> Template | None:
        """The template kept beside an adapter; None where there is none.

        Raises:
            AdapterFileError: its file is damaged.
        """
        path = AdapterFolder.find(name_or_path).locate(TEMPLATE_FILE)
        if path is None:
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(str(values["name"]), str(values["source"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AdapterFileError(
                f"{path} is not a valid template ({error!r}); save the adapter again, or delete the file"
            ) from error


def chosen(wanted: str | None, format: str, tokenizer: Any) -> Template:
    """The template of a training job.

    Args:
        wanted: a name of `BUILT_IN`, "chat", the path of a Jinja file; None takes what suits the format of the data.

    Raises:
        ConfigError: there is no such template, or the tokenizer has none of its own.
    """
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    if wanted is None:
        verbatim = format in ("text", "prompt-completion")
        wanted = "none" if verbatim else "chat" if own else "human-assistant"
    if wanted == "chat":
        if own is None:
            raise ConfigError(f"this base's tokenizer has no chat template; use --template {', '.join(BUILT_IN)} or a file")
        return Template("chat", own)
    if wanted in BUILT_IN:
        return Template(wanted, BUILT_IN[wanted])
    path = Path(wanted)
    if not path.is_file():
        names = ["chat", *BUILT_IN]
        raise ConfigError(
            f'template "{wanted}" is neither built in ({", ".join(names)}) nor a file{did_you_mean(wanted, names)}'
        )
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a template ({error})") from error
    if "messages" not in source:
        raise ConfigError(f"{path} does not mention `messages`; write it as a chat template: {{% for m in messages %}}...")
    return Template(path.name, source)
