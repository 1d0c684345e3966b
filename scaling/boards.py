"""The numbers of the log for TensorBoard and for Weights & Biases (W&B), beside metrics.jsonl.

Rank 0 alone opens a board, and only the one that is asked for is imported. metrics.jsonl is the
log: no fault of a board ends a run.
"""

import os
import re
import sys
import uuid
from importlib.util import find_spec

from support.files import UserError, replace_file

INIT_S = 30  # how long W&B's server may take to answer; the other ranks wait so long too
FINISH_S = 20  # how long the end may take: less than torchrun's 30 s between SIGTERM and SIGKILL


def open_boards(run, config, settings, step):
    """The boards that `config` asks for. step: from which the run goes on; -1: it is new."""
    boards = []
    if config.tensorboard:
        boards.append(TensorBoard(run, step))
    if config.wandb:
        boards.append(WeightsAndBiases(run, settings, step))
    return boards


def check_boards(config):
    """UserError for a board whose package is missing: now, and not when the data is built."""
    for name in ("tensorboard", "wandb"):
        spec = find_spec(name) if getattr(config, name) else True
        # subtle: W&B leaves folders called wandb, which Python takes for packages without a file
        if not spec or getattr(spec, "origin", name) is None:
            raise not_installed(name)


def not_installed(name):
    return UserError(f"--{name} needs a package: pip install {name}")


def numbers_of(kind, row):
    """The numbers of a row of the log, called kind/name; the step and its like aside."""
    numbers = {**row, **row.get("bits_per_byte", {}), **row.get("tuned", {})}
    for name, result in row.get("tasks", {}).items():
        numbers[name] = result.get("accuracy", result.get("bits_per_byte"))
    return {f"{kind}/{name}": value for name, value in numbers.items()
            if type(value) in (int, float) and name not in ("step", "tokens", "seconds")}


# ---- TensorBoard ---------------------------------------------------------------------------------

class TensorBoard:
    """TensorBoard's writer, which drops what it wrote about steps after `step`."""

    def __init__(self, run, step):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise not_installed("tensorboard") from None
        self.writer = SummaryWriter(run / "tensorboard", purge_step=step + 1)

    def write(self, kind, row):
        for name, value in numbers_of(kind, row).items():
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def close(self, failed):
        self.writer.close()


# ---- Weights & Biases ----------------------------------------------------------------------------

class WeightsAndBiases:
    """A run at W&B, whose files are in RUN/wandb: one for all starts of a run directory.

    Its name is the directory's; WANDB_PROJECT, WANDB_NAME, WANDB_ENTITY and WANDB_MODE are obeyed.
    The network may fail: then the numbers stay in RUN/wandb, and a line says how to send them.
    """

    def __init__(self, run, settings, step):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # of its own faults, with our paths
        os.environ.setdefault("WANDB_SILENT", "true")  # what is to be known we say in one line
        import wandb
        check_version(wandb)
        self.wandb = wandb
        self.folder = run / "wandb"
        arguments = dict(
            project=os.environ.get("WANDB_PROJECT", "nanolmo"),
            name=os.environ.get("WANDB_NAME", run.resolve().name),
            id=kept_id(self.folder, step),
            resume="allow",  # goes on if the server knows the id, else begins
            dir=run,
            config=settings,
            settings=private_settings(wandb),
        )
        self.board = self.begin(arguments)
        if not self.board:
            return
        # subtle: W&B numbers its rows itself and refuses a number that comes twice. After a crash
        # steps are taken again, so ours is a value, and the x axis of all pictures.
        self.board.define_metric("step")
        self.board.define_metric("*", step_metric="step")
        print(f"W&B: {self.remedy() if self.board.offline else self.board.url}")

    def begin(self, arguments):
        """The run at W&B, or one on this disk where the network fails; None if neither begins."""
        errors = self.wandb.errors
        try:
            return self.wandb.init(**arguments)
        except (errors.UsageError, errors.AuthenticationError) as error:
            raise UserError(f"--wandb: {first_line(error)}; `wandb login` sets the key, and "
                            "WANDB_MODE=offline keeps the numbers on this disk") from None
        except Exception as error:  # the way to the server, the server, or W&B's own process
            print(f"warning: W&B: {first_line(error)}", file=sys.stderr)
        try:
            self.wandb.teardown()  # what is left of the first try holds the id
            return self.wandb.init(**arguments, mode="offline")
        except Exception as error:
            print(f"warning: W&B does not begin: {first_line(error)}; the numbers are in "
                  "metrics.jsonl alone", file=sys.stderr)
        return None

    def remedy(self):
        """How to send what is on the disk alone."""
        return f"the numbers are on this disk; send them: wandb sync {self.board.settings.sync_dir}"

    def write(self, kind, row):
        """Hand a row over to W&B's own process, which sends it when it can."""
        if not self.board:
            return
        places = {key: row[key] for key in ("step", "tokens", "seconds")}
        try:
            self.board.log(numbers_of(kind, row) | places)
        except Exception as error:  # whatever it is, the training goes on
            self.give_up(error)

    def close(self, failed):
        """Wait for what is not sent yet, but no longer than FINISH_S."""
        if not self.board:
            return
        try:
            self.board.finish(exit_code=int(failed))
            self.wandb.teardown()  # ends its process, which Python's end would do in many lines
        except Exception as error:
            self.give_up(error)

    def give_up(self, error):
        print(f"warning: W&B: {first_line(error)}; {self.remedy()}", file=sys.stderr)
        self.board = None


def check_version(wandb):
    """UserError for a W&B that was not tried: 0.19 and 0.27 wait for ever for a dead network."""
    found = tuple(map(int, re.findall(r"\d+", wandb.__version__)[:2]))
    if found < (0, 31):
        raise UserError(f"--wandb needs wandb 0.31 or newer, and {wandb.__version__} is here: pip "
                        "install --upgrade wandb")


def kept_id(folder, step):
    """The id of the run at W&B, from RUN/wandb; a run that begins at step 1 draws a new one."""
    file = folder / "run_id"
    if step < 0 or not file.is_file():
        folder.mkdir(exist_ok=True)
        replace_file(file, uuid.uuid4().hex[:8].encode())
    return file.read_text().strip()


def private_settings(wandb):
    """W&B's settings: it gets our numbers and settings, and nothing of this machine or its code."""
    wanted = dict(
        silent=True,  # so it does not ask for a key, which nobody could give under torchrun
        console="off", save_code=False, disable_code=True, disable_git=True,
        disable_job_creation=True, host="", x_disable_meta=True, x_disable_stats=True,
        x_disable_machine_info=True, x_save_requirements=False,
        init_timeout=INIT_S, finish_timeout=FINISH_S, finish_timeout_raises=True)
    known = wandb.Settings.model_fields  # another version has other ones
    return wandb.Settings(**{key: value for key, value in wanted.items() if key in known})


def first_line(error):
    """An error as one line, without the full stop."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__

