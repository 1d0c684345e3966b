"""The names in official OLMo's safetensors files: base64 of a pickle, which is read and never run.

Official OLMo writes base64.urlsafe_b64encode(pickle.dumps((keys, value_is_pickled))), where keys
are the keys that lead to the tensor in nested dicts (read: olmo/safetensors_util.py, 59a53e3f).
Unpickling can call any function that the pickle names. Here its instructions are read one by one,
and only those are known that make texts, whole numbers, True, False and tuples of them.
"""

import base64
import pickletools

from support.text import UserError, shown

TEXTS_AND_NUMBERS = {"SHORT_BINUNICODE", "BINUNICODE", "BININT", "BININT1", "BININT2"}
CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}  # a longer one is what lies after a MARK
MARK = object()
MOST_CHARACTERS = 10_000  # of a name; in a checkpoint of OLMo it has about 150


def is_encoded(name):
    """True for a name that begins as every such name does, with a pickle's version."""
    return name.startswith("gA")


def decode_name(name, file):
    """Returns (keys, value_is_pickled) of a tensor's name in an official safetensors file.

    keys: a tuple of texts and whole numbers. Raises UserError for any other content.
    """
    try:
        if len(name) > MOST_CHARACTERS:
            raise ValueError(f"has {len(name):,} characters")
        pickled = base64.b64decode(name, altchars=b"-_", validate=True)
        keys, is_pickled = plain_value(pickled)
        if type(keys) is not tuple or not keys or type(is_pickled) is not bool:
            raise ValueError("holds no (keys, value_is_pickled)")
        if not all(type(key) in (str, int) for key in keys):
            raise ValueError("holds a key that is no text")
    except Exception as error:  # pickletools raises many kinds for bytes that are no pickle
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: the name {shown(name)} is refused, as it {reason}; official OLMo "
                        "writes no such name: download the file again") from None
    return keys, is_pickled


def plain_value(pickled):
    """The value of a pickle of texts, numbers and tuples; ValueError for any other instruction."""
    stack = []
    memo = []  # what was remembered, to be repeated
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in TEXTS_AND_NUMBERS:
            stack.append(argument)
        elif opcode.name in CONSTANTS:
            stack.append(CONSTANTS[opcode.name])
        elif opcode.name in TUPLES:
            make_tuple(stack, len(stack) - TUPLES[opcode.name])
        elif opcode.name == "MARK":
            stack.append(MARK)
        elif opcode.name == "TUPLE":
            start = stack.index(MARK)
            del stack[start]
            make_tuple(stack, start)
        elif opcode.name == "MEMOIZE":
            memo.append(stack[-1])
        elif opcode.name == "BINGET":
            stack.append(memo[argument])
        elif opcode.name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"holds the instruction {opcode.name}")
    [value] = stack
    return value


def make_tuple(stack, start):
    """Replace what lies on the stack from `start` on by a tuple of it."""
    stack[start:] = [tuple(stack[start:])]
