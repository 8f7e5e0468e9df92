"""Time and memory of prepare-data by the number of questions, and its speed beside the tokenizer library's own.

    python examples/benchmarks/data.py --input musique.jsonl --tokenizer MODEL --questions 1000 3000 10000

The questions are real ones repeated under new ids; the distractors of each are new paragraphs made of sentences of
real ones, so that the pool grows with the questions as that of a real set does. Memory is that of all processes
together, pages that they share counted once; the last line continues the sizes measured in a straight line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megatron_solopo.data.chat import load_tokenizer
from megatron_solopo.data.counting import TokenCounter
from megatron_solopo.data.schema import read_jsonl

ROOT = Path(__file__).resolve().parents[2]


def write_corpus(path: Path, real: list[dict[str, Any]], questions: int) -> None:
    """``questions`` records in MuSiQue's format."""
    rng = random.Random(0)
    paragraphs = [paragraph for record in real for paragraph in record["paragraphs"]]
    sentences = [re.split(r"(?<=[.!?]) ", paragraph["paragraph_text"]) for paragraph in paragraphs]
    with path.open("w", encoding="utf-8") as out:
        for number in range(questions):
            record = real[number % len(real)]
            made = []
            for paragraph in record["paragraphs"]:
                if not paragraph["is_supporting"]:
                    one, other = rng.sample(range(len(paragraphs)), 2)
                    text = " ".join(sentences[one][::2] + sentences[other][1::2])
                    title = f"{paragraphs[one]['title']} and {paragraphs[other]['title']}"
                    paragraph = {"title": title, "paragraph_text": text, "is_supporting": False}
                made.append(paragraph)
            out.write(json.dumps({**record, "id": f"{record['id']}-{number}", "paragraphs": made}) + "\n")


def run(command: list[str]) -> tuple[str, float, float, float]:
    """(what it printed, seconds, CPU seconds, peak GB) of a command and all its processes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    begin, peak = time.monotonic(), 0
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
        return out.read(), time.monotonic() - begin, sum(cpu.values()), peak / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, metavar="FILE", help="real questions, MuSiQue's JSONL")
    parser.add_argument("--tokenizer", required=True, metavar="DIR")
    parser.add_argument("--chat-template", metavar="FILE")
    parser.add_argument("--questions", type=int, nargs="+", default=[1000, 3000, 10_000], metavar="N")
    parser.add_argument("--sizes", type=int, nargs=2, default=[1024, 8192], metavar="N", help="tokens, short and long")
    parser.add_argument("--workers", type=int, default=2, metavar="N")
    parser.add_argument("--extrapolate", type=int, default=100_000, metavar="N")
    given = parser.parse_args()
    real = [record for _, record in read_jsonl(given.input)]

    tokenizer = load_tokenizer(given.tokenizer, given.chat_template)
    texts = [paragraph["paragraph_text"] for record in real for paragraph in record["paragraphs"]]
    tokens = sum(TokenCounter(tokenizer).texts(texts))
    speeds, cpu = {}, {}
    for name, count in {
        "library": lambda: tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False),
        "counter": lambda: TokenCounter(tokenizer).texts(texts),
    }.items():
        # The best of three; CPU seconds too, because they depend less on what else the machine does.
        speeds[name], cpu[name] = 0.0, 0.0
        for _ in range(3):
            begin, used = time.monotonic(), time.process_time()
            count()
            speeds[name] = max(speeds[name], tokens / (time.monotonic() - begin))
            cpu[name] = max(cpu[name], tokens / (time.process_time() - used))
    for label, rates in (("second", speeds), ("CPU second", cpu)):
        print(
            f"{len(texts)} paragraphs, tokens a {label}: encode_batch_fast {rates['library']:,.0f}, "
            f"lengths of the pool {rates['counter']:,.0f} ({rates['counter'] / rates['library']:.2f})",
            flush=True,
        )
    print(
        f"{'questions':>9} {'paragraphs':>10} {'seconds':>8} {'reading':>8} {'contexts':>8} {'CPU s':>8} {'peak GB':>8} "
        f"{'tokens/s':>10}"
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for questions in given.questions:
            corpus, output = Path(folder, "corpus.jsonl"), Path(folder, "contexts.jsonl")
            write_corpus(corpus, real, questions)
            command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "--input", str(corpus)]
            command += ["--output", str(output), "--tokenizer", given.tokenizer, "--workers", str(given.workers)]
            command += ["--short-tokens", str(given.sizes[0]), "--long-tokens", str(given.sizes[1])]
            command += ["--chat-template", given.chat_template] if given.chat_template else []
            printed, seconds, used, peak = run(command)
            paragraphs = int(re.search(r"(\d+) distinct paragraphs", printed)[1])
            reading, contexts = map(float, re.search(r"lengths ([\d.]+) s, contexts ([\d.]+) s", printed).groups())
            made = sum(record["short_tokens"] + record["long_tokens"] for _, record in read_jsonl(output))
            rows.append((questions, seconds, used, peak))
            print(
                f"{questions:>9} {paragraphs:>10} {seconds:>8.1f} {reading:>8.1f} {contexts:>8.1f} {used:>8.1f} "
                f"{peak:>8.2f} {made / contexts:>10,.0f}",
                flush=True,
            )
    if len(rows) > 1:
        counts, *measured = np.array(rows).T
        seconds, used, peak = (np.polyval(np.polyfit(counts, values, 1), given.extrapolate) for values in measured)
        print(f"{given.extrapolate:,} questions, extrapolated: {seconds:,.0f} s, {used:,.0f} CPU s, {peak:.2f} GB")


if __name__ == "__main__":
    main()
