"""Time and memory of prepare-data by the number of questions, and its speed beside the tokenizer library's.

    python examples/benchmarks/data.py --data musique.jsonl --tokenizer MODEL --questions 1000 3000 10000

The questions are real ones repeated under new ids; the distractors of each are new paragraphs of sentences of
real ones, so that the pool grows with the questions as that of a real set does. Memory is that of all processes
together, pages that they share counted once; the last line continues the sizes measured in a straight line. Nothing
else may run from the same virtual environment meanwhile: it would share the pages of the libraries, and take a part of
the count.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megatron_solopo.data.files.records import read_jsonl

ROOT = Path(__file__).resolve().parents[2]


def write_corpus(path: Path, real: list[dict[str, Any]], questions: int) -> None:
    """``questions`` records in MuSiQue's format."""
    rng = random.Random(0)
    paragraphs = [paragraph for record in real for paragraph in record["paragraphs"]]
    sentences = [re.split(r"(?<=[.!?]) ", paragraph["paragraph_text"]) for paragraph in paragraphs]
    with path.open("w", encoding="utf-8") as out:
        for number in range(questions):
            record = real[number % len(real)]
            of_record = []
            for paragraph in record["paragraphs"]:
                if not paragraph["is_supporting"]:
                    one, other = rng.sample(range(len(paragraphs)), 2)
                    text = " ".join(sentences[one][::2] + sentences[other][1::2])
                    title = f"{paragraphs[one]['title']} and {paragraphs[other]['title']}"
                    paragraph = {"title": title, "paragraph_text": text, "is_supporting": False}
                of_record.append(paragraph)
            out.write(json.dumps({**record, "id": f"{record['id']}-{number}", "paragraphs": of_record}) + "\n")


def run(command: list[str]) -> tuple[str, float, float, float]:
    """(what it printed, seconds, CPU seconds, peak GB) of a command and all its processes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start, peak = time.monotonic(), 0
    cpu: dict[int, float] = {}
    with tempfile.TemporaryFile("w+") as out:
        process = psutil.Popen(command, env=environment, stdout=out)
        while process.poll() is None:
            total = 0
            for one in [process, *process.children(recursive=True)]:
                try:
                    total += one.memory_full_info().pss
                    cpu[one.pid] = sum(one.cpu_times()[:2])
                except psutil.NoSuchProcess:
                    continue
            peak = max(peak, total)
            time.sleep(0.5)
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed")
        out.seek(0)
        return out.read(), time.monotonic() - start, sum(cpu.values()), peak / 1e9


def speed(options: argparse.Namespace, real: list[dict[str, Any]]) -> None:
    """Prints tokens a CPU second of both passes (64 questions, this process) and of the library on the same texts.

    In a separate process: what it imports would be shared with the command that is measured afterwards.
    """
    from megatron_solopo.data.building.first_pass import ingest
    from megatron_solopo.data.building.second_pass import TRAIN, Builder, BuildSettings
    from megatron_solopo.data.options import TokenizerOptions
    from megatron_solopo.data.text.chat import load_tokenizer, render_prompt
    from megatron_solopo.data.text.counting import TokenCounter
    from megatron_solopo.data.text.prompt import PromptFormat

    tokenizer = load_tokenizer(options.tokenizer, options.chat_template)
    counter, prompt_format = TokenCounter(tokenizer), PromptFormat()

    def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
        start = time.process_time()
        done = work()
        return time.process_time() - start, done

    def library(texts: list[str]) -> int:
        return sum(map(len, tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        first = {"source": "musique", "inputs": [options.data], "pool": [], "prompt_format": prompt_format}
        reading, _ = cpu_seconds(lambda: ingest(path, count=counter.texts, limit=64, **first))
        documents = [f"{p['title']}\n{p['paragraph_text']}" for record in real for p in record["paragraphs"]]
        alone, tokens = cpu_seconds(lambda: library(list(dict.fromkeys(documents))))
        rates = {"reading and lengths": (tokens / reading, tokens / alone)}
        settings = BuildSettings(
            tokenizer=TokenizerOptions(options.tokenizer, options.chat_template),
            prompt_format=prompt_format,
            sizes=tuple(options.sizes),
            in_tokens=True,
            source="musique",
        )
        builder = Builder(path, settings, tokenizer)
        builder.build(0, 16)
        # One process of the second pass has one thread for its texts; so has the library here.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        building, batch = cpu_seconds(lambda: builder.build(16, 64))
        pairs = [json.loads(line) for line in batch.parts[TRAIN].splitlines()]
        prompts = [render_prompt(tokenizer, pair[f"{which}_messages"]) for pair in pairs for which in ("short", "long")]
        alone, tokens = cpu_seconds(lambda: library(prompts))
        del os.environ["TOKENIZERS_PARALLELISM"]
        rates["contexts"] = (tokens / building, tokens / alone)
    for name, (ours, theirs) in rates.items():
        print(
            f"{name}: {ours:,.0f} tokens a CPU second, encode_batch_fast on the same texts {theirs:,.0f} "
            f"({ours / theirs:.2f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="FILE", help="real questions, MuSiQue's JSONL")
    parser.add_argument("--tokenizer", required=True, metavar="DIR")
    parser.add_argument("--chat-template", metavar="FILE")
    parser.add_argument("--questions", type=int, nargs="+", default=[1000, 3000, 10_000], metavar="N")
    parser.add_argument("--sizes", type=int, nargs=2, default=[1024, 8192], metavar="N", help="short and long")
    parser.add_argument("--unit", choices=("tokens", "documents"), default="tokens", help="of --sizes")
    parser.add_argument("--limit", type=int, metavar="N", help="build the contexts of the first N questions only")
    parser.add_argument("--workers", type=int, default=2, metavar="N")
    parser.add_argument("--extrapolate", type=int, default=100_000, metavar="N")
    options = parser.parse_args()
    real = [record for _, record in read_jsonl(options.data)]

    if options.unit == "tokens":
        measured = multiprocessing.get_context("spawn").Process(target=speed, args=(options, real))
        measured.start()
        measured.join()
    print(
        f"{'questions':>9} {'paragraphs':>10} {'seconds':>8} {'reading':>8} {'contexts':>8} {'CPU s':>8} "
        f"{'peak GB':>8} {'tokens/s':>10}"
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for questions in options.questions:
            corpus, output = Path(folder, "corpus.jsonl"), Path(folder, "contexts.jsonl")
            write_corpus(corpus, real, questions)
            command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "--data", str(corpus)]
            command += ["--output", str(output), "--tokenizer", options.tokenizer, "--workers", str(options.workers)]
            command += [
                f"--short-{options.unit}",
                str(options.sizes[0]),
                f"--long-{options.unit}",
                str(options.sizes[1]),
            ]
            command += ["--limit", str(options.limit)] if options.limit else []
            command += ["--chat-template", options.chat_template] if options.chat_template else []
            printed, seconds, used, peak = run(command)
            paragraphs = int(re.search(r"(\d+) distinct paragraphs", printed)[1])
            reading, contexts = map(float, re.search(r"lengths ([\d.]+) s, contexts ([\d.]+) s", printed).groups())
            tokens = sum(record["short_tokens"] + record["long_tokens"] for _, record in read_jsonl(output))
            rows.append((questions, seconds, used, peak))
            print(
                f"{questions:>9} {paragraphs:>10} {seconds:>8.1f} {reading:>8.1f} {contexts:>8.1f} {used:>8.1f} "
                f"{peak:>8.2f} {tokens / contexts:>10,.0f}",
                flush=True,
            )
    if len(rows) > 1:
        counts, *measured = np.array(rows).T
        seconds, used, peak = (np.polyval(np.polyfit(counts, values, 1), options.extrapolate) for values in measured)
        print(f"{options.extrapolate:,} questions, extrapolated: {seconds:,.0f} s, {used:,.0f} CPU s, {peak:.2f} GB")


if __name__ == "__main__":
    main()
