"""``solopo ask``: one question about a document, answered by one or several models."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_solopo.arguments import Parser
from megatron_solopo.data.hf_model import check_reach, load_model
from megatron_solopo.data.options import TokenizerOptions, add_prompt_options, add_tokenizer_options, prompt_format_of
from megatron_solopo.data.schema import Paragraph
from megatron_solopo.data.text.chat import prompt_ids
from megatron_solopo.data.text.prompt import PromptFormat
from megatron_solopo.errors import UserError
from megatron_solopo.evaluation.generation import generate
from megatron_solopo.evaluation.options import add_generation_options
from megatron_solopo.evaluation.results import folder_names


@dataclass(frozen=True)
class Answer:
    """One model's response; ``name`` is its folder, as short as is unique; ``finished`` is False where it was cut."""

    name: str
    text: str
    prompt_tokens: int
    finished: bool = True


def ask(
    models: Sequence[str | Path],
    tokenizers: Sequence[TokenizerOptions],
    document: str,
    question: str,
    prompt_format: PromptFormat,
    max_new_tokens: int = 256,
    dtype: str = "auto",
    device: str = "auto",
) -> list[Answer]:
    """Returns the answer of every model, one loaded at a time; the document is the only one, written by
    ``prompt_format``.

    Args:
        tokenizers: of each model.

    Raises:
        UserError: a folder cannot be used, or the prompt is longer than a model reaches; both are
            detected before any model is loaded.
    """
    messages = prompt_format.messages(question, [Paragraph("", document)])
    loaded = [one.load() for one in tokenizers]
    prompts = [prompt_ids(one, messages) for one in loaded]
    for folder, prompt in zip(models, prompts, strict=True):
        check_reach(folder, len(prompt), max_new_tokens, "--document")
    answers = []
    for name, folder, one, prompt in zip(folder_names(models), models, loaded, prompts, strict=True):
        [response] = generate(load_model(folder, device, dtype), one, [prompt], max_new_tokens)
        answers.append(Answer(name, response.text, len(prompt), response.finished))
    return answers


def answer_lines(answers: Sequence[Answer], width: int) -> list[str]:
    """Names on the left, answers on the right, wrapped to ``width`` columns."""
    names = [f"{answer.name} ({answer.prompt_tokens:,} prompt tokens)" for answer in answers]
    margin = max(map(len, names))
    lines = []
    for name, answer in zip(names, answers, strict=True):
        wrapped = [
            part for line in answer.text.splitlines() for part in textwrap.wrap(line, max(20, width - margin - 3))
        ] or ["(no text)"]
        if not answer.finished:
            wrapped.append("[cut at --max-new-tokens]")
        lines += [f"{name if index == 0 else '':<{margin}} | {part}" for index, part in enumerate(wrapped)]
    return lines


def build_parser() -> Parser:
    parser = Parser(
        prog="solopo ask",
        description="Ask one question over a document and show the answers of several models side by side.",
    )
    group = parser.add_argument_group("input")
    group.add_argument(
        "--model", nargs="+", required=True, metavar="DIR", help="Hugging Face folders of the models that answer"
    )
    group.add_argument(
        "--document", required=True, metavar="FILE", help="text file with the document; - reads standard input"
    )
    group.add_argument("--question", required=True, metavar="TEXT", help="question about the document")
    add_tokenizer_options(parser, required=False)
    add_prompt_options(parser, documents=False)
    add_generation_options(parser.add_argument_group("generation (the most likely token each time)"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``."""
    options = build_parser().parse_args(argv)
    if options.max_new_tokens < 1:
        raise UserError("option-value", f"--max-new-tokens {options.max_new_tokens}: must be at least 1")
    path = Path(options.document)
    if options.document != "-" and not path.is_file():
        raise UserError("file-missing", f"--document {path}: no such file; set a text file, or - for standard input")
    content = sys.stdin.buffer.read() if options.document == "-" else path.read_bytes()
    try:
        document = content.decode("utf-8-sig")  # editors may put a byte order mark there
    except UnicodeDecodeError:
        raise UserError("not-utf8", f"--document {path}: not UTF-8; convert it to plain text first") from None
    if not document.strip():
        raise UserError("data-empty", f"--document {options.document}: the document is empty")
    answers = ask(
        options.model,
        [TokenizerOptions.of(options, model) for model in options.model],
        document.strip(),
        options.question,
        prompt_format_of(options),
        options.max_new_tokens,
        options.dtype,
        options.device,
    )
    source = "standard input" if options.document == "-" else options.document
    print(f"document: {len(document.split()):,} words from {source}")
    print(f"question: {options.question}\n")
    print("\n".join(answer_lines(answers, shutil.get_terminal_size((100, 24)).columns)))
    return 0
