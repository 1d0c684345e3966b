"""The safetensors files of a Hugging Face directory."""

from support.files import UserError, read_json
from support.text import refuse_pointer

FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the dtypes that are read


def read_shapes(path):
    """{name: shape} of the tensors in the safetensors files of a directory; none is loaded."""
    safe_open = import_safetensors().safe_open
    shapes = {}
    for file in safetensors_files(path):
        found = {}
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    part = tensors.get_slice(name)
                    found[name] = (part.get_dtype(), tuple(part.get_shape()))
        except Exception as error:
            raise UserError(f"{file}: damaged or not safetensors ({error})") from None
        for name, (dtype, shape) in found.items():
            if dtype not in FLOATS:
                raise UserError(f"{file}: {name} is {dtype}; quantised weights are not read, only "
                                f"{', '.join(FLOATS)}")
            if name in shapes:
                raise UserError(f"{file}: {name} is in another file too; delete one of the two")
            shapes[name] = shape
    return shapes


def read_safetensors(path):
    """{name: tensor} of the safetensors files of a directory."""
    load_file = import_safetensors().torch.load_file
    tensors = {}
    for file in safetensors_files(path):
        try:
            tensors.update(load_file(file))
        except Exception as error:
            raise UserError(f"{file}: damaged or not safetensors ({error})") from None
    return tensors


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
        refuse_pointer(file)
    return files


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("Hugging Face weights need the package safetensors: "
                        "pip install safetensors") from None
    return safetensors
