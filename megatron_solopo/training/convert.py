"""`solopo convert-checkpoint`: weights from Hugging Face to Megatron and back, and a comparison with transformers.

Runs in one process, or under torchrun with any layout; layouts of the two sides need not be the same.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_solopo.arguments import Parser
from megatron_solopo.config import MAX_SHARD_SIZE, OWNER, Config, flag
from megatron_solopo.config_load import read_model_options
from megatron_solopo.conversion.manifest import mistaken
from megatron_solopo.conversion.places import check_apart, check_target, named_folder, restore
from megatron_solopo.errors import UserError

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
"""Of `LAYOUT`, what verify has no use for: it compares layer by layer, in one stage."""


RUN_OPTIONS = (
    *("chat_template", "chat_template_kwargs", "chat_template_date", "eos_token"),
    *("rope_scaling", "add_special_tokens"),
)
"""Of a run's config.yaml: what makes its model and tokenizer another than those of --hf-path."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see ``--help``. ``verify`` returns 1 where a difference is above its bound."""
    parser = Parser(description=__doc__.split("\n\n")[0].split(": ", 1)[1])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    to_megatron = _command(
        commands,
        "hf-to-megatron",
        "writes a Hugging Face folder's weights in megatron-core's format, which --hf-path of a training run takes",
    )
    to_megatron.add_argument("--hf-path", required=True, metavar="FOLDER", help="Hugging Face folder")
    to_megatron.add_argument("--save", required=True, metavar="FOLDER", help="the new Megatron folder")
    to_megatron.add_argument(
        flag("add_special_tokens"), metavar="TOKENS", help=OWNER["add_special_tokens"][1].metadata["help"]
    )

    to_hf = _command(
        commands, "megatron-to-hf", "writes a checkpoint of a run, or a Megatron folder, as a Hugging Face folder"
    )
    _add_checkpoint(to_hf, required=True)
    to_hf.add_argument("--save-hf", required=True, metavar="FOLDER", help="the new Hugging Face folder")
    to_hf.add_argument(
        "--max-shard-size", default=MAX_SHARD_SIZE, metavar="SIZE", help="of a file (default: %(default)s)"
    )

    for command in (to_megatron, to_hf):
        command.add_argument("--dtype", choices=DTYPES, help="of the weights written (default: as they are)")
        command.add_argument("--force", action="store_true", help="overwrite an existing folder")

    verify = _command(
        commands,
        "verify",
        "compares log-probs of tokens, and what each layer computes, with transformers on the same weights",
        without=STAGES,
    )
    _add_checkpoint(verify, required=False)
    verify.add_argument("--prompts", metavar="FILE", help="a text a line (default: three built-in ones)")
    verify.add_argument("--dtype", choices=DTYPES[:2], default="float32", help="of both models (default: %(default)s)")
    verify.add_argument(
        "--bound",
        type=float,
        help="largest difference of a log-prob, nats (default: 1e-3 in float32, else none)",
    )
    given = parser.parse_args(argv)
    work = {"hf-to-megatron": _to_megatron, "megatron-to-hf": _to_hf, "verify": _verify}[given.command]
    return _with_engine(given, work)


def _command(commands: Any, name: str, text: str, without: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where (default: auto)")
    command.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        metavar="N",
        help="as in training; default: the run's, else 128",
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
    command.add_argument("--load", required=required, metavar="FOLDER", help="run folder, or Megatron folder")
    command.add_argument("--ckpt-step", type=int, metavar="N", help="iteration (default: the latest)")
    command.add_argument(
        "--hf-path",
        required=not required,
        metavar="FOLDER",
        help="whose config and tokenizer these weights have (default: what the run started from)"
        if required
        else "Hugging Face folder that transformers loads; alone, it is converted in memory and compared with itself",
    )


def _with_engine(given: argparse.Namespace, work: Callable[[argparse.Namespace, Config, Any], int]) -> int:
    """Checks what needs no process group, then starts the platform and does the work."""
    from megatron_solopo.parallel import platform
    from megatron_solopo.training.preparation import quiet

    quiet()
    config = _config(given)
    if given.command != "verify":
        _check_target(given, config)
    here = platform.start(given.device)
    try:
        from megatron_solopo.conversion.start import model_config
        from megatron_solopo.model.build import padded_vocab_size
        from megatron_solopo.model.families import family_of
        from megatron_solopo.parallel.topology import check_layout, world_size
        from megatron_solopo.training.engine import initialize_parallel

        hf_config = model_config(config.model)
        family_of(hf_config)
        padded = padded_vocab_size(hf_config, config.model.make_vocab_size_divisible_by)
        check_layout(hf_config, config, padded, world_size())
        initialize_parallel(config)
        with platform.losses_explained():
            return work(given, config, hf_config)
    finally:
        platform.stop(here)


def _config(given: argparse.Namespace) -> Config:
    """The options as a training run would have them; those of a run folder come from its config.yaml."""
    config = Config()
    run: dict[str, Any] = {}
    if getattr(given, "load", None) is not None:
        if not Path(given.load).is_dir():
            raise UserError(f"--load {given.load}: no such folder")
        path = Path(given.load) / "config.yaml"
        run = read_model_options(path) if path.is_file() else {}
    alone = given.load if getattr(given, "load", None) and (Path(given.load) / "config.json").is_file() else None
    config.model.hf_path = given.hf_path or alone or run.get("hf_path")
    if config.model.hf_path is None:
        if remedy := mistaken(Path(given.load)):
            raise UserError(f"--load {given.load}: {remedy}")
        raise UserError(f"--hf-path is missing: {given.load} has no config.yaml that says what its run started from")
    for name in RUN_OPTIONS:
        setattr(config.model, name, run.get(name))
    if given.command == "verify":
        _leave_out_what_is_there(config)
    if getattr(given, "add_special_tokens", None) is not None:
        config.model.add_special_tokens = given.add_special_tokens
    for option in ("make_vocab_size_divisible_by", *LAYOUT):
        value = getattr(given, option)
        if value is not None and value < 1:
            raise UserError(f"{flag(option)} {value}: must be at least 1")
    config.model.make_vocab_size_divisible_by = (
        given.make_vocab_size_divisible_by
        or run.get("make_vocab_size_divisible_by")
        or config.model.make_vocab_size_divisible_by
    )
    for option in LAYOUT:
        setattr(config.parallel, option, getattr(given, option))
    # What changes no weight, but without which Megatron does not cut experts.
    config.parallel.sequence_parallel = config.parallel.tensor_model_parallel_size > 1
    return config


def _leave_out_what_is_there(config: Config) -> None:
    """An exported model's config and tokenizer hold a run's --rope-scaling and --add-special-tokens already."""
    from megatron_solopo.data.text.tokenizer import read_tokenizer
    from megatron_solopo.model.build import read_hf_config

    model = config.model
    if model.rope_scaling and read_hf_config(model.hf_path).rope_parameters.get("rope_type", "default") != "default":
        model.rope_scaling = None
    added = (model.add_special_tokens or "").split(",")
    if model.add_special_tokens and set(added) <= read_tokenizer(model.hf_path).get_vocab().keys():
        model.add_special_tokens = None


def _check_target(given: argparse.Namespace, config: Config) -> None:
    option, name = ("--save", given.save) if given.command == "hf-to-megatron" else ("--save-hf", given.save_hf)
    target = named_folder(option, name)
    check_apart(option, target, {"--load": getattr(given, "load", None), "--hf-path": config.model.hf_path})
    if os.environ.get("RANK", "0") == "0":
        restore(target)
    check_target(option, target, given.force)


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _to_megatron(given: argparse.Namespace, config: Config, hf_config: Any) -> int:
    import torch.distributed as dist

    from megatron_solopo.conversion.companions import Companions, config_json, dtype_name
    from megatron_solopo.conversion.hf_folder import TensorReader
    from megatron_solopo.conversion.megatron_folder import save_megatron_folder
    from megatron_solopo.conversion.start import is_megatron_folder, open_hf_weights
    from megatron_solopo.training.engine import build_chunks

    if is_megatron_folder(given.hf_path):
        raise UserError(f"--hf-path {given.hf_path}: holds Megatron's weights already")
    dtype = _dtype(given.dtype) if given.dtype else TensorReader(given.hf_path).dtype()
    models = build_chunks(hf_config, config, dtype)
    added = config.model.add_special_tokens
    weights = open_hf_weights(models, hf_config, given.hf_path, added)
    companions = Companions(Path(given.hf_path), config_json(given.hf_path, hf_config, dtype), added_tokens=added)
    save_megatron_folder(models, companions, Path(given.save), weights)
    if dist.get_rank() == 0:
        print(f"wrote {given.save} ({dtype_name(dtype)}); train from it with --hf-path {given.save}")
    return 0


def _chat_format(load: Path, config: Config) -> tuple[str | None, int | None]:
    """(the text of a run's --chat-template, if given, the id that ends its turns); (None, None) of a Megatron folder,
    whose files hold what is known."""
    from megatron_solopo.conversion.companions import generation_config
    from megatron_solopo.training.preparation import chosen_template, load_run_tokenizer

    if not (load / "config.yaml").is_file():
        return None, None
    template = config.model.chat_template
    if template is not None and not Path(template).is_file():
        raise UserError(
            f"--load {load}: the --chat-template {template} of its run is no longer there; put it back, or name "
            f"another in {load / 'config.yaml'}"
        )
    generation_config(Path(config.model.hf_path))  # can be read
    tokenizer = load_run_tokenizer(config.model)
    return chosen_template(config.model, tokenizer), tokenizer.eos_token_id


def _to_hf(given: argparse.Namespace, config: Config, hf_config: Any) -> int:
    import torch.distributed as dist

    from megatron_solopo.conversion.hf import save_folder
    from megatron_solopo.conversion.manifest import find_checkpoint
    from megatron_solopo.conversion.megatron_folder import stored_dtype, stored_weights
    from megatron_solopo.conversion.shards import parse_size
    from megatron_solopo.parallel.platform import first_error
    from megatron_solopo.training.engine import build_chunks

    parse_size(given.max_shard_size)
    chat_template, end_of_turn = _chat_format(Path(given.load), config)
    source = find_checkpoint(given.load, given.ckpt_step)
    models = build_chunks(hf_config, config, stored_dtype(source))
    stored = stored_weights(source, models)
    problem = None
    try:
        save_folder(
            models,
            hf_config,
            config.model.hf_path,
            given.save_hf,
            force=given.force,
            chat_template=chat_template,
            chat_template_kwargs=config.model.chat_template_kwargs,
            chat_template_date=config.model.chat_template_date,
            added_tokens=config.model.add_special_tokens,
            end_of_turn=end_of_turn,
            dtype=_dtype(given.dtype) if given.dtype else None,
            max_shard_size=given.max_shard_size,
            stored=stored,
        )
    except UserError as error:
        problem = str(error)
    if problem := first_error(problem):
        raise UserError(problem)
    if dist.get_rank() == 0:
        print(f"wrote {given.save_hf} from {source}")
    return 0


def _verify(given: argparse.Namespace, config: Config, hf_config: Any) -> int:
    from megatron_solopo.conversion.compare import compare, read_prompts, report
    from megatron_solopo.conversion.manifest import find_checkpoint
    from megatron_solopo.conversion.megatron_folder import load_weights_from
    from megatron_solopo.conversion.start import check_weights, is_megatron_folder, load_start
    from megatron_solopo.training.engine import build_chunks

    if given.bound is not None and not 0 <= given.bound < float("inf"):
        raise UserError(f"--bound {given.bound:g}: give nats, 0 or more")
    if given.ckpt_step is not None and given.load is None:
        raise UserError("--ckpt-step would have no effect: it needs --load")
    if is_megatron_folder(config.model.hf_path):
        raise UserError(
            f"--hf-path {config.model.hf_path}: holds Megatron's weights, which transformers does not load; give it as "
            "--load, and the Hugging Face folder here"
        )
    if config.model.add_special_tokens is not None:
        raise UserError(
            f"--load {given.load}: its run added special tokens, whose rows {config.model.hf_path} does not have; "
            "write the checkpoint with megatron-to-hf, and compare that folder with itself"
        )
    check_weights(config.model.hf_path)  # which transformers would miss in words of its own
    prompts = read_prompts(given.prompts, config.model.hf_path, hf_config)
    models = build_chunks(hf_config, config, _dtype(given.dtype))
    if given.load is None:
        load_start(models, hf_config, config.model.hf_path)
    else:
        load_weights_from(find_checkpoint(given.load, given.ckpt_step), models)
    found = compare(models[0], hf_config, config.model.hf_path, prompts)
    bound = given.bound if given.bound is not None else 1e-3 if given.dtype == "float32" else None
    return report(found, given.dtype, bound) if found is not None else 0
