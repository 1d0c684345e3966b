"""Step directories: whole or absent, for any number of ranks, read without running anything."""

import hashlib
import json
import pickle
import shutil
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from scaling.ranks import gather, on_main, rank
from support.files import UserError, file_sha256, fsync, read_json, write_json


def check_tensors(wanted, found, place):
    """Compare two {name: shape}; UserError lists what is missing, unexpected or misshapen."""
    faults = [f"missing {name}" for name in wanted if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in wanted]
    faults += [f"{name} has shape {found[name]}, wanted {wanted[name]}" for name in wanted
               if name in found and found[name] != wanted[name]]
    if faults:
        more = f", and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"{place}: these weights do not fit the model's shape: "
                        f"{'; '.join(faults[:5])}{more}")


def step_directories(run):
    """The step directories of a run, oldest first."""
    steps = [path for path in Path(run).glob("step*") if path.name[4:].isdigit() and path.is_dir()]
    return sorted(steps, key=lambda path: int(path.name[4:]))


def newest_step(run, digests=True):
    """(path, state) of a run's newest whole step directory; damaged ones are named and skipped."""
    for path in reversed(step_directories(run)):
        try:
            return path, verify_step(path, digests)
        except UserError as error:
            print(f"warning: {error}; trying the step before it")
    raise UserError(f"{run}: holds no whole step directory")


def state_digest(state):
    """SHA-256 of a step's state.json, its own digest left out."""
    body = {key: value for key, value in state.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def verify_step(path, digests=True):
    """The state.json of a step directory whose every file has its recorded size and SHA-256.

    digests=False leaves the files' SHA-256 out.
    """
    state = read_json(path / "state.json")
    if state.get("sha256") != state_digest(state):
        raise UserError(f"{path / 'state.json'}: damaged, its digest differs")
    if not isinstance(state.get("files"), dict):
        raise UserError(f"{path / 'state.json'}: lists no files")
    for name, record in state["files"].items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{file}: missing from this checkpoint")
        if file.stat().st_size != record["size"]:
            raise UserError(f"{file}: damaged, {file.stat().st_size} bytes, not {record['size']}")
        if digests and file_sha256(file) != record["sha256"]:
            raise UserError(f"{file}: damaged, its SHA-256 differs")
    return state


class SafeUnpickler(pickle.Unpickler):
    """Unpickles only what DCP writes in `.metadata`: plain records of names, shapes and dtypes."""

    ALLOWED = {
        "torch": {"Size", "float32", "float64", "bfloat16", "int64"},
        "torch.serialization": {"_get_layout"},
        "pathlib": {"PosixPath"}, "pathlib._local": {"PosixPath"},
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING", "BytesStorageMetadata"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    }

    def find_class(self, module, name):
        if name not in self.ALLOWED.get(module, ()):
            raise UserError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """DCP's reader, which by itself unpickles `.metadata` and byte entries without limits."""

    def read_metadata(self, *args, **kwargs):
        file = Path(self.path) / ".metadata"
        try:
            with open(file, "rb") as stream:
                metadata = SafeUnpickler(stream).load()
            if not isinstance(metadata, Metadata):
                raise UserError(f"it holds {type(metadata).__name__}")
        except Exception as error:
            raise UserError(f"{file}: refused, not plain metadata ({error})") from None
        for name, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, BytesStorageMetadata):
                raise UserError(f"{file}: refused, {name} is pickled bytes, not a tensor")
        return metadata


def read_step(path, tensors):
    """Fill `tensors`, {name: tensor or DTensor}, in place from a step directory."""
    reader = SafeReader(str(path))
    entries = reader.read_metadata().state_dict_metadata
    tensors = {name_in(entries, name): tensor for name, tensor in tensors.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    prefixes = {name.split(".")[0] for name in wanted}
    check_tensors(wanted, {name: tuple(entry.size) for name, entry in entries.items()
                           if name.split(".")[0] in prefixes}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is but one process
        try:
            dcp.load(tensors, storage_reader=reader)
        except CheckpointException as error:
            raise UserError(f"{path}: its tensors cannot be read ({root_cause(error)})") from None


def name_in(entries, name):
    """The name of a tensor in a step directory: older ones call the output head ff_out."""
    old_name = name.replace(".lm_head.", ".ff_out.", 1)
    return old_name if old_name in entries else name


def root_cause(error):
    """The error inside DCP's wrapper, in one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def run_of(path):
    """The directory that holds config.json and tokenizer.json: `path`, or its parent for a step."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; python train.py configs/tiny.py makes "
                        "runs/tiny, and of it python adapt.py configs/tiny_sft.py runs/tiny_sft")
    return path.parent if (path / "state.json").is_file() else path


def training_tensors(model, optimizer):
    """{name: tensor} of all that training changes: the weights, AdamW's moments and counts."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p.detach()
        tensors.update((f"optimizer.{name}.{key}", value)
                       for key, value in optimizer.state[p].items())
    return tensors


def save_checkpoint(run, state, model, optimizer):
    """Write RUN/step000500: tensors through DCP, and state.json with each file's size and SHA-256.

    Every rank writes and hashes its own slices; another number of ranks can load them. It is
    written under another name and renamed when all are done: one that exists is whole, a failed one
    is gone. There is no random state to save: training draws nothing, and the data's order is a
    function of the step.
    """
    path = Path(run) / f"step{state['step']:06d}"
    if on_main(path.exists):
        return path
    aside = path.with_name(path.name + ".tmp")
    on_main(lambda: shutil.rmtree(aside, ignore_errors=True))
    files, fault = {}, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is but one process
            dcp.save(training_tensors(model, optimizer), checkpoint_id=aside)
        files = records(aside.glob(f"__{rank()}_*"))
    except (OSError, CheckpointException) as error:
        fault = root_cause(error)
    everyone = gather((files, fault))
    on_main(lambda: finish_checkpoint(path, aside, state, everyone))
    return path


def finish_checkpoint(path, aside, state, everyone):
    """Write state.json over what all ranks have written, and give the checkpoint its name."""
    try:
        faults = [fault for _, fault in everyone if fault]
        if faults:
            raise OSError(faults[0])
        files = {name: record for theirs, _ in everyone for name, record in theirs.items()}
        files |= records(file for file in aside.iterdir() if file.name not in files)  # .metadata
        state = {**state, "files": dict(sorted(files.items()))}
        write_json(aside / "state.json", {**state, "sha256": state_digest(state)})
        aside.rename(path)
        fsync(path.parent)  # an older one may now be deleted: the new name must be on the disk
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"{path}: the checkpoint could not be written ({error}); make room, then "
                        "go on from the one before: "
                        f"python train.py --resume={path.parent}") from None


def records(files):
    """{name: its size and SHA-256}."""
    return {file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)}
            for file in files}


def load_checkpoint(path, model, optimizer):
    """Restore weights and optimiser in place from a step directory, of any number of ranks."""
    read_step(path, training_tensors(model, optimizer))


def drop_old_checkpoints(run, keep_last, keep_every):
    """Delete all but the newest `keep_last` steps and the multiples of `keep_every`.

    They are renamed first: a step's name means whole.
    """
    if keep_last:
        for path in step_directories(run)[:-keep_last]:
            if not keep_every or int(path.name[4:]) % keep_every:
                doomed = path.rename(path.with_name(path.name + ".tmp"))
                shutil.rmtree(doomed)
