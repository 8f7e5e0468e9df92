"""One case in a process of its own: the job that the process reads, its model and data, and the result it writes."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_solopo.benchmark.cases import MODELS, SFT, SOLOPO, Case, Setting, config_of_model
from megatron_solopo.data.files.records import write_jsonl
from megatron_solopo.errors import UserError
from megatron_solopo.json_text import loads

PROMPT_EXTRA, RESPONSE_EXTRA = 2, 1
"""Tokens that the chat template of `mock_data.write_tokenizer` adds."""


@dataclass(frozen=True)
class Job:
    """What a process measures.

    Attributes:
        folder: an empty folder of its own.
        warm: steps that are not timed. The first makes Adam's moments.
        profile: whether one more step is profiled.
    """

    setting: Setting
    case: Case
    folder: str
    warm: int = 1
    steps: int = 2
    profile: bool = False

    @property
    def model(self) -> Path:
        """Folder of config.json and tokenizer."""
        return Path(self.folder) / "model"

    @property
    def data(self) -> Path:
        """The examples of a step."""
        return Path(self.folder) / "train.jsonl"

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Job:
        fields: dict[str, Any] = loads(path.read_text(encoding="utf-8"))
        case = fields.pop("case")
        case = Case(**{**case, "options": tuple(case["options"])})
        return cls(Setting(**fields.pop("setting")), case, **fields)


def model_fields(setting: Setting) -> dict[str, Any]:
    """Returns the fields of config.json.

    Raises:
        UserError: it is neither one of `MODELS` nor a folder or file that can be read.
    """
    if setting.model in MODELS:
        return config_of_model(setting.model, setting.vocab_size)
    path = Path(setting.model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            "file-missing",
            f"--model {setting.model}: neither one of {', '.join(MODELS)} nor a folder with config.json",
        )
    return loads(path.read_text(encoding="utf-8-sig"))


def write_inputs(job: Job) -> None:
    """Writes the model's config, a tokenizer of words, and the examples of a step."""
    from megatron_solopo.training.mock_data import examples, write_tokenizer

    setting, case = job.setting, job.case
    job.model.mkdir(parents=True)
    (job.model / "config.json").write_text(json.dumps(model_fields(setting)), encoding="utf-8")
    write_tokenizer(job.model)
    long, short = (count - PROMPT_EXTRA for count in (setting.long, setting.short))
    response, sft = setting.response - RESPONSE_EXTRA, case.mode == SFT
    prompt = short if case.on_short else long
    write_jsonl(
        job.data, examples(sft, prompt, short, response, setting.pairs, 0, chosen=case.chosen, rejected=case.rejected)
    )


def options_of(job: Job) -> list[str]:
    """Returns the command line of `solopo train` of a case."""
    setting, case, folder = job.setting, job.case, Path(job.folder)
    words = [
        "--hf-path", job.model, "--random-init", "--train-data", job.data, "--data-cache", folder / "tokens",
        "--save", folder / "run", "--seq-length", max(setting.long, setting.short) + setting.response,
        "--train-iters", 1000, "--global-batch-size", setting.pairs, "--device", setting.device,
    ]  # fmt: skip
    words += [] if case.as_shipped else ["--micro-batch-size", 1]
    words += ["--bf16"] if setting.bf16 else []
    words += ["--recompute-granularity", "full"] if case.recompute else []
    words += [] if case.share or case.mode == SFT else ["--no-share-prompts"]
    words += (
        ["--objective", "sft"] if case.mode == SFT else ["--preference-loss", case.loss, "--context-mode", case.mode]
    )
    return [*map(str, words), *case.options]


def main(argv: list[str]) -> int:
    """``python -m megatron_solopo.benchmark.jobs JOB RESULT``: measures the case of a job file, writes its result."""
    job = Job.read(Path(argv[0]))
    if job.case.side == SOLOPO:
        from megatron_solopo.benchmark.training import measure
    else:
        from megatron_solopo.benchmark.trl import measure
    result: dict[str, Any] = measure(job)
    Path(argv[1]).write_text(json.dumps(result), encoding="utf-8")
    return 0


def synchronize(device: str) -> None:
    """Waits until the device has done its work."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def ceiling(bf16: bool, device: str) -> dict[str, float]:
    """Returns the operations a second of the fastest of several products of two square matrices, by the clock
    (``seconds``) and by the process's processor time (``cpu``)."""
    import torch

    side = 8192 if device == "cuda" else 1536
    kind = torch.bfloat16 if bf16 else torch.float32
    left, right = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
    wall, cpu = list[float](), list[float]()
    for _ in range(8):
        synchronize(device)
        start, used = time.perf_counter(), time.process_time()
        torch.mm(left, right)
        synchronize(device)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    return {"seconds": 2 * side**3 / min(wall), "cpu": 2 * side**3 / max(min(cpu), 1e-9)}


if __name__ == "__main__":
    from megatron_solopo.cli import run

    sys.exit(run(lambda argv: main(argv or sys.argv[1:])))
