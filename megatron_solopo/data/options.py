"""Options that several commands share, and the objects that are built from them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_solopo import template_kwargs
from megatron_solopo.atomic import check_place
from megatron_solopo.data.files.records import is_parquet, read_text
from megatron_solopo.data.memory import release_freed_memory
from megatron_solopo.data.scoring import NORMALISATIONS
from megatron_solopo.data.text import prompt
from megatron_solopo.data.text.prompt import PromptFormat
from megatron_solopo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_option(flag: str, value: str) -> str:
    r"""Reads the value of an option: a text (``\n`` and ``\t`` are line break and tab) or ``@FILE``.

    One line break at the end of the file is not part of the text.
    """
    if not value.startswith("@"):
        return value.replace("\\n", "\n").replace("\\t", "\t")
    path = Path(value[1:])
    if not path.is_file():
        raise UserError("file-missing", f"{flag} {value}: no such file; set @FILE or the text itself")
    return read_text(flag, path).removesuffix("\n")


TEXTS = ("--document-template", "--document-separator", "--prompt-template", "--system-prompt")
"""Options whose value is a text or ``@FILE``."""


FOLDERS = ("model", "tokenizer", "evidence_model")
"""Names of options whose value is a Hugging Face folder, or a model of a server."""


def files_of(options: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Returns (option, path) of the files and folders in the options of model, tokenizer and prompt, for
    `check_outputs`."""
    texts = {flag: getattr(options, flag[2:].replace("-", "_"), None) for flag in TEXTS}
    files: list[tuple[str, str | None]] = [
        (flag, text[1:]) for flag, text in texts.items() if text and text.startswith("@")
    ]
    folders = [(f"--{name.replace('_', '-')}", getattr(options, name, None)) for name in FOLDERS]
    return [*files, ("--chat-template", getattr(options, "chat_template", None)), *folders]


def check_outputs(
    outputs: Iterable[tuple[str, str | Path | None]], read: Iterable[tuple[str, str | Path | None]]
) -> None:
    """Checks, before any work, that outputs can be written and would not replace an input or another output.

    Args:
        outputs: (option, path) of the files to write; None for an option that is not set.
        read: (option, path) of the files and folders to read; None and paths that do not exist are ignored.

    Raises:
        UserError: an output is a folder, is below a file or in a folder to read, is the path of another option, or is a
            file that a folder to read links to (the hub's cache links the files of a model).
    """
    folders, taken = [], []
    for flag, name in read:
        if name is not None and Path(name).exists():
            (folders if Path(name).is_dir() else taken).append((flag, Path(name)))
    for flag, output in outputs:
        if output is None:
            continue
        path = Path(output)
        if path.is_dir():
            raise UserError("not-a-file", f"{flag} {output}: is a folder; set the name of a file")
        for other, name in taken:
            if path.resolve() == name.resolve() or (path.exists() and name.exists() and path.samefile(name)):
                raise UserError("file-overlap", f"{flag} {output}: is the file of {other} too; choose another name")
        for other, name in folders:
            if name.resolve() in path.resolve().parents:
                raise UserError(
                    "folder-overlap",
                    f"{flag} {output}: lies in {other} {name}, which is read; choose a place outside that folder",
                )
            if path.exists() and any(path.samefile(file) for file in name.iterdir() if file.exists()):
                raise UserError(
                    "file-overlap",
                    f"{flag} {output}: is a file of {other} {name} too, which is read; choose another name",
                )
        check_place(flag, path)
        taken.append((flag, path))


def add_normalisation_option(group: argparse._ArgumentGroup, default: str | None = None) -> None:
    """Adds ``--normalisation``, the form in which texts are compared with answers (`scoring.NORMALISATIONS`)."""
    group.add_argument(
        "--normalisation",
        choices=sorted(NORMALISATIONS),
        default=default,
        help="how sub_em, em and f1 compare texts: without case, ASCII punctuation and articles (squad), and before "
        "that with Unicode's spellings of one text folded (NFKC, quotes, dashes) (unicode) (default: unicode)",
    )


def check_jsonl(flag: str, path: str | None) -> None:
    """Refuses the suffix of Parquet for a file that is written as JSONL: readers choose the format by the suffix."""
    if path is not None and is_parquet(path):
        raise UserError(
            "file-suffix", f"{flag} {path}: is written as JSONL; choose a name that does not end in .parquet"
        )


def add_tokenizer_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds the options of every command with a tokenizer; if it is not required, the model's is the default."""
    group = parser.add_argument_group("tokenizer" + ("; training needs the same" if required else ""))
    group.add_argument(
        "--tokenizer",
        required=required,
        metavar="DIR",
        help="Hugging Face folder" + (" of the model to train" if required else " (default: the model's)"),
    )
    group.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja chat template to use instead of the tokenizer's (required if it has none)",
    )
    group.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help="""values for variables of the chat template, such as '{"enable_thinking": false}' (default: those of """
        "the folder's tokenizer_config.json, which a training run with this option writes)",
    )
    group.add_argument(
        template_kwargs.DATE_FLAG,
        metavar="YYYY-MM-DD",
        help="date in the prompts of a chat template that prints the date (default: that of the unfinished work, of "
        "the folder, or of the data that is read, else today)",
    )
    group.add_argument(
        "--eos-token",
        metavar="TOKEN",
        help="token that ends a turn (default: the one that the chat template writes there)",
    )
    if required:  # a model that generates has embeddings only for its tokenizer's tokens
        group.add_argument("--add-special-tokens", metavar="TOKEN,...", help="special tokens to add to the tokenizer")


@dataclass(frozen=True)
class TokenizerOptions:
    """Values of the options of `add_tokenizer_options`."""

    folder: str
    chat_template: str | None = None
    eos_token: str | None = None
    chat_template_kwargs: str | None = None
    added_tokens: str | None = None
    chat_template_date: str | None = None

    @classmethod
    def of(cls, options: argparse.Namespace, folder: str = "") -> TokenizerOptions:
        """Returns the values of a command line; ``folder`` is the default of --tokenizer."""
        return cls(
            options.tokenizer or folder,
            options.chat_template,
            options.eos_token,
            options.chat_template_kwargs,
            getattr(options, "add_special_tokens", None),
            options.chat_template_date,
        )

    def load(self, of_resumed: str | None = None, of_data: str | None = None) -> PreTrainedTokenizerBase:
        """See `chat.load_tokenizer`."""
        from megatron_solopo.data.text.chat import load_tokenizer  # with transformers and torch, which take 3 s

        tokenizer = load_tokenizer(
            self.folder,
            self.chat_template,
            self.eos_token,
            self.chat_template_kwargs,
            self.added_tokens,
            self.chat_template_date,
            of_resumed,
            of_data,
        )
        release_freed_memory()
        return tokenizer

    def dated(self, tokenizer: PreTrainedTokenizerBase) -> TokenizerOptions:
        """Returns the same options with the date that ``tokenizer`` prints, which is not today's after midnight."""
        return dataclasses.replace(self, chat_template_date=template_kwargs.date_of(tokenizer))


def add_prompt_options(parser: argparse.ArgumentParser, documents: bool = True) -> None:
    """Adds the options of `prompt_format_of`; ``documents=False``: the prompt has one document, unformatted."""
    group = parser.add_argument_group(r"prompt (each is a text, in which \n is a line break, or @FILE)")
    if documents:
        group.add_argument(
            "--document-template",
            default=prompt.DEFAULT_DOCUMENT_TEMPLATE,
            metavar="TEXT",
            help="text of a document, with {number}, {title}, {text} (default: %(default)r)",
        )
        group.add_argument(
            "--document-separator",
            default=prompt.DEFAULT_DOCUMENT_SEPARATOR,
            metavar="TEXT",
            help="text between documents (default: %(default)r)",
        )
    else:
        parser.set_defaults(document_template="{text}", document_separator="")
    group.add_argument(
        "--prompt-template",
        default=prompt.DEFAULT_PROMPT_TEMPLATE,
        metavar="TEXT",
        help="the user message, with {documents} and {question} (default: asks for a short chain of thought, "
        "then the answer)",
    )
    group.add_argument(
        "--system-prompt",
        metavar="TEXT",
        help="system message before the user message (default: that of the chat template, if it has one)",
    )


def prompt_format_of(options: argparse.Namespace) -> PromptFormat:
    """Returns the prompt format of the options of `add_prompt_options`."""
    return PromptFormat(
        document_template=text_option("--document-template", options.document_template),
        document_separator=text_option("--document-separator", options.document_separator),
        prompt_template=text_option("--prompt-template", options.prompt_template),
        system_prompt=text_option("--system-prompt", options.system_prompt) if options.system_prompt else None,
    )
