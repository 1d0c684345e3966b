"""Tensors in files, read by slices: each rank copies its own rows, of one tensor at a time.

A 7B is 14 to 28 GB. A whole copy of it on each of a node's eight ranks would not fit into memory.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from scaling.sharding import own_slice
from support import finite
from support.files import UserError


class StoredTensor(NamedTuple):
    """A tensor in a file. Nothing of it is read until its rows are asked for and used."""

    file: Path
    name: str  # as the file calls it
    shape: tuple
    rows: Callable  # rows(first, last): these rows in the file's dtype, last exclusive


def shapes_of(tensors):
    """{name: shape} of {name: tensor or StoredTensor}."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@torch.no_grad()
def copy_own_rows(parts, parameter):
    """Fill this rank's slice of a parameter from StoredTensors whose rows lie one after another.

    The parameter may be sharded, its dtype and device may be others. Raises UserError for a NaN
    or an infinite value, named as in the file.
    """
    first, own = own_slice(parameter)
    for part, low, high, start in parts_within(parts, first, first + len(own)):
        rows = own[start:start + high - low]
        rows.copy_(part.rows(low, high))  # converts the dtype on the way
        finite.check_weights({part.name: rows}, part.file)


def parts_within(parts, first, last):
    """Yields (part, low, high, start) of each part that holds some of the rows first to last.

    low, high: which of its own rows; start: how many rows after `first` these begin.
    """
    before = 0  # the rows of the parts before this one
    for part in parts:
        low = max(first - before, 0)
        high = min(last - before, part.shape[0])
        if low < high:
            yield part, low, high, before + low - first
        before += part.shape[0]


@torch.no_grad()
def check_same_rows(one, other, parameter):
    """UserError unless two StoredTensors are equal in the rows that this rank stores."""
    first, own = own_slice(parameter)
    last = first + len(own)
    if not torch.equal(one.rows(first, last), other.rows(first, last)):
        raise UserError(f"{one.file}: {one.name} differs from the embedding that it is tied to")
