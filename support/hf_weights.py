"""The safetensors files of a Hugging Face directory, or of an official checkpoint."""

from functools import partial

from support.files import UserError, read_json
from support.slices import StoredTensor
from support.text import refuse_pointer

FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the dtypes that are read


def open_safetensors(files, name_of=str):
    """{name: StoredTensor} of safetensors files; no tensor is read yet.

    name_of: our reading of a name in the file. UserError for a name that comes twice, and for
    numbers that are no floats.
    """
    stored = {}
    for file in files:
        tensors = opened(file)
        for key in tensors.keys():  # noqa: SIM118
            name = name_of(key)
            part = tensors.get_slice(key)
            if part.get_dtype() not in FLOATS:
                raise UserError(f"{file}: {name} is {part.get_dtype()}; quantised weights are not "
                                f"read, only {', '.join(FLOATS)}")
            if name in stored:
                raise UserError(f"{file}: {name} is in {stored[name].file.name} too; delete one of "
                                "the two")
            stored[name] = StoredTensor(file, name, tuple(part.get_shape()),
                                        partial(rows_of, file, key))
    return stored


def rows_of(file, key, first, last):
    """Rows of a tensor of a safetensors file, as a view of the file in memory.

    subtle: the file is opened for each tensor anew, as what was read stays mapped until it is
    closed: a rank that read its part of a 7B would seem to hold it twice.
    """
    return opened(file).get_slice(key)[first:last]


def opened(file):
    """A safetensors file, opened; UserError unless it is one."""
    refuse_pointer(file)
    try:
        return import_safetensors().safe_open(file, framework="pt")
    except (UserError, PermissionError):
        raise
    except Exception as error:
        raise UserError(f"{file}: damaged or not safetensors ({error})") from None


def tensor_names(file):
    """The names of the tensors in a safetensors file."""
    return list(opened(file).keys())


def safetensors_files(path):
    """model.safetensors, or the files that an index lists; transformers prefers the first too."""
    index = path / "model.safetensors.index.json"
    files = [path / "model.safetensors"]
    if index.is_file() and not files[0].is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise UserError(f"{index}: has no weight_map, {{tensor: file}}; download it again")
        names = sorted(set(map(str, names.values())))
        files = [path / name for name in names]
    for file in files:
        if file.parent != path or not file.is_file():
            raise UserError(f"{file}: missing; the directory must hold its safetensors files, as "
                            "transformers' save_pretrained writes them")
    return files


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("safetensors files need the package safetensors: "
                        "pip install safetensors") from None
    return safetensors
