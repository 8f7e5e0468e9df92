"""The quickstart's data: short plain-English facts about invented entities, and a tokenizer of their words.

A document is one fact, "They gave Dorin lanterns."; a question asks for one of them, "What did they give Dorin?".
Every item draws new facts, so that nothing can be memorized: the answer is in the documents
or nowhere. Questions come in MuSiQue's JSONL format; conversations for ``--objective sft`` first repeat
random words (which is how a small transformer comes to copy from its context), then look facts up.

    python examples/quickstart/facts.py --output runs/demo/data --seed 0
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_solopo.arguments import Parser
from megatron_solopo.atomic import folder_aside, put_folder
from megatron_solopo.data.files.records import write_jsonl
from megatron_solopo.data.schema import Conversation
from megatron_solopo.errors import UserError

ENTITIES = tuple(
    first + second
    for first, second in product("Do Ve Ka Mi Ta Lu Sa Be Ro Ni Ga Fe".split(), "rin lka mo ven dal ris nu tor".split())
)

# (verb in a fact, verb in a question)
VERBS = (
    ("gave", "give"),
    ("sent", "send"),
    ("sold", "sell"),
    ("showed", "show"),
    ("lent", "lend"),
    ("made", "make"),
    ("brought", "bring"),
    ("bought", "buy"),
)

# One token each, and none is part of another: sub-EM counts substrings.
THINGS = tuple(
    """
    anchors apples arrows baskets bells benches bottles boxes bridges brooms candles carts chairs clocks coins combs
    crowns drums eagles feathers ferries flags flutes foxes gates gloves hammers harps herons horses jars keys
    kites ladders lanterns lemons looms maps masks melons mirrors needles onions orchids owls pearls pillows plates
    ponies puppets ribbons ropes saddles sails scarves shells shovels spoons stamps swords tables tents towers violins
    """.split()
)

CLOSINGS = ("", " indeed", " surely", " certainly", " clearly", " exactly", " naturally", " obviously")
"""What an answer may end with, so that a question has several right responses (``--wordings``)."""

SPECIAL_TOKENS = ("<pad>", "<unk>", "<end>")
OTHER_WORDS = ("They", "What", "did", "they")

# A fact ends with "... Dorin lanterns" and a question with "... Dorin", right before its answer: to look a fact up
# is then to find what followed the last word before, which is what the echoes teach. Markers between the turns would
# make the same step many times slower to learn for a model of this size, so only an answer's end is marked.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %} {% endif %}{{ message.content }}"
    "{% if message.role == 'assistant' %}<end>{% endif %}"
    "{% endfor %}"
)

BATCH = 32
"""Conversations a training step of the base."""

# One question in four is asked only in the evaluation set; as a mere fact it may occur anywhere.
EVALUATION_SHARE = 4


@dataclass(frozen=True)
class Fact:
    """``entity`` and ``thing`` are words; ``verb`` is an index into VERBS."""

    entity: str
    verb: int
    thing: str

    @property
    def text(self) -> str:
        return f"They {VERBS[self.verb][0]} {self.entity} {self.thing}."

    @property
    def question(self) -> str:
        return f"What did they {VERBS[self.verb][1]} {self.entity}?"

    @property
    def held_out(self) -> bool:
        """Whether this question belongs to the evaluation set; every entity and every verb occurs on both sides."""
        return (ENTITIES.index(self.entity) + self.verb) % EVALUATION_SHARE == 0


def draw_facts(random_: random.Random, count: int) -> list[Fact]:
    """A world of ``count`` facts, one for each of as many entities, in random order; things may repeat.

    Raises:
        UserError: more facts than entities.
    """
    if count > len(ENTITIES):
        raise UserError(
            "option-value",
            f"--paragraphs {count}: there are {len(ENTITIES)} entities with one fact each; "
            f"ask for {len(ENTITIES)} or fewer",
        )
    return [
        Fact(entity, random_.randrange(len(VERBS)), random_.choice(THINGS))
        for entity in random_.sample(ENTITIES, count)
    ]


def question_item(random_: random.Random, identifier: str, paragraphs: int, held_out: bool) -> dict[str, Any]:
    """One question over ``paragraphs`` facts, in MuSiQue's format; its supporting paragraph is at any place."""
    while True:
        facts = draw_facts(random_, paragraphs)
        asked = [index for index, fact in enumerate(facts) if fact.held_out == held_out]
        if asked:
            break
    gold = random_.choice(asked)
    return {
        "id": identifier,
        "question": facts[gold].question,
        "answer": facts[gold].thing,
        "answer_aliases": [],
        "paragraphs": [
            {"idx": index, "title": fact.entity, "paragraph_text": fact.text, "is_supporting": index == gold}
            for index, fact in enumerate(facts)
        ],
    }


def lookup_conversation(
    random_: random.Random, identifier: str, facts: int, questions: int, wordings: int = 1
) -> Conversation:
    """``questions`` turns about ``facts`` facts; the first user turn holds the facts. Held-out questions are not asked.

    Fewer turns where the facts allow fewer, but at least one. An answer is worded in one of ``wordings`` ways.
    """
    while True:
        world = draw_facts(random_, facts)
        allowed = [fact for fact in world if not fact.held_out]
        if allowed:
            break
    asked = random_.sample(allowed, min(questions, len(allowed)))
    messages = []
    for fact in asked:
        answer = fact.thing + (random_.choice(CLOSINGS[:wordings]) if wordings > 1 else "")
        messages += [{"role": "user", "content": fact.question}, {"role": "assistant", "content": answer}]
    messages[0]["content"] = " ".join(fact.text for fact in world) + " " + messages[0]["content"]
    return Conversation(identifier, messages)


def echo_conversation(random_: random.Random, identifier: str, words: int) -> Conversation:
    """A run of distinct random words, repeated twice by the assistant, each time from a random place on and around.

    The shift differs each time, so the words can be located by what precedes them, not by a fixed distance.
    """
    run = random_.sample(content_words(), words)
    echoes: list[str] = []
    for shift in (random_.randrange(1, words), random_.randrange(1, words)):
        echoes += run[shift:] + run[:shift]
    return Conversation(
        identifier,
        [
            {"role": "user", "content": " ".join(run)},
            {"role": "assistant", "content": " ".join(echoes)},
        ],
    )


def content_words() -> list[str]:
    return [*ENTITIES, *(word for verb in VERBS for word in verb), *THINGS]


def curriculum(
    random_: random.Random,
    echoes: int,
    lookups: int,
    echo_words: tuple[int, int] = (6, 24),
    lookup_facts: tuple[int, int] = (4, 8),
    questions: int = 4,
    wordings: int = 1,
) -> Iterator[Conversation]:
    """The conversations of the base model, in order of training: ``echoes``, then ``lookups``; ranges are inclusive.

    Conversations of one batch (`BATCH` in a row) have one length: a batch of mixed lengths took many times longer
    to make this small model copy by content.
    """
    for index in range(echoes):
        if index % BATCH == 0:
            words = random_.randint(*echo_words)
        yield echo_conversation(random_, f"echo-{index}", words)
    for index in range(lookups):
        if index % BATCH == 0:
            facts = random_.randint(*lookup_facts)
        yield lookup_conversation(random_, f"lookup-{index}", facts, questions, wordings)


def write_tokenizer(folder: str | Path, max_length: int = 2048, wordings: int = 1) -> int:
    """Writes a word-level tokenizer in Hugging Face's format; returns the size of its vocabulary.

    Words are split at white space; punctuation is left out, so that a fact is four tokens.
    """
    folder = Path(folder)
    closings = [closing.strip() for closing in CLOSINGS[1:wordings]]
    words = [*SPECIAL_TOKENS, *OTHER_WORDS, *content_words(), *closings]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(behavior="removed"), pre_tokenizers.WhitespaceSplit()]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")  # joins with spaces
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "eos_token": "<end>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    aside = folder_aside(folder)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tokenizer.save(str(aside / "tokenizer.json"))
    (aside / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    put_folder(aside, folder)
    return len(vocabulary)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder for train.jsonl, eval.jsonl, conversations.jsonl, conversations_valid.jsonl and tokenizer/",
    )
    output.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed; the same seed writes the same files, byte for byte (default: 0)",
    )
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--train-questions", type=int, default=2560, metavar="N")
    sizes.add_argument(
        "--eval-questions",
        type=int,
        default=256,
        metavar="N",
        help="questions that occur in no other file (default: 256)",
    )
    sizes.add_argument("--paragraphs", type=int, default=64, metavar="N", help="facts an item")
    sizes.add_argument("--echoes", type=int, default=11200, metavar="N", help="conversations that repeat random words")
    sizes.add_argument("--lookups", type=int, default=640, metavar="N", help="conversations that look facts up")
    sizes.add_argument(
        "--valid-conversations", type=int, default=256, metavar="N", help="held back from training, lookups only"
    )
    sizes.add_argument(
        "--wordings",
        type=int,
        default=1,
        metavar="N",
        help=f"ways to word an answer: the thing, or the thing and one of N - 1 closing words; at most {len(CLOSINGS)}",
    )
    args = parser.parse_args(argv)
    if not 1 <= args.wordings <= len(CLOSINGS):
        raise UserError("option-value", f"--wordings {args.wordings}: set 1 to {len(CLOSINGS)}")
    for name in ("train_questions", "eval_questions", "paragraphs", "echoes", "lookups", "valid_conversations"):
        value, least = getattr(args, name), 1 if name == "paragraphs" else 0
        if value < least:
            raise UserError("option-value", f"--{name.replace('_', '-')} {value}: set {least} or more")

    # Each file has a separate random stream, so that the size of one does not change another.
    def stream(name: str) -> random.Random:
        return random.Random(f"{name}-{args.seed}")

    folder = Path(args.output)
    for name, count, held_out in (("train", args.train_questions, False), ("eval", args.eval_questions, True)):
        items_random = stream(name)
        items = (question_item(items_random, f"{name}-{index}", args.paragraphs, held_out) for index in range(count))
        written = write_jsonl(folder / f"{name}.jsonl", items)
        print(f"{folder / name}.jsonl: {written} questions over {args.paragraphs} facts each")
    written = write_jsonl(
        folder / "conversations.jsonl",
        curriculum(stream("conversations"), args.echoes, args.lookups, wordings=args.wordings),
    )
    print(
        f"{folder / 'conversations.jsonl'}: {written} conversations ({args.echoes} echoes, then {args.lookups} lookups)"
    )
    written = write_jsonl(
        folder / "conversations_valid.jsonl",
        curriculum(stream("valid"), 0, args.valid_conversations, wordings=args.wordings),
    )
    print(f"{folder / 'conversations_valid.jsonl'}: {written} lookups")
    size = write_tokenizer(folder / "tokenizer", wordings=args.wordings)
    print(f"{folder / 'tokenizer'}: {size} words")
    return 0


if __name__ == "__main__":
    from megatron_solopo.cli import run

    sys.exit(run(main))
