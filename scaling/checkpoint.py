"""Step directories RUN/step000500: complete or absent, for any number of ranks, read safely.

Reading one runs no code from it. DCP's metadata is a pickle, so an unpickler of our own admits
plain records alone; a tensor's file holds nothing else.
"""

import errno
import hashlib
import json
import shutil
import warnings
from importlib import import_module
from pathlib import Path, PurePosixPath

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor

from scaling.ranks import gather, on_rank0, rank
from support.bars import bar, stage
from support.files import (UserError, disk_remedy, file_sha256, fsync, here, read_json,
                           without_nan, write_json)
from support.memory import about_memory, is_lack_of_memory
from support.plain_pickle import NamelessUnpickler
from support.run_hints import command_of_run, file_remedy, hub_remedy, run_remedy

# ---- Finding -------------------------------------------------------------------------------------

def run_of(path):
    """The directory that holds config.json and tokenizer.json: `path`, or its parent for a step."""
    path = Path(path)
    if path.is_file():
        raise UserError(f"{path}: {file_remedy(path)}")
    if not path.is_dir():
        steps = [step.name for step in step_directories(path.parent)]
        if steps:
            raise UserError(f"{path}: no such step; {path.parent} has {', '.join(steps)}")
        remedy = hub_remedy(path) or run_remedy(path)
        raise UserError(f"{path}: no such directory{here(path)}; {remedy}")
    return path.parent if (path / "state.json").is_file() else path


def step_directories(run):
    """The step directories of a run, oldest first."""
    steps = [path for path in Path(run).glob("step*")
             if path.name[4:].isdecimal() and path.is_dir()]
    return sorted(steps, key=step_of)


def step_of(path):
    """500 for RUN/step000500."""
    return int(path.name.removeprefix("step"))


def newest_step(run, digests=True):
    """Returns (path, state) of a run's newest good step; others are named and passed over.

    Raises UserError if none is good: an Unreadable one if the files of a step are whole.
    """
    steps = step_directories(run)
    if not steps:
        raise no_step(run)
    unreadable = None
    for path in reversed(steps):
        try:
            state = verify_step(path, digests)
            SafeReader(str(path)).read_metadata()
            return path, state
        except Unreadable as error:
            writer = f"torch {state.get('torch', 'of another version')}"
            unreadable = unreadable or f"{error}; {writer} wrote it: try that version"
            print(f"warning: {error}; this step is passed over")
        except UserError as error:
            print(f"warning: {error}; this step is passed over")
    if unreadable:
        raise Unreadable(f"{run}: has no step that can be read: {unreadable}")
    raise UserError(f"{run}: has no undamaged step directory")


def step_at(path, digests=True):
    """Returns (path, state) of the step that `path` is, verified, or of a run's newest good one."""
    if (path / "state.json").is_file():
        return path, verify_step(path, digests)
    return newest_step(path, digests)


def no_step(run):
    """The UserError for a run without a step directory."""
    return UserError(f"{run}: a run that has saved no step, so there is no model yet; start it "
                     f"again, with the command that began it{command_of_run(run)}")


class Unreadable(UserError):
    """A step whose files are as they were written, but which this code cannot read."""


# ---- Checking ------------------------------------------------------------------------------------

def verify_step(path, digests=True):
    """The state.json of a step directory, after a check of every file's size and SHA-256.

    digests=False checks the sizes only. Raises UserError that names the damaged file. A file that
    the user may not read is no damage: that stays a PermissionError.
    """
    state = read_json(path / "state.json")
    if state.get("sha256") != state_digest(state):
        raise UserError(f"{path / 'state.json'}: damaged, its digest differs")
    if not isinstance(state.get("files"), dict):
        raise UserError(f"{path / 'state.json'}: lists no files")
    for name, expected in bar(state["files"].items(), f"checking {path}", unit="files",
                              hidden=not digests):
        file = path / name
        if not file.is_file():
            raise UserError(f"{file}: missing from this checkpoint")
        if file.stat().st_size != expected["size"]:
            raise UserError(f"{file}: damaged, {file.stat().st_size} bytes, not {expected['size']}")
        if digests and read_sha256(file) != expected["sha256"]:
            raise UserError(f"{file}: damaged, its SHA-256 differs")
    return state


def read_sha256(file):
    """A file's SHA-256; UserError where the disk cannot read it any more."""
    try:
        return file_sha256(file)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise UserError(f"{file}: damaged, the disk cannot read it ({error})") from None


def state_digest(state):
    """SHA-256 of a step's state.json without its own "sha256"."""
    body = {key: value for key, value in state.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def check_tensors(wanted, found, place):
    """Compare two {name: shape}; UserError lists what is missing, unexpected or misshapen."""
    faults = [f"missing {name}" for name in wanted if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in wanted]
    faults += [f"{name} has shape {found[name]}, not {wanted[name]}" for name in wanted
               if name in found and found[name] != wanted[name]]
    if faults:
        more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"{place}: these weights do not fit the model's shape: "
                        f"{'; '.join(faults[:5])}{more}")


# ---- Reading -------------------------------------------------------------------------------------

class SafeUnpickler(NamelessUnpickler):
    """Unpickles only what DCP writes into `.metadata`: records of names, shapes and dtypes."""

    ALLOWED = {
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING", "BytesStorageMetadata"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    }

    def find_class(self, module, name):
        # Where the step was written, which nobody reads. The class is pathlib._local.PosixPath in
        # Python 3.13 and pathlib.PosixPath before and after it; a pure one exists everywhere.
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath"):
            return PurePosixPath
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in self.ALLOWED.get(module, ()):
            return getattr(import_module(module), name)
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """DCP's reader made safe: by itself it unpickles `.metadata` and byte entries freely."""

    def read_metadata(self, *args, **kwargs):
        file = Path(self.path) / ".metadata"
        try:
            with open(file, "rb") as stream:
                metadata = SafeUnpickler(stream).load()
            if not isinstance(metadata, Metadata):
                raise UserError(f"it holds {type(metadata).__name__}")
            others = [name for name, entry in metadata.state_dict_metadata.items()
                      if not isinstance(getattr(entry, "size", None), torch.Size)]
        except PermissionError:
            raise
        except Exception as error:
            raise Unreadable(f"{file}: refused, not plain metadata ({error})") from None
        if others:
            raise Unreadable(f"{file}: refused, {others[0]} is no tensor")
        return metadata


def read_step(path, tensors):
    """Fill `tensors`, {name: tensor or DTensor}, in place from a step directory.

    Raises UserError, before any is read, for one that is missing, unexpected or misshapen.
    """
    reader = SafeReader(str(path))
    entries = reader.read_metadata().state_dict_metadata
    tensors = {name_in(entries, name): tensor for name, tensor in tensors.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    # A reader of weights alone asks for "model.*"; the optimiser's entries are then no surprise.
    kinds = {name.split(".")[0] for name in wanted}
    found = {name: tuple(entry.size) for name, entry in entries.items()
             if name.split(".")[0] in kinds}
    check_tensors(wanted, found, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "only one process": that is fine
        try:
            dcp.load(tensors, storage_reader=reader)
        except CheckpointException as error:
            raise UserError(f"{path}: its tensors cannot be read ({root_cause(error)})") from None


def name_in(entries, name):
    """The name of a tensor in a step directory: older ones call the output head ff_out."""
    old_name = name.replace(".lm_head.", ".ff_out.", 1)
    return old_name if old_name in entries else name


def root_cause(error):
    """One line about the first error that DCP has collected from the ranks.

    Ctrl-C and SIGTERM, which it collects too, are raised again.
    """
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        raise error
    if is_lack_of_memory(error):
        return about_memory(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]


# ---- Writing -------------------------------------------------------------------------------------

def training_tensors(model, optimizer):
    """{name: tensor} of all that training changes: the weights and the optimiser's state.

    torch.distributed.checkpoint.state_dict would collect them too, but it stores the learning rate
    and its like as pickled bytes, which SafeReader refuses to load.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


@stage("making room for the optimiser's state")
def create_state(optimizer):
    """Make an optimiser allocate its state, so that a checkpoint of any step has the same tensors.

    An optimiser allocates in its first step. So it takes one with gradients of 0 and without decay,
    which changes no weight, and its step counters are set back. Raises UserError for an optimiser
    whose state does not start at 0, such as NAdam: this step would have changed it.
    """
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
    check_starts_at_zero(optimizer)


def check_starts_at_zero(optimizer):
    """UserError if a tensor of an optimiser's new state is not 0."""
    for state in optimizer.state.values():
        for name, tensor in state.items():
            own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if own.any():
                raise UserError(f"{type(optimizer).__name__}: its state {name!r} does not start at "
                                "0; give create_state in scaling/checkpoint.py its first value")


def save_checkpoint(run, state, model, optimizer):
    """Write RUN/step000500: tensors through DCP, and state.json with each file's size and SHA-256.

    Every rank writes and hashes its own slices; any number of ranks can load them. The directory is
    written under another name and renamed when all ranks are done, so one that exists is complete.
    No random state is saved: training draws no random numbers, and the data order is a function of
    the step. Raises UserError on every rank if the disk is full; what was written is then deleted.
    """
    path = Path(run) / f"step{state['step']:06d}"
    if on_rank0(path.exists):
        return path
    aside = path.with_name(path.name + ".tmp")
    on_rank0(lambda: shutil.rmtree(aside, ignore_errors=True))
    files, error = write_own_slices(aside, training_tensors(model, optimizer))
    everyone = gather((files, error))
    on_rank0(lambda: finish_checkpoint(path, aside, state, everyone))
    return path


def write_own_slices(folder, tensors):
    """Returns ({file: size and SHA-256}, error or None) of what this rank wrote."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "only one process": that is fine
            dcp.save(tensors, checkpoint_id=folder)
        return describe_files(folder.glob(f"__{rank()}_*")), None
    except (OSError, CheckpointException) as error:
        cause, _, _ = root_cause(error).partition("; ")  # finish_checkpoint has its own remedy
        return {}, cause


def finish_checkpoint(path, aside, state, everyone):
    """On rank 0: write state.json about the files of all ranks, and name the checkpoint."""
    try:
        files = {}
        for written, error in everyone:
            if error:
                raise OSError(error)
            files.update(written)
        not_listed = [file for file in aside.iterdir() if file.name not in files]  # .metadata
        files.update(describe_files(not_listed))
        state = without_nan({**state, "files": dict(sorted(files.items()))})
        write_json(aside / "state.json", {**state, "sha256": state_digest(state)})
        aside.rename(path)
        fsync(path.parent)  # the new name must be on the disk before an older step is deleted
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"{path}: the checkpoint could not be written ({error}); "
                        f"{disk_remedy(error)}. The run goes on from the checkpoint before it"
                        ) from None


def describe_files(files):
    """{name: {"size": bytes, "sha256": hex}} of some files."""
    return {file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)}
            for file in files}


def load_checkpoint(path, model, optimizer):
    """Restore weights and optimiser in place from a step that any number of ranks wrote."""
    read_step(path, training_tensors(model, optimizer))
