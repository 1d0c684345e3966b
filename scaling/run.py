"""A run: opened or resumed, logged, saved and ended, at the same step on all ranks.

`train()` and `adapt()` loop over `run.steps()` and ask after each step what is due.
"""

import math
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from scaling import directory, start
from scaling.begin import load_start
from scaling.boards import open_boards
from scaling.checkpoint import save_checkpoint
from scaling.kept import Kept, check_comparable
from scaling.log import (Log, Pace, Window, has_bar, perplexity, say_evaluation, say_row,
                         say_slow_step)
from scaling.machine import PowerMeter, carbon_kg, energy_line, flops_per_token, peak_memory
from scaling.memory import where_and_remedies
from scaling.ranks import (batch_hash, check_agreement, largest, on_rank0, rank, reduce_sum,
                           world_size)
from scaling.signals import STOPPED_AT_ONCE, StopSignal
from scaling.starts import note_start
from support.bars import Watch, stage
from support.files import UserError
from support.memory import about_memory, is_lack_of_memory

READ_PATIENCE = timedelta(hours=2)  # rank 0 reads a complete checkpoint to check it


def deadline_after(minutes):
    """The time.monotonic() at which to stop; 0 minutes is never."""
    return time.monotonic() + 60 * minutes if minutes else math.inf


def config_of(state, schema):
    """The settings that a run was saved with, an instance of `schema`; None for a new run."""
    if "config" not in state:
        return None
    known = schema.__dataclass_fields__  # a key that is newer than the run takes its default
    return schema(**{key: value for key, value in state["config"].items() if key in known})


class Run:
    """A run directory that this process group holds, and what has happened in it so far.

        run = Run.open(...)                 # new, or as it was left
        with run:                           # opens the log
            for step in run.steps():        # ends at max_steps, on a signal or at the deadline
                ...
                run.log(step, batch, metrics, lr, max_norm)

    path: the directory. checkpoint: the step directory to begin from, whole; a Base, of which the
    weights alone are taken; or None. step: the last step taken, 0 for a new run. results: what the
    last evaluation found. ended_by: the number of the signal that ended the loop, or 0.
    """

    def __init__(self, config, settings, model_config, device, deadline):
        self.config = config
        self.settings = settings
        self.model_config = model_config
        self.device = device
        self.path = Path(config.run_dir)
        self.signals = StopSignal(deadline)
        self.window = Window()
        self.results = None
        self.ended_by = 0
        self.bar = None
        self.doing = "evaluating"  # or "saving"; "": a step. Before the first step: an evaluation

    @property
    def step(self):
        return self.state["step"]

    # ---- Opening ---------------------------------------------------------------------------------

    @classmethod
    def open(cls, config, settings, fingerprint, model_config, device, deadline=math.inf,
             free_keys=(), can_compare=True):
        """Hold the run directory of `config`, and find where the run goes on.

        settings: every key of the run, as config.json saves them. fingerprint: what identifies the
        data. deadline: of time.monotonic(). free_keys: keys that a resumed run may change besides
        the usual ones. can_compare: whether evaluations measure what keep_best needs. Raises
        UserError on all ranks for a directory that is in use, that a node does not share, or that
        holds another run.
        """
        check_comparable(config, settings, can_compare)
        run = cls(config, settings, model_config, device, deadline)
        check_agreement(fingerprint)
        on_rank0(directory.check_directory, config.run_dir, config.overwrite)
        lock_text = on_rank0(run.take_lock)
        directory.check_shared(run.path, lock_text)
        find_start = partial(start.find_start, config, settings, fingerprint, free_keys)
        with stage("looking for a checkpoint to go on from, and checking it"):
            run.checkpoint, run.state = on_rank0(find_start, patience=READ_PATIENCE)
        run.config_before = config_of(run.state, type(config))
        run.state.update(config=settings, data=fingerprint, torch=torch.__version__,
                         model_keys=list(vars(model_config)))
        has_no_row = partial(directory.lacks_evaluation, run.path, run.step)
        run.lacks_evaluation = on_rank0(has_no_row)
        return run

    def take_lock(self):
        """On rank 0: lock the directory for as long as this object lives; returns its text."""
        self.lock = directory.lock_directory(self.path)
        return self.lock.text

    def is_finished(self):
        """True, and printed, if neither a step nor an evaluation is left to do."""
        is_finished = self.step == self.config.max_steps and not self.lacks_evaluation
        if is_finished:
            on_rank0(directory.note_data_dir, self.path, self.settings)
            print(f"{self.path}: finished, at step {self.step} of {self.config.max_steps}; to go "
                  "on, raise --max_steps (in adapt.py: --epochs, with --accept_changes)")
        return is_finished

    def load(self, model, optimizer):
        """Fill model and optimiser from what the run begins from."""
        with stage(f"loading {getattr(self.checkpoint, 'weights', self.checkpoint)}"):
            load_start(self, model, optimizer)

    def describe(self, folder, **facts):
        """Write config.json, tokenizer.json and manifest.json (see scaling/directory.py)."""
        began = {"began": self.state["began"]} if "began" in self.state else {}
        on_rank0(partial(directory.describe, self.path, self.settings, folder, **began, **facts))

    # ---- The loop --------------------------------------------------------------------------------

    def __enter__(self):
        on_rank0(self.open_log)  # all ranks end together where it cannot be opened
        if rank() > 0:
            self.open_log()  # in which nothing is written
        note_start(self.path, self.step, self.config, self.device)
        self.meter = PowerMeter(self.device, self.config.watts)
        self.kwh_before = self.state["kwh"]
        self.flops_per_token = flops_per_token(self.model_config)
        self.pace = Pace()
        self.last_save = time.monotonic()
        self.is_late_to_save = False
        return self

    def open_log(self):
        # subtle: a new run drops the rows of step 0 too; its evaluation of step 0 is done again
        step = self.step or -1
        boards = partial(open_boards, self.path, self.config, self.settings, step)
        self.metrics_log = Log(self.path, step, boards)
        if rank() == 0:
            self.kept = Kept(self.path, self.config, self.settings)

    def __exit__(self, kind, error, traceback):
        self.signals.restore()
        self.metrics_log.close(failed=error is not None)
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            error.add_note(STOPPED_AT_ONCE)
        if error and is_lack_of_memory(error):
            raise UserError(about_memory(error, *where_and_remedies(self))) from None

    def steps(self):
        """Yield the number of each step to take, the same on all ranks.

        Ends after max_steps, or after the step in which any rank heard a signal or the deadline.
        From the first step on a signal waits for the end of its step; before, it ends the process.
        """
        self.signals.__enter__()
        last = self.config.max_steps
        self.watch = Watch()
        self.doing = ""
        self.loop_start = time.perf_counter() - self.state["seconds"]
        with tqdm(total=last, initial=self.step, unit="step", disable=not has_bar()) as self.bar:
            while self.step < last and not self.ended_by:
                self.step_start = time.perf_counter()
                yield self.step + 1
        self.count_energy()
        print(energy_line(self.state["kwh"], self.meter.metered, self.config))
        if self.step == last:
            self.ended_by = 0  # a signal that came in the last step stops nothing
            kg_co2 = carbon_kg(self.state["kwh"], self.config)
            self.metrics_log.write("end", self.state, kwh=self.state["kwh"], kg_co2=kg_co2)

    def log(self, step, batch, metrics, lr, max_norm):
        """Count the step that was taken, and write a row of metrics.jsonl if one is due.

        batch: of this rank; its "tokens" (B, T) are counted, padding aside. metrics: what
        train_step returned, or {} for a step that was skipped. max_norm: the clip limit.
        """
        is_text = batch["tokens"] != self.model_config.pad_token_id
        tokens = reduce_sum(is_text.sum()).item()
        is_clipped = bool(metrics) and metrics["grad_norm"] > max_norm
        now = time.perf_counter()
        self.window.add(is_clipped, tokens, now - self.step_start)
        self.state["step"] = step
        self.state["tokens"] += tokens
        self.state["seconds"] = round(now - self.loop_start, 3)
        self.bar.update()
        self.agree_on_ending()
        if metrics and self.is_due(step, self.config.log_every_steps):
            self.write_row(batch, metrics, lr)
        else:
            say_slow_step(self.watch, step, self.config.max_steps)
        if self.pace.first is None:
            self.pace.begin(step)
            self.window.leave_time_out()

    def agree_on_ending(self):
        """What one rank has heard, all ranks do: leave, or save because of save_every_minutes."""
        minutes = (time.monotonic() - self.last_save) / 60
        interval = self.config.save_every_minutes
        is_late = interval > 0 and minutes >= interval
        ended_by, is_late = largest(self.signals.reason(), is_late)
        self.ended_by = int(ended_by)
        self.is_late_to_save = bool(is_late)

    def write_row(self, batch, metrics, lr):
        """A row of kind "train": the step as all ranks saw it, and the speed since the last row."""
        self.count_energy()
        rates = self.window.rates(self.flops_per_token, self.device)
        row = {**metrics, "lr": lr, **rates}
        if "rewards/margins" not in metrics:  # the loss of DPO is per pair, not per token
            row["perplexity"] = perplexity(metrics["loss"])
        [memory] = largest(round(peak_memory(self.device), 3))
        self.metrics_log.write("train", self.state, **row, peak_memory_gb=memory,
                               kwh=self.state["kwh"], world_size=world_size(),
                               batch_hash=batch_hash(batch["tokens"]))
        said = f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s"
        if "rewards/accuracies" in metrics:
            said += f", reward accuracy {metrics['rewards/accuracies']:.0%}"
        self.bar.set_postfix_str(said)
        last = self.config.max_steps
        seconds_left = self.pace.seconds_left(self.step, last, self.window)
        say_row(self.watch, self.step, last, said, seconds_left, memory)
        self.window = Window()

    def count_energy(self):
        """Add the energy of all ranks since the loop began to the state."""
        own = torch.tensor(self.meter.kwh(), dtype=torch.float64)
        self.state["kwh"] = self.kwh_before + reduce_sum(own).item()

    def report_not_finite(self, step, error, find_places):
        """Log which examples a step had whose loss or gradient is not finite; returns {}.

        find_places(step): the lines that name them. Raises UserError on all ranks, except with
        not_finite=skip: the step is then left out, and the weights are what they were before it.
        """
        report = partial(self.log_not_finite, step, error, find_places)
        on_rank0(report, patience=READ_PATIENCE)
        return {}

    def log_not_finite(self, step, error, find_places):
        is_skipped = self.config.not_finite == "skip"
        try:
            places = find_places(step)
        except Exception as fault:  # a fault of the data must not hide the fault of the step
            places = [f"not traced: {fault}"]
        self.metrics_log.write("not_finite", {**self.state, "step": step}, error=str(error),
                               skipped=is_skipped, documents=places)
        if not is_skipped:
            raise UserError(f"step {step}: {error}; metrics.jsonl names its documents, and the "
                            "newest checkpoint is from before it. Try a lower --lr in another "
                            "--run_dir, or leave the step out: --not_finite=skip")
        tqdm.write(f"step {step}: {error}; skipped, the weights are unchanged")

    # ---- What is due -----------------------------------------------------------------------------

    def is_due(self, step, interval):
        """True at the last step and at each multiple of `interval`; 0 is the last step alone."""
        return step == self.config.max_steps or (interval > 0 and step % interval == 0)

    def save_is_due(self, step):
        """True also before the run ends for a signal, after save_every_minutes, and with keep_best
        before an evaluation.
        """
        is_urgent = self.ended_by > 0 or self.is_late_to_save
        is_judged = self.config.keep_best and self.is_due(step, self.config.eval_every_steps)
        return is_urgent or is_judged or self.is_due(step, self.config.save_every_steps)

    def save(self, model, optimizer):
        """Write a checkpoint of the step that was just taken, and delete those no longer kept."""
        self.count_energy()
        self.say_on_bar("saving")
        with stage(f"saving step {self.step:,}"):
            save_checkpoint(self.path, self.state, model, optimizer)
            on_rank0(lambda: self.kept.drop_old())
        self.say_on_bar("")
        self.last_save = time.monotonic()

    def evaluation_is_due(self, step):
        """True before an evaluation; the bar then says so."""
        is_due = self.is_due(step, self.config.eval_every_steps)
        if is_due:
            self.say_on_bar("evaluating")
        return is_due

    def say_on_bar(self, what):
        """Name what the bar, which may stand at 100 %, waits for; "" after it."""
        self.doing = what
        if self.bar is not None:
            self.bar.set_postfix_str(what)

    def evaluation_was_missed(self):
        """True if the run was stopped after it saved its last step and before it evaluated it.

        True also for one that begins with somebody's weights: what they are worth before step 1.
        """
        is_new = self.step == 0 and self.checkpoint is not None
        return (is_new or self.lacks_evaluation) and self.evaluation_is_due(self.step)

    def log_evaluation(self, results):
        """Write a row of kind "eval" about the last step, and print its headline numbers."""
        self.results = results
        self.say_on_bar("")
        if self.config.keep_best:
            results["best"] = on_rank0(lambda: self.kept.note(self.step, results))
        self.metrics_log.write("eval", self.state, **results)
        say_evaluation(self.step, results, self.settings.get("eval_data"))
        if self.config.keep_best:
            on_rank0(lambda: self.kept.drop_old())  # the one that was the best before

    # ---- The end ---------------------------------------------------------------------------------

    def exit_code(self, file):
        """0 for a finished run; after signal n 128 + n, and how to continue is printed."""
        if not self.ended_by:
            return 0
        launcher = "python" if world_size() == 1 else "torchrun ..."
        print(f"stopped after step {self.step}, which is saved; continue with: {launcher} {file} "
              f"--resume={self.path}")
        return 128 + self.ended_by
