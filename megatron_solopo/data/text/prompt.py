"""How documents and a question become a chat."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_solopo.data.schema import DocumentSpan, Message, Paragraph
from megatron_solopo.errors import UserError

DEFAULT_DOCUMENT_TEMPLATE = "Document {number}: {title}\n{text}"
DEFAULT_DOCUMENT_SEPARATOR = "\n\n"
DEFAULT_PROMPT_TEMPLATE = (
    "Answer the question from the documents below. Most of them have nothing to do with it.\n\n"
    "{documents}\n\n"
    "Question: {question}\n\n"
    "First reason step by step in a few short sentences, naming the facts you use. "
    'Then end with one line that starts with "Answer:" and gives the answer in as few words as possible.'
)


@dataclass(frozen=True)
class PromptFormat:
    """How paragraphs and a question become a chat.

    In the document template ``{number}`` (from 1), ``{title}`` and ``{text}`` are replaced, in the prompt
    template ``{documents}`` and ``{question}``; other braces stay as they are. A document without a title is written
    without ``{title}``, without a colon, dash or bar beside it, and without its line if nothing else is there.

    Raises:
        UserError: a template lacks a required placeholder, or has ``{documents}`` twice.
    """

    document_template: str = DEFAULT_DOCUMENT_TEMPLATE
    document_separator: str = DEFAULT_DOCUMENT_SEPARATOR
    prompt_template: str = DEFAULT_PROMPT_TEMPLATE
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        for flag, template, needed in (
            ("--document-template", self.document_template, ("text",)),
            ("--prompt-template", self.prompt_template, ("documents", "question")),
        ):
            for name in needed:
                if f"{{{name}}}" not in template:
                    raise UserError(
                        "template-placeholder",
                        f"{flag}: the template has no {{{name}}}; put it where the {name} belongs",
                    )
        if self.prompt_template.count("{documents}") > 1:
            raise UserError(
                "template-placeholder",
                "--prompt-template: the template has {documents} more than once; keep one of them",
            )

    def document(self, paragraph: Paragraph, number: int) -> str:
        template = self.document_template if paragraph.title.strip() else _TITLE.sub("", self.document_template)
        return _replace(template, number=str(number), title=paragraph.title, text=paragraph.text)

    def messages(self, question: str, paragraphs: Sequence[Paragraph]) -> list[Message]:
        """Returns the chat that asks ``question`` about ``paragraphs``, in their order; the user's message is last."""
        return self.messages_and_spans(question, paragraphs)[0]

    def messages_and_spans(
        self, question: str, paragraphs: Sequence[Paragraph]
    ) -> tuple[list[Message], list[DocumentSpan]]:
        """Returns the chat, and the span of each paragraph's document in the last message with its gold mark."""
        before, _, after = self.prompt_template.partition("{documents}")
        content = [_replace(before, question=question)]
        position = len(content[0])
        spans = []
        for number, paragraph in enumerate(paragraphs, 1):
            if number > 1:
                content.append(self.document_separator)
                position += len(self.document_separator)
            document = self.document(paragraph, number)
            content.append(document)
            spans.append((position, position + len(document), paragraph.is_supporting))
            position += len(document)
        content.append(_replace(after, question=question))
        chat = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*chat, {"role": "user", "content": "".join(content)}], spans


_TITLE = re.compile(
    r"^\{title\}[ \t]*[:|\u2013\u2014-]?[ \t]*\n?|[ \t]*[:|\u2013\u2014-]?[ \t]*\{title\}", re.MULTILINE
)
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def _replace(template: str, **values: str) -> str:
    """Replaces placeholders in one pass, so that braces inside a value are never read as a placeholder."""
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)
