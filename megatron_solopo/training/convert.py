"""`solopo convert-checkpoint`: weights from Hugging Face to Megatron and back, and a comparison with transformers.

Runs in one process, or under torchrun with any layout; layouts of the two sides need not be the same.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from megatron_solopo.arguments import Parser
from megatron_solopo.config import MAX_SHARD_SIZE, OWNER, Config, flag
from megatron_solopo.config_load import read_model_options
from megatron_solopo.conversion.doctor import diagnose
from megatron_solopo.conversion.manifest import mistaken
from megatron_solopo.conversion.places import check_apart, check_target, named_folder, restore
from megatron_solopo.data.text.tokenizer import read_tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.lora_options import OF_FOLDER
from megatron_solopo.model.hf_config import read_hf_config
from megatron_solopo.parallel import platform

DESCRIPTION = "Weights from Hugging Face to Megatron and back, and a comparison with transformers."
DTYPES = ("float32", "bfloat16", "float16")
LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_virtual_stages_per_pipeline_rank",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
STAGES = (
    "pipeline_model_parallel_size",
    "num_virtual_stages_per_pipeline_rank",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
)
"""Options of `LAYOUT` that verify does not have: it compares layer by layer, in one stage."""


RUN_OPTIONS = (
    *("chat_template", "chat_template_kwargs", "chat_template_date", "eos_token"),
    *("rope_scaling", "add_special_tokens"),
    *(*OF_FOLDER, "lora_dropout"),
)
"""Options of a run's config.yaml by which its model and tokenizer differ from those of --hf-path."""


def build_parser() -> Parser:
    parser = Parser(config=False, description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    to_megatron = _command(
        commands,
        "hf-to-megatron",
        "writes a Hugging Face folder's weights in megatron-core's format, for --hf-path of a training run",
    )
    to_megatron.add_argument("--hf-path", required=True, metavar="FOLDER", help="Hugging Face folder")
    to_megatron.add_argument("--save", required=True, metavar="FOLDER", help="the new Megatron folder")
    to_megatron.add_argument(
        flag("add_special_tokens"), metavar="TOKENS", help=OWNER["add_special_tokens"][1].metadata["help"]
    )

    to_megatron.add_argument(
        "--dry-run",
        action="store_true",
        help="print what this conversion and the way back would read, write and hold in memory, by config.json alone",
    )

    rewrite = _command(
        commands,
        "megatron-to-megatron",
        "writes a checkpoint of a run, of Megatron-LM or of Megatron-Bridge as a Megatron folder, which they load too",
    )
    _add_checkpoint(rewrite, required=True)
    rewrite.add_argument("--save", required=True, metavar="FOLDER", help="the new Megatron folder")

    to_hf = _command(
        commands,
        "megatron-to-hf",
        "writes a checkpoint of a run, of Megatron-LM or of Megatron-Bridge, or a Megatron folder, as a Hugging Face "
        "folder",
    )
    _add_checkpoint(to_hf, required=True)
    to_hf.add_argument("--save-hf", required=True, metavar="FOLDER", help="the new Hugging Face folder")
    to_hf.add_argument(
        "--max-shard-size",
        default=MAX_SHARD_SIZE,
        metavar="SIZE",
        help="largest size of a weights file (default: %(default)s)",
    )

    export = OWNER["lora_export"][1]
    to_hf.add_argument(
        flag("lora_export"),
        choices=export.metadata["choices"],
        help=export.metadata["help"].replace("--save-hf holds after LoRA", "is written of a run with LoRA")
        + f" (default: {export.default})",
    )
    for command in (to_megatron, rewrite, to_hf):
        command.add_argument("--dtype", choices=DTYPES, help="type of the written weights (default: unchanged)")
        command.add_argument("--overwrite", action="store_true", help="overwrite an existing folder")

    verify = _command(
        commands,
        "verify",
        "compares log-probs of tokens, and what each layer computes, with transformers on the same weights",
        without=STAGES,
    )
    _add_checkpoint(verify, required=False)
    verify.add_argument(
        "--prompts", metavar="FILE", help="text file with one prompt a line (default: three built-in prompts)"
    )
    verify.add_argument(
        "--dtype", choices=DTYPES[:2], default="float32", help="type of both models' weights (default: %(default)s)"
    )
    verify.add_argument(
        "--bound",
        type=float,
        help="largest difference of a log-prob, nats (default: 1e-3 in float32, else none)",
    )
    text = "reports which fields of config.json and which weights are not understood, and the nearest family"
    doctor = commands.add_parser("doctor", help=text, description=text[0].upper() + text[1:] + ".")
    doctor.add_argument("model", metavar="MODEL", help="Hugging Face folder, with or without weights")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``. ``verify`` returns 1 where a difference is above its bound, ``doctor`` where
    the folder cannot be loaded."""
    options = build_parser().parse_args(argv)
    if options.command == "doctor":
        diagnosis = diagnose(options.model)
        for line in diagnosis.lines:
            print(line)
        return int(not diagnosis.understood)
    return _run(options)


def _command(
    commands: argparse._SubParsersAction[Parser], name: str, text: str, without: tuple[str, ...] = ()
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="device to compute on (default: auto)"
    )
    command.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        metavar="N",
        help="the vocabulary is padded to a multiple of N, as in training; default: the run's, else 128",
    )
    command.set_defaults(**{option: OWNER[option][1].default for option in without})
    for option in (option for option in LAYOUT if option not in without):
        spec = OWNER[option][1]
        default = "" if spec.default is None else f" (default: {spec.default})"
        command.add_argument(
            flag(option), type=int, metavar="N", default=spec.default, help=spec.metadata["help"] + default
        )
    return command


def _add_checkpoint(command: argparse.ArgumentParser, required: bool) -> None:
    command.add_argument(
        "--load",
        required=required,
        metavar="FOLDER",
        help="run folder, Megatron folder, or folder of Megatron-LM's or Megatron-Bridge's checkpoints",
    )
    command.add_argument("--ckpt-step", type=int, metavar="N", help="iteration of the checkpoint (default: the latest)")
    command.add_argument(
        "--hf-path",
        required=not required,
        metavar="FOLDER",
        help="Hugging Face folder with config and tokenizer of these weights; other trainers' checkpoints need it "
        "(default: that of the run's start)"
        if required
        else "Hugging Face folder that transformers loads; alone, it is converted in memory and compared with itself",
    )


def _run(options: argparse.Namespace) -> int:
    """Checks what needs no process group, starts the platform and runs the command."""
    config = _config(options)
    if options.command != "verify":
        _check_target(options, config)
    if getattr(options, "dry_run", False):
        print(_plan(options, config))
        return 0
    started = platform.start(options.device)
    try:
        # After the start of the platform, see run.py.
        from megatron_solopo.training.convert_weights import convert

        with platform.explain_lost_process():
            return convert(options, config)
    finally:
        platform.stop(started)


def _plan(options: argparse.Namespace, config: Config) -> str:
    """Returns what a conversion would read, write and hold; one process is rehearsed for all of the layout."""
    from megatron_solopo.planning.conversion import describe  # planning builds on training
    from megatron_solopo.training.preflight import read_model

    return describe(Path(options.save), config, read_model(config), options.dtype)


def _config(options: argparse.Namespace) -> Config:
    """Returns the options as those of a training run; a run folder's are read from its config.yaml."""
    config = Config()
    run: dict[str, Any] = {}
    if getattr(options, "load", None) is not None:
        if not Path(options.load).is_dir():
            raise UserError("folder-missing", f"--load {options.load}: no such folder")
        path = Path(options.load) / "config.yaml"
        run = read_model_options(path) if path.is_file() else {}
    alone = options.load if getattr(options, "load", None) and (Path(options.load) / "config.json").is_file() else None
    hf_path = options.hf_path or alone or run.get("hf_path")
    if hf_path is None:
        if remedy := mistaken(Path(options.load)):
            raise UserError("checkpoint-missing", f"--load {options.load}: {remedy}")
        raise UserError(
            "option-missing",
            f"--hf-path is missing: {options.load} has no config.yaml that names the folder its run started from",
        )
    config.model.hf_path = hf_path
    for name in RUN_OPTIONS:
        setattr(config.model, name, run.get(name))
    if options.command == "verify":
        _drop_applied_options(config)
    if getattr(options, "add_special_tokens", None) is not None:
        config.model.add_special_tokens = options.add_special_tokens
    for option in ("make_vocab_size_divisible_by", *LAYOUT):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise UserError("option-value", f"{flag(option)} {value}: must be at least 1")
    config.model.make_vocab_size_divisible_by = (
        options.make_vocab_size_divisible_by
        or run.get("make_vocab_size_divisible_by")
        or config.model.make_vocab_size_divisible_by
    )
    for option in LAYOUT:
        setattr(config.parallel, option, getattr(options, option))
    # It changes no weight, but without it Megatron does not shard experts.
    config.parallel.sequence_parallel = config.parallel.tensor_model_parallel_size > 1
    return config


def _drop_applied_options(config: Config) -> None:
    """Removes a run's --rope-scaling and --add-special-tokens where an exported model's files contain them."""
    model = config.model
    if model.rope_scaling and read_hf_config(model.hf_path).rope_parameters.get("rope_type", "default") != "default":
        model.rope_scaling = None
    added = (model.add_special_tokens or "").split(",")
    if model.add_special_tokens and set(added) <= read_tokenizer(model.hf_path).get_vocab().keys():
        model.add_special_tokens = None


def _check_target(options: argparse.Namespace, config: Config) -> None:
    option, name = ("--save", options.save) if "save" in options else ("--save-hf", options.save_hf)
    target = named_folder(option, name)
    check_apart(option, target, {"--load": getattr(options, "load", None), "--hf-path": config.model.hf_path})
    if os.environ.get("RANK", "0") == "0":
        restore(target)
    check_target(option, target, options.overwrite)
