"""Arrow's columns as lists of the values that JSON has, and the types of columns.

What JSON has not: times become text, decimals numbers, NaN null (as pandas writes it). Bytes stay
bytes, which the checks of a row name.
"""

import math
from decimal import Decimal

# ---- Values --------------------------------------------------------------------------------------

def values_of(column):
    """The values of a column, a list; its type has been changed to plain_type.

    Objects and lists are put together here: pyarrow makes them value by value, five times slower.
    """
    from pyarrow import types
    if types.is_struct(column.type):
        return objects_of(column)
    if types.is_list(column.type) or types.is_large_list(column.type):
        return lists_of(column)
    if is_text(column.type):
        try:
            return column.to_pylist()
        except UnicodeDecodeError:
            return [text_if_utf8(value) for value in changed(column, bytes_for_text).to_pylist()]
    values = column.to_pylist(maps_as_pydicts="strict")
    is_plain = types.is_integer(column.type) or types.is_boolean(column.type)
    return values if is_plain else [plain_value(value) for value in values]


def objects_of(column):
    """The values of a column of structs: dicts without what is null, None for a null."""
    names = [field.name for field in column.type]
    if len(set(names)) < len(names):
        raise ValueError(f"an object holds a key twice: {', '.join(names)}")
    rows = zip(*map(values_of, column.flatten()), strict=True) if names else [()] * len(column)
    objects = []
    for is_there, values in zip(column.is_valid().to_pylist(), rows, strict=True):
        pairs = zip(names, values, strict=True)
        given = {name: value for name, value in pairs if value is not None}
        objects.append(given if is_there else None)
    return objects


def lists_of(column):
    """The values of a column of lists; None for a null."""
    from pyarrow.compute import list_value_length
    values = values_of(column.flatten())
    lists = []
    begin = 0
    for length in list_value_length(column).to_pylist():
        if length is None:
            lists.append(None)
            continue
        lists.append(values[begin:begin + length])
        begin += length
    return lists


def plain_value(value):
    """A value of another kind as JSON has it."""
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, (list, tuple)):
        return [plain_value(inner) for inner in value]
    if isinstance(value, dict):
        return {key: plain_value(inner) for key, inner in value.items() if inner is not None}
    return value if value is None or isinstance(value, (str, int, bytes)) else str(value)


def text_if_utf8(value):
    """The text that bytes are in UTF-8, or the bytes: the checks of a row name what is wrong."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


# ---- Types ---------------------------------------------------------------------------------------

def kind_of(arrow_type):
    """What JSON calls the values of a column; "bytes" and "times" for what JSON has not."""
    from pyarrow import types
    if types.is_dictionary(arrow_type) or types.is_run_end_encoded(arrow_type):
        return kind_of(arrow_type.value_type)
    if hasattr(arrow_type, "storage_type"):  # an extension type
        return kind_of(arrow_type.storage_type)
    if types.is_nested(arrow_type):
        is_object = types.is_struct(arrow_type) or types.is_map(arrow_type)
        return "an object" if is_object else "a list"
    kinds = {"null": types.is_null, "true or false": types.is_boolean, "a string": is_text,
             "bytes": is_binary, "times": types.is_temporal}
    return next((kind for kind, matches in kinds.items() if matches(arrow_type)), "a number")


def is_text(arrow_type):
    return str(arrow_type) in ("string", "large_string", "string_view")


def is_binary(arrow_type):
    from pyarrow import types
    return (str(arrow_type) in ("binary", "large_binary", "binary_view")
            or types.is_fixed_size_binary(arrow_type))


def changed(column, change):
    """An array with another type, that of `change`, for each of the types in it."""
    wanted = type_with(column.type, change)
    return column if wanted == column.type else column.cast(wanted)


def type_with(arrow_type, change):
    """An Arrow type with each type in it that holds no others replaced by change(that type)."""
    import pyarrow
    from pyarrow import types

    def inner(field):
        return field.with_type(type_with(field.type, change))

    if types.is_struct(arrow_type):
        return pyarrow.struct([inner(field) for field in arrow_type])
    if types.is_map(arrow_type):
        return pyarrow.map_(inner(arrow_type.key_field), inner(arrow_type.item_field))
    if types.is_list(arrow_type):
        return pyarrow.list_(inner(arrow_type.value_field))
    if types.is_large_list(arrow_type):
        return pyarrow.large_list(inner(arrow_type.value_field))
    if types.is_fixed_size_list(arrow_type):
        return pyarrow.list_(inner(arrow_type.value_field), arrow_type.list_size)
    return change(arrow_type)


def plain_type(arrow_type):
    """The type with the same values that Python can hold."""
    import pyarrow
    from pyarrow import types
    if types.is_dictionary(arrow_type):  # each text once, and the numbers of those in the rows
        return plain_type(arrow_type.value_type)
    # Python's own times have no nanoseconds and no year 10,000
    is_time = types.is_temporal(arrow_type) and not types.is_interval(arrow_type)
    if is_time or types.is_string_view(arrow_type):
        return pyarrow.large_string()
    return pyarrow.float32() if types.is_float16(arrow_type) else arrow_type


def utc_for_zones(arrow_type):
    """The type of times in UTC instead of those of another zone, which are stored alike."""
    import pyarrow
    if isinstance(arrow_type, pyarrow.TimestampType) and arrow_type.tz:
        return pyarrow.timestamp(arrow_type.unit, "UTC")
    return arrow_type


def bytes_for_text(arrow_type):
    """The type of the bytes that a text is stored as."""
    import pyarrow
    return pyarrow.large_binary() if is_text(arrow_type) else arrow_type
