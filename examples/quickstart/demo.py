"""The whole method on one small machine: questions, a base model, pairs, three ways to train, accuracy by length.

Every stage is a command of the project, printed before it runs. Finished stages are skipped when the demo is
started again with the same settings.

    python examples/quickstart/demo.py [--quick] [--output runs/demo] [--seed 0]
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig

from megatron_solopo.arguments import Parser
from megatron_solopo.cli import run
from megatron_solopo.errors import UserError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PROMPT = ["--document-template", "{text}", "--document-separator", " ", "--prompt-template", "{documents} {question}"]


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo.

    Attributes:
        echoes, lookups: conversations the base learns from, each once.
        questions: questions to sample responses for.
        eval_questions: questions asked at every length.
        samples: responses a question.
        steps: optimizer steps of each preference run, 32 groups each.
        processes: training processes at a time.
        at_once: preference runs side by side, which share those processes. One each saves half of the start-ups,
            which are most of a short run.
        short, long: facts in the contexts that pairs are sampled on, and in those that are aligned with them.
        lengths: facts in the contexts of the evaluation.
    """

    echoes: int = 11200
    lookups: int = 640
    questions: int = 2560
    eval_questions: int = 512
    samples: int = 32
    steps: int = 200
    processes: int = 2
    at_once: int = 1
    short: int = 8
    long: int = 64
    lengths: tuple[int, ...] = (8, 16, 32, 64)


QUICK = Settings(questions=768, eval_questions=128, steps=45, at_once=2, long=32, lengths=(8, 16, 32))

ORPO = "--preference-loss orpo"
METHODS = {
    "short-PO": f"{ORPO} --context-mode short",
    "long-PO": f"{ORPO} --context-mode long",
    "SoLo": f"{ORPO} --context-mode solo --alignment-weight 1",
    "SoLo, short side stopped": f"{ORPO} --context-mode solo --alignment-weight 1 --alignment-stop-short-gradient",
}
"""Label -> what sets it apart; all start from the same base and train on the same groups."""


class Stages:
    """Runs commands one after the other, and remembers which are done. A stage that runs again makes those after it
    run again, since they read what it writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.begin = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.fingerprint = ""

    def run(self, name: str, budget: float, *commands: list[str], remakes: Sequence[Path] = ()) -> None:
        """Runs the commands side by side; ``budget`` is what they should take on 2 idle cores, in seconds.

        Args:
            remakes: the run folders that the stage makes; what an unfinished or other run left there goes first.

        Raises:
            UserError: a command failed; the stages before it stay done.
        """
        marker = self.folder / ".stages" / f"{name.replace(' ', '-').replace(',', '')}.json"
        self.fingerprint = hashlib.sha256(json.dumps([self.fingerprint, *commands]).encode()).hexdigest()
        if marker.is_file() and (done := json.loads(marker.read_text()))["fingerprint"] == self.fingerprint:
            self.seconds[name] = done["seconds"]
            print(f"[{self._clock()}] {name}: done before ({done['seconds']:.0f} s)", flush=True)
            return
        print(f"\n[{self._clock()}] {name} (about {budget:.0f} s)", flush=True)
        for run_folder in remakes:
            shutil.rmtree(run_folder, ignore_errors=True)
        begin = time.monotonic()
        running = []
        for command in commands:
            print("  $ " + readable(command), flush=True)
            running.append(subprocess.Popen(command, cwd=ROOT, env=environment(len(commands))))
        codes = [process.wait() for process in running]
        for command, code in zip(commands, codes, strict=True):
            if code:
                raise UserError(
                    f"stage '{name}' failed with exit code {code}: {readable(command)}; finished stages are kept, "
                    "run the demo again to go on from here"
                )
        self.seconds[name] = time.monotonic() - begin
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps({"fingerprint": self.fingerprint, "seconds": self.seconds[name]}))
        print(f"[{self._clock()}] {name}: {self.seconds[name]:.0f} s", flush=True)

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.begin), 60)
        return f"{minutes:02d}:{seconds:02d}"


def environment(side_by_side: int) -> dict[str, str]:
    """One thread a training process; a lone command takes all cores."""
    threads = max(1, (os.cpu_count() or 1) // max(side_by_side, 1))
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # loading takes no time here
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONWARNINGS": "ignore",
    }


def readable(command: list[str]) -> str:
    """The command as a person would type it in the project's folder."""
    short = {sys.executable: "python"}
    text = shlex.join(short.get(word, word.removeprefix(f"{ROOT}/")) for word in command)
    text = text.replace("python -m torch.distributed.run", "torchrun")
    return text.replace("python -m megatron_solopo.cli", "solopo")


def words(command: str, **values: object) -> list[str]:
    """The words of a command line; ``{name}`` becomes a value, whatever spaces it holds."""
    return [word.format(**values) for word in shlex.split(command)]


def solopo(command: str, **values: object) -> list[str]:
    """``solopo COMMAND ...``."""
    return [sys.executable, "-m", "megatron_solopo.cli", *words(command, **values)]


def train(command: str, processes: int, **values: object) -> list[str]:
    """A training run under torchrun, one thread a process."""
    launch = ["env", "OMP_NUM_THREADS=1", sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc_per_node", str(processes), str(ROOT / "pretrain_solopo.py")]
    return launch + words(command, **values)


def write_initial_model(folder: Path, tokenizer_folder: Path) -> None:
    """config.json of a tiny Llama beside the demo's tokenizer; two layers look a fact up: one marks, one finds."""
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.01,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--output", default=str(ROOT / "runs" / "demo"), metavar="DIR", help="everything the demo makes"
    )
    parser.add_argument("--seed", type=int, default=0, help="of questions, samples, pairs and training order")
    parser.add_argument(
        "--quick", action="store_true", help="fewer questions and steps, about 3 minutes; accuracies are rougher"
    )
    options = parser.parse_args(argv)
    folder = Path(options.output_dir).resolve()
    settings = QUICK if options.quick else Settings()
    if options.quick:
        folder = folder.with_name(folder.name + "-quick")
    folder.mkdir(parents=True, exist_ok=True)
    stages = Stages(folder)
    build(stages, settings, folder, options.seed)
    evaluate_and_report(stages, settings, folder)
    return 0


def build(stages: Stages, settings: Settings, folder: Path, seed: int) -> None:
    """Questions, base model, pairs, and one model a method."""
    data, base = folder / "data", folder / "base-hf"
    names = vars(settings) | {"data": data, "base": base, "folder": folder, "seed": seed}
    questions = """--output {data} --seed {seed} --echoes {echoes} --lookups {lookups}
        --train-questions {questions} --eval-questions {eval_questions}"""
    stages.run("questions", 3, [sys.executable, str(HERE / "facts.py"), *words(questions, **names)])
    if not (folder / "initial" / "config.json").is_file():
        write_initial_model(folder / "initial", data / "tokenizer")
    sft = """--hf-path {folder}/initial --random-init --objective sft
        --train-data {data}/conversations.jsonl --no-shuffle --seq-length 512 --train-iters {iters}
        --global-batch-size 32 --micro-batch-size 16 --lr 2e-3 --lr-decay-style constant --lr-warmup-fraction 0.27
        --weight-decay 0.01 --seed {seed} --log-interval 100 --save {folder}/base --save-hf {base} --overwrite"""
    iters = (settings.echoes + settings.lookups) // 32
    stages.run("base", 55, train(sft, iters=iters, **names), remakes=[folder / "base"])
    contexts = """prepare-data --data {data}/train.jsonl --tokenizer {base} --short-documents {short}
        --long-documents {long} --seed {seed} --output {folder}/contexts.jsonl"""
    stages.run("contexts", 12, solopo(contexts, **names) + PROMPT)
    sample = """sample-responses --contexts {folder}/contexts.jsonl --model {base} --samples {samples} --temperature 1.0
        --max-new-tokens 3 --batch-size 1024 --seed {seed} --output {folder}/responses.jsonl --overwrite"""
    stages.run("responses", 10, solopo(sample, **names))
    pairs = """build-pairs --contexts {folder}/contexts.jsonl --responses {folder}/responses.jsonl --seed {seed}
        --output {folder}/groups.jsonl"""
    stages.run("pairs", 2, solopo(pairs, **names))
    for some in batched(METHODS, settings.at_once):
        budget = sum(15 + settings.steps * (0.1 if "short" in label else 0.4) for label in some) / settings.at_once
        commands = [preference(settings, folder, slug(label), seed, METHODS[label]) for label in some]
        stages.run(" and ".join(some), budget, *commands, remakes=[folder / slug(label) for label in some])


def preference(settings: Settings, folder: Path, name: str, seed: int, options: str) -> list[str]:
    """A preference run from the demo's base on the demo's groups."""
    command = """--hf-path {folder}/base-hf --train-data {folder}/groups.jsonl --seq-length 512 --train-iters {steps}
        --global-batch-size 32 --micro-batch-size 16 --lr 6e-4 --lr-warmup-fraction 0.05 --seed {seed}
        --log-interval 50 --save {folder}/{name} --save-hf {folder}/{name}-hf --overwrite"""
    values = vars(settings) | {"processes": settings.processes // settings.at_once}
    return train(f"{command} {options}", **values, folder=folder, name=name, seed=seed)


def evaluation(settings: Settings, folder: Path, name: str) -> list[str]:
    """Accuracy of one of the demo's models at every length."""
    command = """evaluate --model {folder}/{name}-hf --data {folder}/data/eval.jsonl --context-documents {lengths}
        --max-new-tokens 3 --device cpu --output {folder}/evaluation/{name}.json"""
    return solopo(command, folder=folder, name=name, lengths=",".join(map(str, settings.lengths))) + PROMPT


def slug(label: str) -> str:
    """A label as a folder's name."""
    return label.lower().replace(", short side stopped", "-stopped")


def evaluate_and_report(stages: Stages, settings: Settings, folder: Path) -> None:
    """Accuracy by length of the base and every method, the report, one document answered by all."""
    from megatron_solopo.evaluation.report import accuracy_table, write_report
    from megatron_solopo.evaluation.results import read_evaluation, read_run

    models = {"base": folder / "base-hf"} | {label: folder / f"{slug(label)}-hf" for label in METHODS}
    results = {label: folder / "evaluation" / f"{slug(label)}.json" for label in models}
    for some in batched(models, 2):
        stages.run("evaluate " + " and ".join(some), 12, *(evaluation(settings, folder, slug(label)) for label in some))
    evaluations = [read_evaluation(f"{label}={path}") for label, path in results.items()]
    runs = [read_run(f"{label}={folder / slug(label)}") for label in ("base", *METHODS)]
    table = accuracy_table(evaluations, "documents")
    groups = sum(1 for _ in (folder / "groups.jsonl").open())
    text = (
        f"sub-EM by the number of facts in the context, {settings.eval_questions} questions asked at each length, "
        "95 % interval. "
        f"{groups} preference groups from {settings.questions} questions; pairs sampled on {settings.short} facts, "
        f"long contexts of {settings.long}."
    )
    commands = next_commands()
    report, _ = write_report(
        folder / "report.md",
        runs,
        evaluations,
        title="SoLoPO on invented facts",
        text=text,
        closing="## Next\n\n" + commands,
    )
    print(f"\n{text}\n\n{table}\n")
    show_answers(folder, models)
    print(
        f"\nThe report, with plots: {report.relative_to(Path.cwd()) if report.is_relative_to(Path.cwd()) else report}"
    )
    print(
        f"Time of the stages: {sum(stages.seconds.values()):.0f} s\n\n"
        f"Next, for a model and questions of your own:\n\n{commands}"
    )


def show_answers(folder: Path, models: dict[str, Path]) -> None:
    """One long document, answered by every model; the first question of the evaluation set, whoever is right."""
    question = json.loads((folder / "data" / "eval.jsonl").open(encoding="utf-8").readline())
    document = folder / "document.txt"
    document.write_text(
        " ".join(paragraph["paragraph_text"] for paragraph in question["paragraphs"]) + "\n", encoding="utf-8"
    )
    print(
        f"One document of {len(question['paragraphs'])} facts ({document.name}); "
        f"the right answer is '{question['answer']}':",
        flush=True,
    )
    command = solopo(
        "ask --max-new-tokens 3 --device cpu --prompt-template {template}", template="{documents} {question}"
    )
    command += ["--document", str(document), "--question", question["question"], "--model", *map(str, models.values())]
    print("  $ " + readable(command), flush=True)
    if subprocess.run(command, cwd=ROOT, env=environment(1), check=False).returncode:
        raise UserError("the last stage, asking all models, failed; its message is above")


def next_commands() -> str:
    """Three commands for an own model."""
    return textwrap.indent(
        """\
solopo prepare-data --data QUESTIONS.jsonl --tokenizer MODEL --short-tokens 1024 --long-tokens 8192 \\
    --output contexts.jsonl
solopo sample-responses --contexts contexts.jsonl --model MODEL --output responses.jsonl && \\
    solopo build-pairs --contexts contexts.jsonl --responses responses.jsonl --output groups.jsonl
torchrun --nproc_per_node 8 pretrain_solopo.py --hf-path MODEL --train-data groups.jsonl \\
    --preference-loss orpo --bf16 --seq-length 8704 --train-epochs 1 --save runs/solo --save-hf runs/solo-hf""",
        "    ",
    )


if __name__ == "__main__":
    sys.exit(run(main))
