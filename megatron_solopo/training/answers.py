"""Answers of the model in training to held-out questions (--eval-generate): greedy, in the run's own layout.

Every layout that trains can answer, because tokens come from the forward pass of training: prompts and answers so far
are packs, planned over data-parallel ranks, and the most likely token is found across the shards of the vocabulary. No
weight is gathered and nothing is cached between passes.

A pass scores all places of an answer at once, so an answer that is known before is verified in one pass. That is how
later evaluations are cheap: each question's last answer is its draft, and a place where the model now differs costs one
pass more. The first evaluation has no drafts and needs a pass for each token of the longest answer, each over all
prompts that are not answered yet. Answers are those of greedy decoding in any case: a token of the draft is kept only
where it is the most likely one after what was kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from transformers import PreTrainedTokenizerBase

from megatron_solopo.config import Config
from megatron_solopo.conversion.sidecar_files import generation_config
from megatron_solopo.data.building.contexts import read_contexts
from megatron_solopo.data.files.records import Record
from megatron_solopo.data.scoring import SCORERS, score
from megatron_solopo.data.text.chat import prompt_ids
from megatron_solopo.data.text.control import end_of_turn_id
from megatron_solopo.data.tokenized.batches import plan_step
from megatron_solopo.data.tokenized.packs import build_pack
from megatron_solopo.data.tokenized.tokens import Completion, Prompt, TokenGroup
from megatron_solopo.errors import UserError
from megatron_solopo.metrics import Metric, metric_of, register
from megatron_solopo.model.cost import width_of_cost, windows_of
from megatron_solopo.model.forward import greedy_tokens
from megatron_solopo.pack import Context, Pack, Side
from megatron_solopo.progress import ProgressBar
from megatron_solopo.training.engine import Engine, data_parallel
from megatron_solopo.training.step import reduce_to_all_ranks, run_packs
from megatron_solopo.training.step_work import sent

SPLIT = "generate"
"""The ``split`` of these evaluations in metrics.jsonl."""

LENGTHS = {"short": Context.SHORT, "long": Context.LONG}
"""The contexts of a question: names in metrics -> `Context`."""

for _name in SCORERS:
    for _length in LENGTHS:
        _label = f"{metric_of(_name).label}, {_length} context"
        _line = f"{metric_of(_name).label} {_length} {{:.3f}}" if _name == "sub_em" else ""
        register(Metric(f"{_name}_{_length}", _label, "", True, figure=None, line=_line, limits=(0, 1)))

ANSWER_METRICS = tuple(f"{name}_{length}" for name in SCORERS for length in LENGTHS)
"""What is measured of the answers."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out questions as token ids.

    Attributes:
        questions: records {id, length, question, answers}, one a prompt.
        prompts: token ids.
        stops: ids that end an answer.
    """

    questions: list[Record]
    prompts: list[list[int]]
    tokenizer: PreTrainedTokenizerBase
    stops: frozenset[int]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([self.questions, self.prompts]).encode()).hexdigest()

    def text(self, answer: Sequence[int]) -> str:
        """Returns an answer's text, without its end."""
        ids = answer[:-1] if answer and answer[-1] in self.stops else answer
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def end_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the ids that end an answer: the tokenizer's end of turn, and those of the folder's generation config, or
    without one of config.json, which transformers reads then."""
    document = generation_config(folder) or json.loads((folder / "config.json").read_text(encoding="utf-8"))
    configured = document.get("eos_token_id")
    ids = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return frozenset({end_of_turn_id(tokenizer), *ids})


def read_held_out(config: Config, tokenizer: PreTrainedTokenizerBase) -> HeldOut:
    """Reads --eval-generate, a contexts file of prepare-data: each question on its short and its long context.

    Raises:
        UserError: the file is not one, is empty, or a prompt with an answer is longer than --seq-length.
    """
    path, longest, new_tokens = config.data.eval_generate, config.data.seq_length, config.training.eval_max_new_tokens
    assert path is not None
    questions: list[Record] = []
    prompts: list[list[int]] = []
    for pair in read_contexts(path):
        for length, messages in (("short", pair.short_messages), ("long", pair.long_messages)):
            ids = prompt_ids(tokenizer, messages)
            if len(ids) + new_tokens > longest:
                raise UserError(
                    "prompt-too-long",
                    f"--eval-generate {path}: the {length} context of question {pair.id!r} has {len(ids):,} tokens, "
                    f"with --eval-max-new-tokens {new_tokens} beyond --seq-length {longest:,}; raise it, or build "
                    "shorter contexts",
                )
            asked = {"id": pair.id, "length": length, "question": pair.question, "answers": list(pair.answers)}
            questions.append(asked)
            prompts.append(ids)
    if not questions:
        raise UserError("data-empty", f"--eval-generate {path}: holds no question; set a contexts file of prepare-data")
    return HeldOut(questions, prompts, tokenizer, end_ids(Path(config.model.hf_path), tokenizer))


def greedy_answers(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    stops: frozenset[int],
    max_new_tokens: int,
    config: Config,
    drafts: Mapping[int, Sequence[int]] | None = None,
    must_stop: Callable[[], bool] = lambda: False,
) -> list[list[int]] | None:
    """Returns the greedy answer to each prompt, with its end where it has one; the same on every rank. Collective.

    Args:
        stops: ids that end an answer.
        max_new_tokens: an answer is cut after so many tokens.
        drafts: likely answers by the index of their prompt.
        must_stop: called before each pass; where it returns True, the same on every rank, the result is None.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    guesses = [list((drafts or {}).get(index, ()))[:max_new_tokens] for index in range(len(prompts))]
    open_ones = list(range(len(prompts)))
    bar = ProgressBar(desc="answers", total=len(prompts), unit="prompt", leave=False)
    with torch.no_grad(), bar:
        while open_ones:
            if must_stop():
                return None
            predicted = _pass(
                engine, [(prompts[index], answers[index] + guesses[index]) for index in open_ones], config
            )
            for index, likeliest in zip(open_ones, predicted, strict=True):
                answers[index], guesses[index] = _accept(
                    answers[index], guesses[index], likeliest, stops, max_new_tokens
                )
            before = len(open_ones)
            open_ones = [index for index in open_ones if not _ended(answers[index], stops, max_new_tokens)]
            bar.update(before - len(open_ones))
    return answers


def _ended(answer: Sequence[int], stops: frozenset[int], max_new_tokens: int) -> bool:
    return len(answer) >= max_new_tokens or (bool(answer) and answer[-1] in stops)


def _accept(
    answer: list[int], guess: list[int], likeliest: Sequence[int], stops: frozenset[int], max_new_tokens: int
) -> tuple[list[int], list[int]]:
    """Returns the answer with the tokens that a pass decided, and the rest of the guess.

    Args:
        likeliest: the most likely token at each place of ``answer + guess`` and after it.
    """
    answer = list(answer)
    for number, token in enumerate(likeliest[len(answer) :]):
        answer.append(token)
        right = number < len(guess) and guess[number] == token
        if _ended(answer, stops, max_new_tokens) or not right:
            return answer, guess[number + 1 :][: max_new_tokens - len(answer)]
    return answer, []


def _pass(engine: Engine, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], config: Config) -> list[list[int]]:
    """Returns for each (prompt, answer so far) the most likely token at each place of the answer and after it."""
    unknown = 0  # the last token of a completion is predicted and not read
    groups = [
        TokenGroup("", (Prompt(Context.SHORT, prompt, (Completion(Side.PLAIN, [*answer, unknown]),)),))
        for prompt, answer in sequences
    ]
    rank, ranks = data_parallel()
    width, windows = width_of_cost(engine.hf_config), windows_of(engine.hf_config)
    plan = plan_step(groups, width, ranks, config, engine.platform.name, windows)
    packs = []
    for places in plan.shares[rank]:
        of_pack = [groups[place] for place in places]
        pack = build_pack(of_pack, places, config.data.share_prompts, plan.of_packs, plan.of_pieces, plan.of_prompts)
        packs.append(dataclasses.replace(pack, segments=torch.arange(len(pack.targets))))
    lengths = [len(answer) + 1 for _, answer in sequences]
    first = [0]
    for length in lengths:
        first.append(first[-1] + length)
    table = torch.zeros(first[-1], dtype=torch.float64, device=engine.platform.device)

    def keep(output: torch.Tensor, pack: Pack) -> tuple[torch.Tensor, dict]:
        at = [place for index in pack.groups for place in range(first[index], first[index + 1])]
        table[torch.tensor(at, dtype=torch.int64, device=table.device)] = output
        return output.sum(), {}

    run_packs(engine, sent(engine, packs), keep, forward_only=True, forward=greedy_tokens)
    tokens = reduce_to_all_ranks(table).long().tolist()
    return [tokens[start : start + length] for start, length in zip(first[:-1], lengths, strict=True)]


def scored_answers(held_out: HeldOut, answers: Sequence[Sequence[int]]) -> tuple[dict[str, float], list[Record]]:
    """Returns the means of the scores by length, and a record of each answer."""
    records: list[Record] = []
    values: dict[str, list[float]] = {}
    for asked, answer in zip(held_out.questions, answers, strict=True):
        text, gold = held_out.text(answer), asked["answers"]
        assert isinstance(gold, list)
        scores = {name: score(name, text, gold) for name in SCORERS}
        for name, value in scores.items():
            values.setdefault(f"{name}_{asked['length']}", []).append(value)
        finished = bool(answer) and answer[-1] in held_out.stops
        records.append({**asked, "prediction": text, "finished": finished, **scores})
    return {name: fmean(of) for name, of in values.items()}, records


def answers_file(folder: Path, step: int) -> Path:
    """Returns the file of a run folder with the answers after a step."""
    return folder / "answers" / f"step_{step:07d}.jsonl"
