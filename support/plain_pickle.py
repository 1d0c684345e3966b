"""A file of torch.save, read for its numbers and texts alone: nothing else in it is built.

Official train.pt holds random states of Python, numpy and PyTorch, and paths, beside five numbers.
Unpickling freely would call whatever function the file names.
"""

import io
import pickle
import zipfile

from support.text import UserError, refuse_pointer

MOST_BYTES = 2**22  # of the part without tensors; in a 7B it has some 100 kB

# The names in files that official OLMo writes. What they stand for is not built.
LEFT_OUT = {
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.numeric": {"_frombuffer"},
    "numpy.core.numeric": {"_frombuffer"},
    "_codecs": {"encode"},
    "collections": {"OrderedDict", "defaultdict"},
    "torch": {"ByteStorage", "FloatStorage", "LongStorage", "Size", "device"},
    "torch._utils": {"_rebuild_tensor", "_rebuild_tensor_v2"},
    "torch.storage": {"UntypedStorage", "TypedStorage", "_load_from_bytes"}}


class LeftOut:
    """Stands for an object that is not built: it takes what it is given and keeps nothing."""

    def __new__(cls, *arguments, **options):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def extend(self, values):
        pass

    append = extend


class NamelessUnpickler(pickle._Unpickler):
    """Builds numbers, texts, lists, tuples and dicts; any name in a pickle is a UserError.

    A subclass says in find_class what may stand for which names. Nothing else is imported.
    """

    # subtle: it is the slow one, in Python. The fast one keeps what a pickle remembers in an array,
    # and eight bytes that remember one thing as number 2**31 make it take 32 GiB.

    def find_class(self, module, name):
        raise UserError(f"it names {module}.{name}, which no checkpoint needs")


class PlainUnpickler(NamelessUnpickler):
    """Builds LeftOut for the names in LEFT_OUT."""

    def find_class(self, module, name):
        if name in LEFT_OUT.get(module, ()):
            return LeftOut
        return super().find_class(module, name)

    def persistent_load(self, number):
        return LeftOut()  # the numbers of a tensor, which lie elsewhere in the file


def read_plain(file):
    """The value in a file of torch.save, with LeftOut for tensors, arrays and paths.

    UserError for a file that is damaged, or that names anything else; nothing of it is run.
    """
    refuse_pointer(file)
    try:
        with zipfile.ZipFile(file) as archive:
            [entry] = [each for each in archive.infolist() if each.filename.endswith("data.pkl")]
            if entry.file_size > MOST_BYTES:
                raise UserError(f"its data.pkl has {entry.file_size:,} bytes")
            pickled = archive.read(entry)
    except PermissionError:
        raise
    except Exception as error:  # zipfile and zlib raise many kinds
        raise UserError(f"{file}: damaged, or not a file of torch.save ({one_line(error)}); fetch "
                        "it again") from None
    return unpickled(pickled, file)


def unpickled(pickled, place):
    """The value of pickled bytes, read as by read_plain; place begins the message of an error."""
    try:
        return PlainUnpickler(io.BytesIO(pickled)).load()
    except Exception as error:  # pickle raises many kinds for bytes that are no pickle
        raise UserError(f"{place}: refused, and nothing in it was run: {one_line(error)}; fetch it "
                        "again from where it was published") from None


def one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__
