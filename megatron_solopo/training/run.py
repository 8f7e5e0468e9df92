"""The life of a training run, from the command line to the Hugging Face folder."""

from __future__ import annotations

import os
import platform as machine
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from megatron_solopo import config_load
from megatron_solopo.config import Config
from megatron_solopo.errors import LostProcess, UserError, system_reason
from megatron_solopo.training.preparation import RunData, check_model, check_vocabulary, load_data, quiet, run_schedule


def main(argv: list[str] | None = None) -> int:
    """``pretrain_solopo.py`` and ``solopo train``."""
    config, dry_run = config_load.load(argv)
    quiet()
    if dry_run:
        from megatron_solopo.training.dry_run import describe

        if os.environ.get("RANK", "0") == "0":
            print(describe(config))
        return 0
    from megatron_solopo.parallel import platform
    from megatron_solopo.training.exits import note_sudden_death

    here = platform.start(config.parallel.device, config.parallel.distributed_timeout_minutes)
    try:
        with note_sudden_death(config.output.save, config.parallel.distributed_timeout_minutes):
            train(here, config)
    except RuntimeError as error:
        lost = platform.lost_process(error)
        if lost is None:
            raise
        raise LostProcess(
            f"{lost}; its own message says why, and a slow one needs a larger --distributed-timeout-minutes "
            f"(now {config.parallel.distributed_timeout_minutes:g}). {resume_hint(config)}"
        ) from None
    finally:
        platform.stop(here)
    return 0


def resume_hint(config: Config) -> str:
    """What to do after a run that died, in a sentence."""
    from megatron_solopo.conversion.manifest import latest_iteration

    iteration = latest_iteration(config.output.save)
    if iteration is None:
        return "No checkpoint was written yet: start the run again"
    return f"The checkpoint of step {iteration} is complete: go on with --auto-resume"


def train(here: Any, config: Config) -> None:
    """Trains; see the module's first line. ``here`` is the started platform.

    Raises:
        UserError: a mistake that was found before the first step, a loss that is not finite, or work that could not be
            saved at the end.
    """
    import torch.distributed as dist

    from megatron_solopo.losses.solopo import needs_reference
    from megatron_solopo.model.transformer_engine import check_machine
    from megatron_solopo.training import engine as engines
    from megatron_solopo.training import resume
    from megatron_solopo.training.checkpoint import Checkpoints, load_checkpoint
    from megatron_solopo.training.exits import StopRequests, tell_launcher
    from megatron_solopo.training.export import delete_earlier_exports, export_last_model, export_model
    from megatron_solopo.training.health import Watch, length_bias, no_transfer
    from megatron_solopo.training.log import RunLog
    from megatron_solopo.training.memory import PeakMemory
    from megatron_solopo.training.reference import reference_log_probs, shared, starting_weights
    from megatron_solopo.training.step import evaluate, train_step

    first = dist.get_rank() == 0
    training, output = config.training, config.output
    stop = StopRequests(output.exit_signal_handler, output.exit_duration_in_mins)
    tell_launcher("")
    resume.check_folders(config)
    hf_config = check_model(config)
    check_machine(config, here.name)
    data = load_data(config)
    check_vocabulary(data, hf_config.vocab_size)
    schedule = run_schedule(config, data)
    progress = resume.progress_of(schedule, data, config, hf_config)
    resumed = 0
    source = resume.find_start(config)
    if source is not None:
        before = resume.read_progress(source)
        resume.check_same_run(before, progress, config)
        resumed = before["iteration"]
    if resume.nothing_left(config, resumed, schedule.steps):
        if first:
            print(f"all {schedule.steps} steps are done and saved in {output.save}; nothing is left", file=sys.stderr)
        stop.close()
        return
    if needs_reference(config.method):  # reads all weights
        weights = shared(lambda: starting_weights(config))
        progress[resume.REFERENCE_WEIGHTS] = weights
        if source is not None:
            resume.check_reference(before, weights, config)
    engines.initialize_parallel(config)
    engine = engines.build_engine(here, hf_config, config)
    log = RunLog(output, schedule.steps, resumed, first, _effective(config))
    _announce(log, config, here, data, schedule)
    if bias := length_bias(data.train.chosen_rejected_lengths()):
        log.say(f"warning: {bias}")
    if note := no_transfer(config.method):
        log.say(f"note: {note}")
    if source is None:
        _begin(log, config, data)

    reference: dict[str, Any] = {"train": None, "valid": None}
    if needs_reference(config.method):  # before a checkpoint moves the weights away from the reference
        for split, dataset in data.reference.items():
            reference[split] = reference_log_probs(engine, dataset, config, weights, log.say, stop.heard)
            if reference[split] is None:
                reason = stop.agreed(here.device)
                stopped = f"stopped by {reason} before the first step"
                log.say(f"{stopped}; the reference log-probs so far are kept")
                tell_launcher(stopped)
                log.close()
                stop.close()
                return
    optimizer, scheduler = engines.build_optimizer(engine, training, schedule.steps)
    if source is None:
        delete_earlier_exports(config)
    else:
        rates = (training.lr, training.min_lr) if training.override_opt_param_scheduler else None
        load_checkpoint(source, engine, optimizer, scheduler, rates)
        _begin(log, config, data)  # not before: a checkpoint that cannot be loaded must not cost the metrics after it
        log.say(f"going on after step {resumed} of {schedule.steps} from {source}")
        if changed := resume.new_schedule(before, progress, config):
            log.say(changed)
        if first:
            resume.go_back(config)
    here_saved = resumed if source is not None and source.parent.resolve() == Path(output.save).resolve() else 0
    checkpoints = Checkpoints(config, engine, optimizer, scheduler, here_saved, progress)

    broken = engines.weights_not_finite(engine)  # a model may come with some, in rows that no token uses
    watch = Watch(training.spike_factor)
    watch.replay(log.earlier)
    engine.train()
    done, reason = resumed, stop.agreed(here.device)
    memory = PeakMemory(here)

    def validate() -> None:
        log.step({"step": done, "split": "valid"} | evaluate(engine, data.valid, config, reference["valid"]))

    def timed(split: str, save: Callable[..., Any], *arguments: Any) -> Any:
        """A save, with a line about its time and memory."""
        begin = time.perf_counter()
        with memory.apart(split):
            result = save(*arguments)
        seconds = round(time.perf_counter() - begin, 4)
        log.step({"step": done, "split": split, "seconds": seconds, "memory_gib": round(memory.of(split), 3)})
        return result

    if data.valid is not None and training.eval_on_start and source is None and not reason:
        validate()
    while done < schedule.steps and not reason:
        line = train_step(engine, optimizer, scheduler, data.train, schedule, done, config, reference["train"], memory)
        log.step(line, watch.see(line))
        done += 1
        last = done == schedule.steps
        lost = checkpoints.unsaved
        checkpoints.poll()
        if data.valid is not None and (last or _is_due(done, training.eval_interval)):
            validate()
        saves, exports = (not last and _is_due(done, n) for n in (output.save_interval, output.save_hf_interval))
        if saves or exports:
            _check_weights(engine, broken, done, checkpoints)
        if saves:
            timed("save", checkpoints.save, done)
        if checkpoints.unsaved not in (None, lost):
            log.say(f"warning: {checkpoints.unsaved}; training goes on")
        if exports:
            error = timed("export", export_model, engine, config, data, done)
            log.say(f"warning: {error}" if error else f"Hugging Face folder of step {done} in {output.save_hf}")
        reason = stop.agreed(here.device) if not last else None
    if done:
        _check_weights(engine, broken, done, checkpoints)
        if not checkpoints.has(done):
            timed("save", checkpoints.save_last, done)
    if watch.skipped:
        log.say(f"skipped {watch.skipped} steps whose loss or gradient was not finite (see metrics.jsonl)")
    if watch.skipped_in_a_row:
        log.say(
            f"warning: every step after step {done - watch.skipped_in_a_row} was skipped: the model is still that of "
            f"step {done - watch.skipped_in_a_row}; look at their examples, or start a new run with a lower --lr"
        )
    if clipped := watch.all_clipped():
        log.say(f"warning: {clipped}")
    stopped = f"stopped by {reason} after step {done} of {schedule.steps}" if reason else None
    if stopped and not checkpoints.unsaved:
        log.say(f"{stopped}; " + (f"saved in {output.save}" if done else "nothing was done yet"))
        tell_launcher(stopped)
    unfinished = None
    if output.save_hf and not stopped:
        unfinished = timed("export", export_last_model, engine, config, data, done)
        if not unfinished:
            log.say(f"Hugging Face folder: {output.save_hf}")
    peaks = ", ".join(f"{name} {memory.of(name):.2f} GiB" for name in memory.activities)
    log.say(f"peak memory of the largest process: {peaks}")
    log.close()
    stop.close()
    engine.close()
    problems = [text for text in (stopped, checkpoints.unsaved, unfinished) if text]
    if checkpoints.unsaved or unfinished:
        raise UserError("; ".join(problems))


def _check_weights(engine: Any, broken: int, step: int, checkpoints: Any) -> None:
    """Refuses to save weights that training broke: a checkpoint is to be gone on from. Collective.

    Args:
        broken: numbers that were not finite when this start began.
    """
    from megatron_solopo.training.engine import weights_not_finite

    found = weights_not_finite(engine) - broken
    if found > 0:
        checkpoints.finish()
        raise UserError(
            f"step {step}: the weights are not finite any more; they are not saved, and earlier "
            "checkpoints are kept: start a new run with a lower --lr or a larger --adam-eps"
        )


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _announce(log: Any, config: Config, here: Any, data: RunData, schedule: Any) -> None:
    from megatron_solopo.data.tokenized.batches import above_the_token_limit

    train = data.train
    log.say(
        f"{len(train.groups)} examples, {schedule.steps} steps of {schedule.global_batch_size}"
        + (
            f", last step {schedule.total % schedule.global_batch_size}"
            if schedule.total % schedule.global_batch_size
            else ""
        )
        + "; values of a step are means over its examples"
    )
    for split, dataset in (("train", train), ("valid", data.valid)):
        for line in dataset.report.lines(config.data.seq_length) if dataset is not None else ():
            log.say(f"{split}: {line}")
        if dataset is not None and (above := above_the_token_limit(dataset.groups, config, here.name)):
            log.say(f"warning: {split}: {above}")


def _begin(log: Any, config: Config, data: RunData) -> None:
    """Makes the run folder's files those of this start."""
    import torch.distributed as dist

    log.begin()
    if dist.get_rank() == 0:
        _write_settings(Path(config.output.save), config)
        _write_overlong(Path(config.output.save), data)


def _write_settings(folder: Path, config: Config) -> None:
    """config.yaml: the resolved options, readable by --config; versions.yaml: what they ran on."""
    from importlib.metadata import version

    options = {
        section: {k: v for k, v in values.items() if v is not None} for section, values in _effective(config).items()
    }
    versions = {name: version(name) for name in ("torch", "megatron-core", "transformers")}
    versions |= {
        "python": machine.python_version(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "command": sys.argv,
    }
    for name, document in (("config.yaml", options), ("versions.yaml", versions)):
        try:
            (folder / name).write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--save {folder}: {name} cannot be written ({system_reason(error)})") from None


def _write_overlong(folder: Path, data: RunData) -> None:
    """overlong.jsonl: every example that was dropped or cut for its length, where there are any."""
    from megatron_solopo.data.files.records import write_jsonl
    from megatron_solopo.data.tokenized.token_store import overlong_records

    reports = {"train": data.train.report} | ({"valid": data.valid.report} if data.valid is not None else {})
    records = [{"split": split} | record for split, report in reports.items() for record in overlong_records(report)]
    try:
        if records:
            write_jsonl(folder / "overlong.jsonl", records)
        else:
            (folder / "overlong.jsonl").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--save {folder}: overlong.jsonl cannot be written ({system_reason(error)})") from None


def _effective(config: Config) -> dict[str, dict[str, Any]]:
    """Options without those that have no effect in this run, so that config.yaml is accepted again."""
    from megatron_solopo.config_checks import unused

    idle = unused(config)
    return {section: {k: v for k, v in values.items() if k not in idle} for section, values in config.as_dict().items()}
