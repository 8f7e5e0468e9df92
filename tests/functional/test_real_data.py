"""Real MuSiQue questions and Qwen2's tokenizer and vocabulary, from question files to an answer, in two processes."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from token_data import tokenize
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_solopo.config import Config, MethodConfig
from megatron_solopo.data.building import prepare_data
from megatron_solopo.data.pairing import build_pairs
from megatron_solopo.data.text.chat import load_tokenizer
from megatron_solopo.data.tokenized.batches import make_schedule, plan_step
from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.evaluation import ask
from megatron_solopo.losses.solopo import all_scores

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (768, 3072)
STEPS = 2


def example(name: str) -> Any:
    """A script of examples/musique as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "musique" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def home(solopo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``start`` (the model's shape), ``contexts.jsonl`` and ``pairs.jsonl`` of four questions."""
    folder = tmp_path_factory.mktemp("musique")
    with (solopo_data / "musique" / "musique_ans_train_subset.jsonl").open(encoding="utf-8") as file:
        (folder / "questions.jsonl").write_text("".join(next(file) for _ in range(12)), encoding="utf-8")
    example("random_qwen2").main(
        ["--tokenizer", str(solopo_data / "tokenizers" / "qwen2"), "--output", str(folder / "start")]
    )
    arguments = [
        "--data",
        folder / "questions.jsonl",
        "--limit",
        4,
        "--short-tokens",
        LENGTHS[0],
        "--long-tokens",
        LENGTHS[1],
        "--tokenizer",
        folder / "start",
        "--output",
        folder / "contexts.jsonl",
    ]
    assert prepare_data.main(list(map(str, arguments))) == 0
    assert (
        build_pairs.main(
            [
                "--contexts",
                str(folder / "contexts.jsonl"),
                "--responses",
                "gold",
                "--output",
                str(folder / "pairs.jsonl"),
            ]
        )
        == 0
    )
    return folder


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """SoLo-DPO in two processes with the recipe's settings, and an evaluation on the same pairs at the end."""
    flags = [
        "--config",
        ROOT / "examples/recipes/musique_qwen2_smoke.yaml",
        "--hf-path",
        home / "start",
        "--train-data",
        home / "pairs.jsonl",
        "--valid-data",
        home / "pairs.jsonl",
        "--train-iters",
        STEPS,
        "--save",
        home / "dpo",
        "--save-hf",
        home / "dpo-hf",
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        2,
        ROOT / "pretrain_solopo.py",
        *flags,
    ]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {
        "OMP_NUM_THREADS": "1"
    }
    done = subprocess.run(
        list(map(str, command)), cwd=home, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return home


def test_contexts_have_the_lengths_and_the_same_evidence(home: Path) -> None:
    # The ids are counted by the reader of the rank file, not by the transformers tokenizer that built the contexts.
    tokenizer = Tokenizer.from_file(str(home / "start" / "tokenizer.json"))
    questions = {question["id"]: question for question in read(home / "questions.jsonl")}
    for record in read(home / "contexts.jsonl"):
        gold = [p["paragraph_text"] for p in questions[record["id"]]["paragraphs"] if p["is_supporting"]]
        for length, which in zip(LENGTHS, ("short", "long"), strict=True):
            [message] = record[f"{which}_messages"]
            text = (
                "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
                + message["content"]
                + "<|im_end|>\n<|im_start|>assistant\n"
            )
            assert len(tokenizer.encode(text, add_special_tokens=False).ids) == record[f"{which}_tokens"]
            assert 0.98 * length <= record[f"{which}_tokens"] <= length
            assert all(paragraph.strip() in message["content"] for paragraph in gold)


def test_a_run_starts_at_ln_2_and_stays_within_its_memory(trained: Path) -> None:
    steps = [line for line in read(trained / "dpo" / "metrics.jsonl") if line["split"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    # Before the first update policy and reference are one model.
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and steps[0]["alignment_loss"] == 0
    assert all(
        line["padding_share"] == 0 and 1.9 * sum(LENGTHS) < line["tokens"] < 2.1 * sum(LENGTHS) for line in steps
    )
    assert steps[-1]["loss"] != pytest.approx(math.log(2), abs=1e-4)
    assert max(line["memory_gib"] for line in steps) < 4  # of each process; 8 GiB in all


@torch.no_grad()
def test_the_exported_model_has_the_same_log_probs_in_transformers(trained: Path) -> None:
    _, valid = [line for line in read(trained / "dpo" / "metrics.jsonl") if line["split"] == "valid"]
    model = AutoModelForCausalLM.from_pretrained(trained / "dpo-hf", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "dpo-hf")
    assert model.config.vocab_size == 151_936 and len(tokenizer) == 151_665
    sums: dict[str, list[float]] = {"short": [], "long": []}
    lengths = []
    groups = read(trained / "pairs.jsonl")
    for group in groups:
        response = tokenizer.encode(group["chosen"], add_special_tokens=False) + [
            tokenizer.convert_tokens_to_ids("<|im_end|>")
        ]
        lengths.append(len(response))
        for which, values in sums.items():
            prompt = tokenizer.apply_chat_template(group[f"{which}_messages"], add_generation_prompt=True)["input_ids"]
            ids = torch.tensor([prompt + response])
            logits = model(ids, logits_to_keep=len(response) + 1).logits[0, :-1]
            values.append(logits.log_softmax(-1).gather(1, ids[0, -len(response) :, None]).sum().item())
    gaps = [(short - long) / length for short, long, length in zip(sums["short"], sums["long"], lengths, strict=True)]
    assert valid["logp_chosen"] == pytest.approx(sum(sums["short"]) / len(groups), abs=5e-4)
    assert valid["short_long_gap_nats_per_token"] == pytest.approx(sum(gaps) / len(groups), abs=3e-5)


def test_the_exported_model_answers(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = read(trained / "questions.jsonl")[0]
    document = trained / "document.txt"
    document.write_text("\n\n".join(p["paragraph_text"] for p in question["paragraphs"]), encoding="utf-8")
    assert (
        ask.main(
            [
                "--model",
                str(trained / "dpo-hf"),
                "--document",
                str(document),
                "--question",
                question["question"],
                "--max-new-tokens",
                "4",
            ]
        )
        == 0
    )
    output = capsys.readouterr().out
    assert f"question: {question['question']}" in output
    [answer] = [line for line in output.splitlines() if line.startswith("dpo-hf (")]
    assert answer.split(" | ")[1].strip()


@pytest.mark.parametrize(
    "lengths",
    [
        ["--short-tokens", "1100", "--long-tokens", "7500"],  # groups of one length, as for a run
        ["--short-documents", "5", "--long-documents", "40"],  # as long as the documents are
    ],
)
def test_sixty_four_real_groups_a_step_are_spread_evenly(
    home: Path, solopo_data: Path, lengths: list[str], tmp_path: Path
) -> None:
    """Padding up to 3 %, compute of the dearest process up to 10 % above the mean, for many layouts."""
    source = solopo_data / "musique" / "musique_ans_train_subset.jsonl"
    contexts, groups = tmp_path / "contexts.jsonl", tmp_path / "groups.jsonl"
    arguments = ["--data", source, "--limit", 128, *lengths, "--tokenizer", home / "start", "--output", contexts]
    assert prepare_data.main(list(map(str, arguments))) == 0
    assert build_pairs.main(["--contexts", str(contexts), "--responses", "gold", "--output", str(groups)]) == 0
    method = MethodConfig()
    dataset = tokenize(groups, load_tokenizer(str(home / "start")), all_scores(method), 32768)
    schedule = make_schedule(len(dataset.groups), 64, 4, None, 0, shuffle=True)
    worst = defaultdict(float)
    for step, ranks, context in product(range(2), (2, 4, 8), (1, 2, 4, 8)):
        config = Config(method=method)
        config.parallel.context_parallel_size = context
        config.training.micro_batch_size, config.training.max_tokens_per_rank = 8, 32768 // context
        of_step = [dataset.groups[i] for i in schedule.step(step)]
        plan = plan_step(of_step, 3584, ranks, config)
        assert plan.imbalance <= 0.10, (ranks, plan.imbalance)
        worst[f"imbalance at dp {ranks}"] = max(worst[f"imbalance at dp {ranks}"], plan.imbalance)
        if ranks < 8:
            continue  # the same groups, so the same padding
        packs = [
            build_pack([of_step[i] for i in share], share, True, plan.of_packs, plan.of_pieces)
            for shares in plan.shares
            for share in shares
        ]
        tokens = sum(pack.tokens.numel() for pack in packs)
        padding = sum(pack.padding for pack in packs) / tokens
        assert padding <= 0.03 and all(pack.tokens.numel() <= 32768 for pack in packs)
        worst[f"padding at cp {context}"] = max(worst[f"padding at cp {context}"], padding)
    print(", ".join(f"{name}: {100 * value:.2f} %" for name, value in worst.items()))
