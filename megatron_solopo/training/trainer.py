"""A training run, from its checks to its exit.

`train` runs the checks, then a `Trainer`; its methods in order (`__init__`, `train`, `score_reference`, `start`,
`train_step`, `validate`, `save`, `close`) are the run. All of them are collective: every rank calls them in the same
order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch.distributed as dist

from megatron_solopo.config import Config
from megatron_solopo.conversion.manifest import checkpoint_folder
from megatron_solopo.data.files.records import write_jsonl
from megatron_solopo.errors import Diverged, UserError
from megatron_solopo.losses.solopo import needs_reference
from megatron_solopo.model.lora import without_adapters
from megatron_solopo.parallel.platform import Platform, first_error, run_on_rank0
from megatron_solopo.terminal import write_line
from megatron_solopo.training import answers, export, profiling, resume, run_identity, step
from megatron_solopo.training import engine as engines
from megatron_solopo.training.answers import HeldOut
from megatron_solopo.training.best import FILE, Best
from megatron_solopo.training.checkpoint import Checkpoints, load_checkpoint
from megatron_solopo.training.exits import StopRequests, note_sudden_death, report_to_launcher
from megatron_solopo.training.log import Line, RunLog
from megatron_solopo.training.memory import PeakMemory
from megatron_solopo.training.monitoring import Watch
from megatron_solopo.training.preflight import Preflight, preflight
from megatron_solopo.training.reference import has_cache, reference_log_probs, shared
from megatron_solopo.training.resident import ResidentReference, scored_training_work
from megatron_solopo.training.run_folder import effective, write_metric_labels, write_overlong, write_settings
from megatron_solopo.training.segment_table import ReferenceLogProbs
from megatron_solopo.training.start_lines import start_lines
from megatron_solopo.training.step_work import training_work
from megatron_solopo.training.stragglers import RankTimes


def train(platform: Platform, config: Config) -> None:
    """Trains on the started platform; collective.

    Raises:
        UserError: a check before the first step failed, the loss is not finite, or the model could not be saved at the
            end.
    """
    with note_sudden_death(config.output.save, config.parallel.distributed_timeout_minutes):
        stop = StopRequests(config.output.exit_signal_handler, config.output.exit_duration_in_mins)
        try:
            report_to_launcher("")
            plan = preflight(config)
            if not plan.nothing_left:
                Trainer(platform, config, plan, stop).train()
            elif dist.get_rank() == 0:
                steps = plan.inputs.schedule.steps
                write_line(f"all {steps} steps are done and saved in {config.output.save}; nothing is left")
        finally:
            stop.close()


class Trainer:
    """Engine, data, log and checkpoints of a run on this rank.

    Args:
        plan: result of `preflight`.
        stop: requests to stop before the last step.

    Attributes:
        done: number of steps whose update is in the weights.
        reason: why the run stops before its last step, or None.
        drafts: the last answer to each question of --eval-generate, see answers.py.
        best: the best evaluation so far, with --save-best.
    """

    def __init__(self, platform: Platform, config: Config, plan: Preflight, stop: StopRequests) -> None:
        self.platform, self.config, self.plan, self.stop = platform, config, plan, stop
        self.data, self.schedule = plan.inputs.data, plan.inputs.schedule
        self.done = plan.resumed
        self.reason: str | None = None
        self.reference: dict[str, ReferenceLogProbs | None] = {"train": None, "valid": None}
        self.resident: ResidentReference | None = None
        self.drafts: dict[int, list[int]] = {}
        self.best = Best(config.output.save_best, config.training.early_stop) if config.output.save_best else None
        engines.initialize_parallel(config)
        self.engine = engines.build_engine(platform, plan.inputs.hf_config, config)
        self.profiler = profiling.Profiler(config.output, platform.name == "cuda")
        if config.output.nvtx:
            profiling.name_phases(self.engine)
        self.ranks = RankTimes(self.engine)
        first = dist.get_rank() == 0
        self.log = RunLog(config.output, self.schedule.steps, plan.resumed, first, effective(config))
        for line in start_lines(plan, config, self.engine, self.ranks.hosts):
            self.log.message(line)
        if plan.source is None:
            self._start_run_folder()

    def train(self) -> None:
        """Runs the training.

        Raises:
            UserError: see `train` of this module.
        """
        if not self.score_reference():
            return
        self.start()
        try:
            with self.work:
                self._steps()
            self.close()
        except Diverged:
            failed_before = self.checkpoints.unsaved
            self.checkpoints.finish()  # an asynchronous save of weights that were still finite
            self._warn_if_unsaved(failed_before)
            raise

    def _steps(self) -> None:
        """Trains to the last step, or until the run is requested to stop."""
        output, steps = self.config.output, self.schedule.steps
        if self.plan.source is not None:
            self._do_what_a_stop_left_out()
        elif self.config.training.eval_on_start and not self.reason:
            self.validate()
        while self.done < steps and not self.reason and not self.stops_early:
            self.train_step()
            last = self.done == steps
            failed_before = self.checkpoints.unsaved
            self.checkpoints.poll()
            # Between a signal and the kill there is time for the save alone: a resumed run makes up for the rest.
            evaluates = last or (_is_due(self.done, self.config.training.eval_interval) and not self.reason)
            is_best = evaluates and self.validate()
            saves = not last and _is_due(self.done, output.save_interval)
            exports = not last and _is_due(self.done, output.save_hf_interval) and not self.reason
            self.save(saves or (is_best and not last), exports, failed_before)
            if last:
                self.reason = None
            elif evaluates or saves or exports:  # a request may arrive during such a pause
                self.reason = self.reason or self.stop.agreed(self.platform.device)

    def _do_what_a_stop_left_out(self) -> None:
        """Evaluates and exports after the step of the checkpoint, where that was due and the run had to stop."""
        if self.reason or self.done == self.schedule.steps or self.evaluated is None:
            return
        if _is_due(self.done, self.config.training.eval_interval):
            self.validate(leave_out=self.evaluated)
        if _is_due(self.done, self.config.output.save_hf_interval):
            folder = checkpoint_folder(resume.export_folder(self.config), self.done)
            if not self.reason and not shared(folder.is_dir, "folders"):
                self.save(False, True, self.checkpoints.unsaved)

    def score_reference(self) -> bool:
        """Computes the reference log-probs of all examples, before a checkpoint replaces the reference's weights;
        returns False where the run was stopped meanwhile.

        With --reference resident it copies the weights to the host instead, and computes those of --valid-data alone.
        """
        if not needs_reference(self.config.method):
            return True
        assert self.plan.weights is not None  # `preflight` reads them where the loss has a reference
        datasets = dict(self.data.reference)
        if self.config.method.reference == "resident":
            self.resident = ResidentReference(self.engine, datasets.pop("train"))
            size = self.resident.host_bytes / 2**30
            self.log.message(f"resident reference: {size:.2f} GiB of host memory a process")
        for split, dataset in datasets.items():
            with without_adapters(self.engine.models):
                log_probs = reference_log_probs(
                    self.engine, dataset, self.config, self.plan.weights, self.log.message, self.stop.requested
                )
            if log_probs is None:
                stopped = f"stopped by {self.stop.agreed(self.platform.device)} before the first step"
                saved = "; the reference log-probs so far are saved" if has_cache(self.config.method) else ""
                self.log.message(stopped + saved)
                report_to_launcher(stopped)
                self.log.close()
                return False
            self.reference[split] = log_probs
        return True

    def start(self) -> None:
        """Builds the optimizer, loads the checkpoint that is resumed, and prepares checkpoints and monitoring."""
        training = self.config.training
        self.optimizer, self.scheduler = engines.build_optimizer(self.engine, training, self.schedule.steps)
        if self.plan.source is None:
            export.delete_earlier_exports(self.config)
        else:
            self._resume(self.plan.source)
        run_folder = Path(self.config.output.save).resolve()
        in_this_folder = self.plan.source is not None and self.plan.source.parent.resolve() == run_folder
        self.checkpoints = Checkpoints(
            self.config,
            self.engine,
            self.optimizer,
            self.scheduler,
            self.plan.resumed if in_this_folder else 0,
            self.plan.progress,
        )
        # A model may have such rows at the start, which no token uses.
        self.not_finite_at_start = engines.weights_not_finite(self.engine)
        self.watch = Watch(training.spike_factor)
        # On every rank, because too many skipped steps end the run; only rank 0 has the log.
        earlier = shared(lambda: self.log.earlier)
        self.watch.replay(earlier)
        self.evaluated = {line["split"] for line in earlier if line["step"] == self.done} if in_this_folder else None
        if self.best is not None:
            self.best.replay(earlier)
            self.checkpoints.best = self.best.step or 0
            if self.best.step is not None:
                self._write_best()
        self.engine.train()
        self.reason = self.stop.agreed(self.platform.device)
        self.memory = PeakMemory(self.platform)
        train, schedule = self.data.train, self.schedule
        if self.resident is None:
            self.work = training_work(self.engine, train, schedule, self.config, self.reference["train"])
        else:
            self.work = scored_training_work(self.resident, train, schedule, self.config)

    def _resume(self, source: Path) -> None:
        training, plan = self.config.training, self.plan
        rates = (training.lr, training.min_lr) if training.override_opt_param_scheduler else None
        load_checkpoint(source, self.engine, self.optimizer, self.scheduler, rates)
        # Not before: a checkpoint that cannot be loaded must not remove the metrics after it.
        self._start_run_folder()
        self.log.message(f"resuming after step {plan.resumed} of {self.schedule.steps} from {source}")
        if changed := run_identity.new_schedule(plan.before, plan.progress, self.config):
            self.log.message(changed)
        if dist.get_rank() == 0:
            resume.go_back(self.config)

    def train_step(self) -> None:
        """Trains one step and logs it."""
        self.profiler.before_step(self.done)
        line, requested = step.train_step(
            self.engine,
            self.optimizer,
            self.scheduler,
            self.data.train,
            self.schedule,
            self.work,
            self.done,
            self.config,
            self.memory,
            self.stop.on_this_rank,
            self.profiler.phase,
            self.ranks.counted,
        )
        if _is_due(self.done + 1, self.config.output.log_interval):
            line |= self.ranks.compared()
        self.reason = self.stop.reason(requested)
        self.log.step(line, self.watch.read(line))
        self.done += 1
        self._profiled(self.profiler.after_step(self.done))

    @property
    def stops_early(self) -> bool:
        """Whether --early-stop ends the run here."""
        return self.best is not None and self.best.exhausted

    def validate(self, leave_out: Collection[str] = ()) -> bool:
        """Evaluates on --valid-data and --eval-generate, where they are set; returns whether --save-best has a new
        best step.

        Args:
            leave_out: splits that were evaluated after this step already.
        """
        lines: list[Line] = []
        if self.data.valid is not None and "valid" not in leave_out:
            means = step.evaluate(self.engine, self.data.valid, self.config, self.reference["valid"], self._must_stop)
            if means is None:
                return False
            lines.append({"step": self.done, "split": "valid"} | means)
            self.log.step(lines[-1])
        if self.data.held_out is not None and answers.SPLIT not in leave_out:
            if (means := self._answer(self.data.held_out)) is None:
                return False
            lines.append({"step": self.done, "split": answers.SPLIT} | means)
            self.log.step(lines[-1])
        if self.best is None or not any([self.best.read(line) for line in lines]):
            return False
        self.checkpoints.best = self.done
        self.log.message(f"best so far: {self.best.describe()}")
        self._write_best()
        return True

    def _must_stop(self) -> bool:
        """Whether an evaluation ends here, without a result; a resumed run makes it. Collective.

        That after the last step is made to its end: no run would make it later.
        """
        if self.done == self.schedule.steps:
            return False
        self.reason = self.reason or self.stop.agreed(self.platform.device)
        return self.reason is not None

    def _answer(self, held_out: HeldOut) -> dict[str, float] | None:
        """Answers the held-out questions, writes the answers to the run folder, and returns the means of their
        scores; None where the run must stop meanwhile."""
        start, most = time.perf_counter(), self.config.training.eval_max_new_tokens
        self.engine.eval()
        replies = answers.greedy_answers(
            self.engine, held_out.prompts, held_out.stops, most, self.config, self.drafts, self._must_stop
        )
        self.engine.train()
        if replies is None:
            return None
        self.drafts = dict(enumerate(replies))
        means, records = answers.scored_answers(held_out, replies)
        path = answers.answers_file(Path(self.config.output.save), self.done)
        if error := first_error(run_on_rank0(lambda: write_jsonl(path, records))):
            self.log.message(f"warning: {path} cannot be written ({error})")
        cut = sum(not record["finished"] for record in records)
        seconds = round(time.perf_counter() - start, 4)
        return means | {"answers": len(records), "answers_cut": cut, "seconds": seconds}

    def _write_best(self, stopped: int | None = None) -> None:
        """Writes best.json of the run folder."""
        best, folder = self.best, Path(self.config.output.save)
        if best is not None and (error := first_error(run_on_rank0(lambda: best.write(folder, stopped)))):
            self.log.message(f"warning: {folder / FILE} cannot be written ({error})")

    def save(self, saves: bool, exports: bool, failed_before: str | None) -> None:
        """Saves the checkpoint and the Hugging Face folder that are due after a step; a failure is a warning.

        Args:
            saves, exports: whether they are due.
            failed_before: `Checkpoints.unsaved` before this step's asynchronous save was polled.
        """
        if saves or exports:
            self._check_weights()
        if saves:
            self._timed("save", lambda: self.checkpoints.save(self.done))
        self._warn_if_unsaved(failed_before, "; training continues")
        if exports:
            error = self._timed("export", lambda: export.export_model(self.engine, self.config, self.data, self.done))
            folder = self.config.output.save_hf
            self.log.message(f"warning: {error}" if error else f"Hugging Face folder of step {self.done} in {folder}")

    def close(self) -> None:
        """Saves and exports the model and logs the end of the run.

        Raises:
            UserError: the model could not be saved or exported.
        """
        output, steps = self.config.output, self.schedule.steps
        start, since = time.perf_counter(), None
        if self.done:
            self._check_weights()
            failed_before = self.checkpoints.unsaved
            if not self.checkpoints.has(self.done):  # waits for an asynchronous save
                self._warn_if_unsaved(failed_before)
                self._timed("save", lambda: self.checkpoints.save_last(self.done))
        saving = time.perf_counter() - start
        if self.reason:
            since = self.stop.seconds_since(self.platform.device)
        self._profiled(self.profiler.close(self.done))
        for line in self.watch.at_end(self.done):
            self.log.message(line)
        stopped = f"stopped by {self.reason} after step {self.done} of {steps}" if self.reason else None
        if self.stops_early and self.best is not None:
            self._write_best(self.done)
            waited = f"no better one in {self.config.training.early_stop} evaluations"
            self.log.message(f"early stop after step {self.done} of {steps}: best is {self.best.describe()}, {waited}")
        if stopped and not self.checkpoints.unsaved:
            notice = "" if since is None else f", {since:.1f} s after the signal, of which the save took {saving:.1f} s"
            saved = f"saved in {output.save}{notice}" if self.done else "nothing was done yet"
            self.log.message(f"{stopped}; {saved}")
            report_to_launcher(stopped)
        unfinished = None
        if output.save_hf and not stopped:
            unfinished = self._timed(
                "export", lambda: export.export_last_model(self.engine, self.config, self.data, self.done)
            )
            if not unfinished:
                self.log.message(f"Hugging Face folder: {output.save_hf}")
        peaks = ", ".join(f"{name} {self.memory.of(name):.2f} GiB" for name in self.memory.activities)
        self.log.message(f"peak memory of the largest process: {peaks}")
        self.log.close()
        self.engine.close()
        problem = "; ".join(text for text in (stopped, self.checkpoints.unsaved, unfinished) if text)
        if self.checkpoints.unsaved:
            raise UserError("checkpoint-not-saved", problem)
        if unfinished:
            raise UserError("export-failed", problem)

    def _warn_if_unsaved(self, failed_before: str | None, more: str = "") -> None:
        """Logs a save that failed since `Checkpoints.unsaved` was ``failed_before``."""
        if self.checkpoints.unsaved not in (None, failed_before):
            self.log.message(f"warning: {self.checkpoints.unsaved}{more}")

    def _profiled(self, trace: Path | None) -> None:
        """Logs where a trace was written."""
        if trace is not None:
            self.log.message(f"trace of the profiled steps: {trace}")

    def _check_weights(self) -> None:
        """Refuses to save weights that a run could not resume from.

        Raises:
            Diverged: weights that were finite at the start of this process are not any more.
        """
        if engines.weights_not_finite(self.engine) > self.not_finite_at_start:
            raise Diverged(
                "weights-not-finite",
                f"step {self.done}: the weights are not finite any more; they are not saved, and earlier "
                "checkpoints are kept: start a new run with a lower --lr or a larger --adam-eps",
            )

    def _timed[T](self, split: str, save: Callable[[], T]) -> T:
        """Runs a save and logs its time and memory."""
        self.work.settle()  # a save may fork
        start = time.perf_counter()
        with self.memory.apart(split):
            result = save()
        seconds, memory = round(time.perf_counter() - start, 4), round(self.memory.of(split), 3)
        self.log.step({"step": self.done, "split": split, "seconds": seconds, "memory_gib": memory})
        return result

    def _start_run_folder(self) -> None:
        """Opens the log and writes the files of this start to the run folder."""
        self.log.begin()
        if dist.get_rank() == 0:
            write_settings(Path(self.config.output.save), self.config)
            write_metric_labels(Path(self.config.output.save), self.config.method)
            write_overlong(Path(self.config.output.save), self.data)


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
