"""The results of the demo: the table of accuracies, a report with plots, one document answered by every model.

The last stage of demo.yaml; it reads the output folder, where it runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megatron_solopo.arguments import Parser
from megatron_solopo.cli import run
from megatron_solopo.errors import UserError
from megatron_solopo.evaluation.accuracy import accuracy_table
from megatron_solopo.evaluation.report import write_report
from megatron_solopo.evaluation.results import read_evaluation, read_run

METHODS = {
    "short-PO": "short-po",
    "long-PO": "long-po",
    "SoLo": "solo",
    "SoLo, stop-grad on short": "solo-stopped",
}
"""Label -> run folder; ``FOLDER-hf`` holds the model, ``evaluation/FOLDER.json`` its accuracies."""

NEXT = """\
    solopo prepare-data --data QUESTIONS.jsonl --tokenizer MODEL --short-tokens 1024 --long-tokens 8192 \\
        --output contexts.jsonl
    solopo sample-responses --contexts contexts.jsonl --model MODEL --output responses.jsonl && \\
        solopo build-pairs --contexts contexts.jsonl --responses responses.jsonl --output groups.jsonl
    torchrun --nproc_per_node 8 pretrain_solopo.py --hf-path MODEL --train-data groups.jsonl \\
        --preference-loss orpo --bf16 --seq-length 8704 --train-epochs 1 --save runs/solo --save-hf runs/solo-hf

or all of them as a recipe: solopo run RECIPE.yaml (docs/pipeline.md).
"""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--short", type=int, required=True, metavar="N", help="facts in the pairs' contexts")
    parser.add_argument("--long", type=int, required=True, metavar="N", help="facts in the aligned contexts")
    options = parser.parse_args(argv)
    folders = {"base": "base"} | METHODS
    evaluations = [read_evaluation(f"{label}=evaluation/{folder}.json") for label, folder in folders.items()]
    runs = [read_run(f"{label}={folder}") for label, folder in folders.items()]
    questions, groups, asked = (_lines(name) for name in ("data/train.jsonl", "groups.jsonl", "data/eval.jsonl"))
    text = (
        f"sub-EM by the number of facts in the context, {asked} questions asked at each length, 95 % interval. "
        f"{groups} preference groups from {questions} questions; pairs sampled on {options.short} facts, "
        f"long contexts of {options.long}."
    )
    report, _ = write_report(
        Path("report.md"), runs, evaluations, title="SoLoPO on invented facts", text=text, closing=f"## Next\n\n{NEXT}"
    )
    print(f"\n{text}\n\n{accuracy_table(evaluations, 'documents')}\n")
    _ask([f"{folder}-hf" for folder in folders.values()])
    print(f"\nThe report, with plots: {report.resolve()}\n\nNext, for your model and questions:\n\n{NEXT}")
    return 0


def _lines(name: str) -> int:
    with Path(name).open(encoding="utf-8") as file:
        return sum(1 for _ in file)


def _ask(models: list[str]) -> None:
    """One long document, answered by every model; the first question of the evaluation set, whoever is right."""
    with Path("data/eval.jsonl").open(encoding="utf-8") as file:
        question = json.loads(file.readline())
    paragraphs = [paragraph["paragraph_text"] for paragraph in question["paragraphs"]]
    document = Path("document.txt")
    document.write_text(" ".join(paragraphs) + "\n", encoding="utf-8")
    print(
        f"One document of {len(paragraphs)} facts ({document}); the right answer is '{question['answer']}':", flush=True
    )
    command = ["ask", "--max-new-tokens", "3", "--device", "cpu", "--prompt-template", "{documents} {question}"]
    command += ["--document", str(document), "--question", question["question"], "--model", *models]
    if subprocess.run([sys.executable, "-m", "megatron_solopo.cli", *command], check=False).returncode:
        raise UserError("command-failed", "asking all models failed; the message is above")


if __name__ == "__main__":
    sys.exit(run(main))
