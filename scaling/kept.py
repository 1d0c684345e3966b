"""Which steps of a run stay on the disk: the newest, multiples of keep_every, and the best.

With keep_best each step that is evaluated is saved first, as only what is on the disk can be kept.
The best is the one with the lowest number, which all depends on what the run learns from:
train.py    bits per byte of the held-out text, the mean over the domains (macro)
adapt.py    the loss of the held-out answers: nats per token (SFT), DPO's loss per pair
"""

import json
import math
import shutil

from tqdm import tqdm

from scaling.checkpoint import step_directories, step_of
from support.files import UserError, log_rows, to_json, write_json
from support.records import bits_per_byte, summed_up

MEASURES = {"": "bits per byte (macro)", "sft": "loss of held-out answers",
            "dpo": "DPO's loss of held-out pairs"}  # by the method of adapt.py; train.py has none


class Kept:
    """The steps of a run that are kept. Only rank 0 has one.

    Which step is the best follows from the log: {step: results of its evaluation}. The step must
    still be there, as a fork has copied its log, and not the steps before it.
    """

    def __init__(self, run, config, settings):
        self.run = run
        self.config = config
        self.method = settings.get("method", "")
        self.found = {}  # {step: (value, what it was measured on)}
        if config.keep_best:
            for row in log_rows(run):
                if row["kind"] == "eval":
                    self.add(row["step"], row)
        self.name_best()

    def add(self, step, results):
        """Take an evaluation's results, or its row in the log."""
        # The suites' files, as JSON has them, as the log is read again. A tuning cannot change its
        # held-out answers.
        measured_on = None if self.method else json.loads(to_json(results.get("of")))
        self.found[step] = (value_of(results, self.method), measured_on)

    def note(self, step, results):
        """Note an evaluation that was just made; returns the best step, as best() does."""
        self.add(step, results)
        _, measured_on = self.found[step]
        if any(other != measured_on for _, other in self.found.values()):
            tqdm.write("keep_best: this evaluation measures other text than those before it, so "
                       "the best step is looked for anew")
            self.found = {step: self.found[step]}
        if not math.isfinite(self.found[step][0]):
            tqdm.write(f"keep_best: step {step} has no {MEASURES[self.method]}, so it cannot be "
                       "the best")
        self.name_best()
        best = self.best()
        start, _ = self.found.get(0, (math.nan, None))
        if best and start < best["value"]:  # of a run that began with weights
            tqdm.write(f"keep_best: step 0, with which the run began, was better: {start:.4f}")
        return best

    def best(self):
        """{step, path, measure, value} of the best step that is there; None if there is none.

        Only evaluations of the same text as the newest one are compared: after a change of `suite`
        the search begins again. The earliest of equally good steps is the best.
        """
        if not self.found:
            return None
        _, newest = self.found[max(self.found)]
        there = {step_of(path): path.name for path in step_directories(self.run)}
        candidates = [(value, step) for step, (value, measured_on) in self.found.items()
                      if step in there and measured_on == newest and math.isfinite(value)]
        if not candidates:
            return None
        value, step = min(candidates)
        return {"step": step, "path": there[step], "measure": MEASURES[self.method],
                "value": value}

    def name_best(self):
        """Write RUN/best.json, so that other programs find the step; without a best there is none.
        """
        file = self.run / "best.json"
        best = self.best()
        if best:
            write_json(file, best)
        else:
            file.unlink(missing_ok=True)

    def drop_old(self):
        """Delete the steps that are no longer kept."""
        best = self.best()
        drop_old_checkpoints(self.run, self.config.keep_last, self.config.keep_every,
                             best and best["step"])


def value_of(results, method):
    """The number by which evaluations are compared; nan where it was not measured."""
    try:
        if method:
            return float(results["tuned"]["loss" if method == "sft" else "dpo_loss"])
        sums = {name: each for name, each in results["sums"].items() if each["bytes"]}
        both = summed_up(sums)
        return both[1] if both else bits_per_byte(next(iter(sums.values())))
    except (KeyError, TypeError, AttributeError, StopIteration):  # a null or a row of older code
        return math.nan


def check_comparable(config, settings, can_compare):
    """UserError for keep_best where evaluations measure nothing to compare steps by."""
    holds_nothing_out = settings.get("suite") == "domains" and not settings.get("eval_share", 1)
    if not config.keep_best or can_compare and not holds_nothing_out:
        return
    if "method" in settings:
        raise UserError("keep_best=True: steps are compared by the loss of held-out answers, and "
                        "eval_data is empty; name it, or leave keep_best out")
    raise UserError(f"keep_best=True: steps are compared by bits per byte of text, and suite="
                    f"{settings['suite']} measures none; add one, such as --suite=domains with an "
                    "eval_share above 0, or leave keep_best out")


def drop_old_checkpoints(run, keep_last, keep_every, best=None):
    """Delete all steps but the newest `keep_last`, the multiples of `keep_every`, and `best`.

    0 is no rule. A step is renamed before it is deleted, because its name promises that it is
    complete.
    """
    if not keep_last:
        return
    for path in step_directories(run)[:-keep_last]:
        is_multiple = keep_every and step_of(path) % keep_every == 0
        if not is_multiple and step_of(path) != best:
            doomed = path.rename(path.with_name(path.name + ".tmp"))
            shutil.rmtree(doomed)
