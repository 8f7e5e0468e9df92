"""Speed and memory of `solopo tokenize-data`: against the tokenizer library's own batches, and by number of groups.

    python examples/benchmarks/tokenize_data.py --data $SOLOPO_DATA --groups 1000 3000 10000 --output runs/tokenize

The groups have contexts of about 1K and 8K tokens (--tokens) made of Wikipedia paragraphs in a random order, so that no
two are alike. For each number of groups the whole command is timed in a process of its own, by the clock and by
processor time, with the peak of its process tree's resident memory (shared pages counted once: proportional set sizes).
The library's speed is that of the same texts in batches of 64, `tokenizer(texts)`, on as many of its own threads as
there are workers. With `--workers 1` both speeds are by processor time, which other work on the machine changes little;
else by the clock.

`--merge N` measures what alone sees all groups: parts of N made-up groups (random ids) are put together, opened as
training opens them, and a step of 8 groups is read; in one process, with its peak resident memory so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "examples" / "chat_templates" / "chatml.jinja"
CHARACTERS_A_TOKEN, WORD_CHARACTERS = 4.4, 6.1
"""Of English Wikipedia in Qwen2's vocabulary, roughly, and of a word with its space."""
SIZES = (1024, 8192)


def groups(data: Path, count: int, characters: float, sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Preference groups with contexts of about so many tokens of so many characters."""
    with (data / "hotpotqa" / "hotpot_corpus.jsonl").open(encoding="utf-8") as lines:
        passages = [json.loads(line) for line in lines]
    draw = random.Random(0)
    for number in range(count):
        contexts = []
        for tokens in sizes:
            parts, size = [], 0
            while size < tokens * characters:
                passage = draw.choice(passages)
                parts.append(f"Document {len(parts) + 1}: {passage['title']}\n{passage['text']}")
                size += len(parts[-1])
            contexts.append([{"role": "user", "content": "\n\n".join(parts) + "\n\nQuestion: what is meant?"}])
        chosen, rejected = (" ".join(draw.choice(passages)["text"].split()[:100]) for _ in range(2))
        yield {
            "id": f"g{number}",
            "short_messages": contexts[0],
            "long_messages": contexts[1],
            "chosen": f"1. {chosen}",
            "rejected": f"2. {rejected}",
        }


def write(data: Path, count: int, path: Path, characters: float, sizes: Sequence[int] = SIZES) -> None:
    with path.open("w", encoding="utf-8") as out:
        for group in groups(data, count, characters, sizes):
            out.write(json.dumps(group, ensure_ascii=False) + "\n")


def word_level(data: Path, folder: Path) -> Path:
    """A tokenizer that splits at spaces: several times faster, for memory at sizes that take too long otherwise."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    with (data / "hotpotqa" / "hotpot_corpus.jsonl").open(encoding="utf-8") as lines:
        words = sorted({word for line in lines for word in json.loads(line)["text"].split()})
    special = ["<unknown>", "<|im_start|>", "<|im_end|>"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="<unknown>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", additional_special_tokens=special[1:2]
    ).save_pretrained(folder)
    return folder


def watched(command: list[str]) -> tuple[float, float, float]:
    """(seconds, processor seconds, peak GiB of the process tree) of a command."""
    begin, peak, before = time.monotonic(), 0, resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    tree = psutil.Process(process.pid)
    while process.poll() is None:
        size = 0
        for member in (tree, *tree.children(recursive=True)):
            try:
                size += member.memory_full_info().pss
            except psutil.Error:
                continue
        peak = max(peak, size)
        time.sleep(1)
    if process.returncode:
        raise SystemExit(process.returncode)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - begin, processor, peak / 2**30


Clock = Callable[[], float]


def library_speed(path: Path, tokenizer_folder: Path, limit: int, clock: Clock) -> tuple[float, int]:
    """(tokens a second, tokens) of the library's own batches over the texts that the command tokenises."""
    from megatron_solopo.data.text.chat import load_tokenizer, render_prompt

    tokenizer = load_tokenizer(tokenizer_folder, TEMPLATE)
    texts = []
    with path.open(encoding="utf-8") as lines:
        for line, _ in zip(lines, range(limit), strict=False):
            group = json.loads(line)
            texts += [render_prompt(tokenizer, group[name]) for name in ("short_messages", "long_messages")]
            texts += [group["chosen"], group["rejected"]]
    begin, tokens = clock(), 0
    for first in range(0, len(texts), 64):
        tokens += sum(map(len, tokenizer(texts[first : first + 64], add_special_tokens=False)["input_ids"]))
    return tokens / (clock() - begin), tokens


def part_speed(path: Path, tokenizer_folder: Path, workers: int, clock: Clock) -> tuple[float, int]:
    """(tokens a second, tokens) of the command's workers once they are there: no start, no merge."""
    from megatron_solopo.data.options import TokenizerOptions
    from megatron_solopo.data.tokenized import make_store

    options = TokenizerOptions(str(tokenizer_folder), str(TEMPLATE))
    job = make_store.Job(str(path), options, "preference")
    _, parts = make_store.scan(path)
    times = []
    work = make_store.work_of, (job, options.load()), list(enumerate(parts)), workers
    for part in make_store.map_in_order(*work):
        times.append((clock(), len(part.data) // 4))  # but for names, lengths and digests, 1 % of the bytes
    rest = times[workers:-workers]  # from the first round of parts to the last: all workers are busy
    return sum(size for _, size in rest) / (rest[-1][0] - times[workers - 1][0]), sum(size for _, size in rest)


def made_up_part(number: int, size: int = 100) -> Any:
    """A `TokenizedPart` of groups with contexts of 1K and 8K random ids."""
    from megatron_solopo.data.tokenized.make_store import TokenizedPart
    from megatron_solopo.data.tokenized.token_table import record_batch
    from megatron_solopo.data.tokenized.tokens import Completion, Prompt, Report, TokenGroup
    from megatron_solopo.pack import Context, Side

    draw, groups = np.random.default_rng(number), []
    for i in range(size):
        short, chosen, rejected, long = np.split(draw.integers(0, 150_000, 9416, dtype=np.int32), [1024, 1124, 1224])
        answers = tuple(
            Completion(*one) for one in ((Side.CHOSEN, array("i", chosen)), (Side.REJECTED, array("i", rejected)))
        )
        prompts = (Prompt(Context.SHORT, short, answers), Prompt(Context.LONG, long, answers))
        groups.append(TokenGroup(f"g{number}-{i}", prompts))
    report = dataclasses.asdict(Report())
    known = {"ids": [group.id for group in groups], "report": report, "largest": [149_999, "g0-0"]}
    return TokenizedPart(number, known, record_batch(groups, "preference").serialize().to_pybytes())


def merge(folder: Path, count: int) -> None:
    """Puts the parts of so many groups together, opens the result and reads from it; prints times and memory."""
    from megatron_solopo.data.files.jobs import Jobs
    from megatron_solopo.data.options import TokenizerOptions
    from megatron_solopo.data.text.text_facts import TEXT_FACTS
    from megatron_solopo.data.tokenized import make_store
    from megatron_solopo.data.tokenized.token_store import BOTH_PAIRS, DATA, FORMAT, open_tokens
    from megatron_solopo.pack import Context, Side

    shutil.rmtree(folder, ignore_errors=True)
    store, facts = folder.with_name(f"{folder.name}.tokens"), dict.fromkeys(TEXT_FACTS, {})
    shutil.rmtree(store, ignore_errors=True)
    settings = {"format": FORMAT, "objective": "preference", "options": {"scored": None}, "text": facts}
    plan = make_store.Plan(make_store.Job("", TokenizerOptions(""), "preference"), None, settings, [])
    seen: set[str] = set()
    merged = 0.0
    with Jobs(folder, (make_store.STREAM,)) as jobs:
        jobs.begin(settings)
        schema = make_store.SCHEMAS["preference"].serialize().to_pybytes()
        for number in range(count // 100):
            part = made_up_part(number)
            begin = time.process_time()
            jobs.add(number, part.entry, {make_store.STREAM: (schema if not number else b"") + part.data})
            make_store._check_ids(plan.job, part.entry, seen)
            merged += time.process_time() - begin
        begin = time.process_time()
        make_store.make(plan, store, jobs, 1, "random")
    merged += time.process_time() - begin
    begin = time.process_time()
    dataset = open_tokens(store, facts, BOTH_PAIRS, 8292).only(BOTH_PAIRS - {(Context.LONG, Side.REJECTED)})
    opened = time.process_time() - begin
    read = sum(len(np.asarray(ids)) for place in range(8) for ids in dataset.groups[place * (count // 100)].sequences())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{count:>7,} groups, {(store / DATA).stat().st_size / 2**30:.2f} GiB: merged in {merged:.1f} s of processor "
        f"time, opened in {opened:.1f} s, {read:,} tokens read; peak so far {peak:.2f} GiB",
        flush=True,
    )
    shutil.rmtree(store)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="SOLOPO_DATA")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder for what is generated")
    parser.add_argument("--groups", type=int, nargs="*", default=[], metavar="N", help="sizes of the whole command")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--tokens", type=int, nargs=2, default=SIZES, metavar="N", help="of the contexts (1024 8192)")
    parser.add_argument("--word-level", action="store_true", help="tokens are words: memory at larger sizes, sooner")
    parser.add_argument("--speed-groups", type=int, default=600, metavar="N", help="groups of the speed test")
    parser.add_argument("--merge", type=int, nargs="*", default=[], metavar="N", help="sizes of the second half alone")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for count in options.merge:
        merge(options.output / "merge", count)
    tokenizer = options.data / "tokenizers" / "qwen2"
    if options.word_level:
        tokenizer = word_level(options.data, options.output / "words")
    os.environ |= {"RAYON_NUM_THREADS": str(options.workers), "TOKENIZERS_PARALLELISM": "true"}
    if options.speed_groups:
        path = options.output / "speed.jsonl"
        write(options.data, options.speed_groups, path, CHARACTERS_A_TOKEN)
        clock = time.process_time if options.workers == 1 else time.monotonic
        for _ in range(3):  # by turns, since other work on the machine comes and goes
            library, tokens = library_speed(path, tokenizer, options.speed_groups // 2, clock)
            ours, own_tokens = part_speed(path, tokenizer, options.workers, clock)
            print(
                f"library {library:,.0f} tokens/s ({tokens:,}), ours {ours:,.0f} ({own_tokens:,}), "
                f"ratio {ours / library:.2f}",
                flush=True,
            )
    for count in options.groups:
        path, store = options.output / f"{count}.jsonl", options.output / f"{count}.tokens"
        characters = WORD_CHARACTERS if options.word_level else CHARACTERS_A_TOKEN
        write(options.data, count, path, characters, options.tokens)
        command = [sys.executable, str(ROOT / "tools" / "tokenize_data.py"), "--data", str(path)]
        command += ["--output", str(store), "--tokenizer", str(tokenizer), "--chat-template", str(TEMPLATE)]
        seconds, processor, peak = watched([*command, "--workers", str(options.workers)])
        size = sum(file.stat().st_size for file in store.iterdir()) / 2**30
        print(
            f"{count:>7,} groups ({path.stat().st_size / 2**30:.2f} GiB): {seconds:.0f} s, {count / seconds:.1f} a "
            f"second, {processor:.0f} s of processor time, peak {peak:.2f} GiB, folder {size:.2f} GiB",
            flush=True,
        )
        path.unlink()


if __name__ == "__main__":
    main()
