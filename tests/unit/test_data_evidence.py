"""Retrieved evidence: BM25's ranks and recall on real labels, the log-prob's fall against transformers' loss."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from refusals import refused
from transformers import Qwen2Config, Qwen2ForCausalLM
from word_tokenizer import save_word_tokenizer

from megatron_solopo.data.building.evidence import LogProbFinder, mark, rank_by_bm25
from megatron_solopo.data.building.second_pass import Summary
from megatron_solopo.data.building.sources import CannotUse, LeftOut, read_questions
from megatron_solopo.data.hf_model import load_model
from megatron_solopo.data.schema import Paragraph, Question
from megatron_solopo.data.text.chat import load_tokenizer
from megatron_solopo.data.text.prompt import PromptFormat

DOCUMENTS = (
    Paragraph("Rain", "Rain fell in Paris on the old river."),
    Paragraph("Solaris", "The film Solaris was made by Andrei Tarkovsky."),
    Paragraph("Ballet", "A ballet was danced in winter."),
    Paragraph("Andrei Tarkovsky", "Tarkovsky was born in Zavrazhye."),
)
QUESTION = Question("q", "Where was the director of the film Solaris born?", "Zavrazhye", (), DOCUMENTS)


def test_bm25_follows_the_question_and_its_answer() -> None:
    assert set(rank_by_bm25(QUESTION)[:2]) == {1, 3}
    assert sorted(rank_by_bm25(QUESTION)) == [0, 1, 2, 3]
    # Nothing to compare is no error.
    blank = Question("q", "?", "!", (), (Paragraph("?", "."), Paragraph("!", "-")))
    assert rank_by_bm25(blank) == [0, 1]


def test_marked_documents_hold_the_answer() -> None:
    def gold(ranking: list[int], documents: int, question: Question = QUESTION) -> list[int]:
        marked = mark(question, ranking, documents)
        return [index for index, paragraph in enumerate(marked.paragraphs) if paragraph.is_supporting]

    assert gold([3, 1, 0, 2], 2) == [1, 3]
    assert gold([1, 0, 2, 3], 2) == [1, 3]  # the document with the answer replaces the last one
    assert gold([1, 0, 2, 3], 9) == [0, 1, 2, 3]
    with pytest.raises(CannotUse, match="no document contains the answer"):
        gold([0, 1, 2, 3], 2, Question("q", "?", "Moscow", (), DOCUMENTS))
    assert gold([0, 1, 2, 3], 2, Question("q", "?", "Yes", (), DOCUMENTS)) == [0, 1]


@pytest.mark.parametrize(
    ("source", "file", "recall", "complete"),
    [
        ("musique", "musique/musique_ans_train_subset.jsonl", 0.82, 0.67),
        ("hotpotqa", "hotpotqa/hotpot_train_distractor_subset.jsonl", 0.92, 0.85),
    ],
)
def test_recall_of_bm25_against_real_labels(
    solopo_data: Path, source: str, file: str, recall: float, complete: float
) -> None:
    """Counted here by hand over four documents, and compared with what the command prints."""
    summary = Summary()
    shares, whole = [], Counter()
    for question in read_questions(source, [solopo_data / file], LeftOut()):
        ranking = rank_by_bm25(question)
        gold = [index for index, paragraph in enumerate(question.paragraphs) if paragraph.is_supporting]
        summary.add_recall(ranking, set(gold))
        retrieved = [index for index in gold if index in ranking[:4]]
        shares.append(len(retrieved) / len(gold))
        whole[retrieved == gold] += 1
    mean, all_of_it = sum(shares) / len(shares), whole[True] / len(shares)
    assert mean >= recall and all_of_it >= complete
    assert f"{len(shares)} questions: " in summary.lines()[-1]
    assert f"@4 {mean:.3f} ({all_of_it:.3f})" in summary.lines()[-1]


@pytest.fixture
def model(tmp_path: Path) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    config = Qwen2Config(**shape, num_key_value_heads=2, vocab_size=64, max_position_embeddings=80)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    return Qwen2ForCausalLM.from_pretrained(tmp_path / "model").eval()


def test_log_prob_falls_as_transformers_computes_it(tmp_path: Path, model: Qwen2ForCausalLM) -> None:
    words = sorted({word for p in DOCUMENTS for word in f"{p.title} {p.text}".split()} | {"Zavrazhye"})
    tokenizer = load_tokenizer(save_word_tokenizer(tmp_path / "tokenizer", words))
    finder = LogProbFinder(model, tokenizer, PromptFormat("{title} {text}", " ", "{documents} {question}"))

    def log_prob(documents: list[Paragraph]) -> float:
        text = " ".join(f"{p.title} {p.text}" for p in documents)
        prompt = tokenizer.encode(f"<user> {text} {QUESTION.question} <turn_end> <assistant>")
        ids = torch.tensor([[*prompt, *tokenizer.encode("Zavrazhye <turn_end>")]])
        labels = ids.clone()
        labels[:, :-2] = -100
        with torch.no_grad():
            return -2 * model(ids, labels=labels).loss.item()  # a mean over the two tokens

    whole = log_prob(list(DOCUMENTS))
    expected = [whole - log_prob([p for p in DOCUMENTS if p is not removed]) for removed in DOCUMENTS]
    assert finder.drops(QUESTION) == pytest.approx(expected, abs=1e-4)
    assert finder(QUESTION) == sorted(range(4), key=lambda index: -expected[index])
    long = Question("long", "?", "Zavrazhye", (), (Paragraph("t", "word " * 90),))
    with pytest.raises(CannotUse, match="all its documents go beyond the 80 positions of --evidence-model"):
        finder(long)
    model.resize_token_embeddings(3)
    with refused("token-beyond-vocabulary", "question 'q', --evidence log-prob: token id ", "3 embeddings"):
        finder(QUESTION)
    with refused("folder-missing", "--evidence-model nowhere: "):
        load_model("nowhere", "cpu", "auto", "--evidence-model")
