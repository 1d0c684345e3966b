"""Tables as the hubs hold them, row by row: Parquet and Arrow files (Feather, save_to_disk).

pyarrow reads them, and is imported only then. Nothing in a table runs code: an extension type that
pyarrow does not know is read as the plain type that it is stored as.
"""

import sys
from collections import Counter
from contextlib import contextmanager

from corpus.arrow_values import (bytes_for_text, changed, kind_of, plain_type, utc_for_zones,
                                 values_of)
from corpus.lines import MOST_BYTES, TABLES, Truncated, ends_in
from support.text import UserError, shown, signature_of

TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")

LEAST_PYARROW = 20  # the oldest that was tried; before 14.0.1, to open a table could run code in it
MOST_ROWS = 256  # made Python objects at a time: as fast as 1,000, also where a row is a book
BATCH_BYTES = 2**24  # unpacked at a time, about
BUFFER_BYTES = 2**20  # of a column's pages: without it pyarrow holds a whole row group in memory
MOST_MEMORY = 4 * MOST_BYTES  # to unpack a few rows: a page, a copy of it, and an array that grows
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
DECRYPT = "decrypt it first, or take it out"
FETCH = "fetch it again, or take it out"


def read_table(file, choose, bar):
    """Yield (row number from 1, row as a dict of JSON values) of a table; `bar` moves along.

    choose: returns the names of the columns to read, given {name: what it holds}; None reads all.
    A null in an object is left out, as a table has each field in each row; NaN is null, as pandas
    writes it. A text that is not UTF-8 is given as its bytes. A row of over MOST_BYTES is an error.
    """
    row = 0
    seen = 0
    size = file.stat().st_size
    check_format(file)
    parts = parts_of(file, choose)
    while True:
        with named_faults(file, row), memory_limit():
            rows, share = next(parts, (None, 1))
        bar.update(int(share * size) - seen)
        seen = int(share * size)
        if rows is None:
            return
        for values in rows:
            row += 1
            yield row, values


def parts_of(file, choose):
    """Yield (rows, share of the file that is read): up to MOST_ROWS dicts at a time."""
    import_pyarrow(file)
    batches = parquet_batches if ends_in(file, ".parquet") else arrow_batches
    row = 0
    for batch, share in batches(file, choose):
        for part in small_parts(batch):
            if part.num_rows == 1 and part.nbytes > MOST_BYTES:
                raise UserError(f"{file}:{row + 1}: one row of over {MOST_BYTES:,} bytes; cut it "
                                "into several, or remove the row")
            row += part.num_rows
            yield rows_of(part), share


def import_pyarrow(file):
    """The package, if it is there and new enough."""
    remedy = f"pip install -U 'pyarrow>={LEAST_PYARROW}'"
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{file}: needs the package pyarrow: {remedy}") from None
    if int(pyarrow.__version__.split(".")[0]) < LEAST_PYARROW:
        raise UserError(f"{file}: needs a newer pyarrow than {pyarrow.__version__}: {remedy}")
    return pyarrow


# ---- What can be wrong with a file ---------------------------------------------------------------

def check_format(file):
    """UserError for a file that is cut off, encrypted, or of another kind than its name says."""
    with open(file, "rb") as raw:
        head = raw.read(1000)
        raw.seek(max(0, file.stat().st_size - 8))
        tail = raw.read()
    if not head:
        raise UserError(f"{file}: 0 bytes, a download that failed; {FETCH}")
    if b"PARE" in (head[:4], tail[-4:]):
        raise UserError(f"{file}: encrypted; {DECRYPT}")
    kind = "Parquet" if ends_in(file, ".parquet") else "Arrow"
    found = "Arrow" if head.startswith(END_OF_STREAM[:4]) else signature_of(head)
    if head.startswith(b"FEA1"):
        raise UserError(f"{file}: Feather's first format; write it again: pandas.read_feather(OLD)"
                        ".to_feather(NEW), with pyarrow below 20")
    if not found and head.lstrip()[:1] in (b"{", b"["):
        raise UserError(f"{file}: not {kind} but JSON; rename it to {file.stem}.jsonl")
    if found and found != kind:
        remedy = f"rename it to {file.stem}{TABLES[found]}" if found in TABLES else FETCH
        raise UserError(f"{file}: not {kind} but {found}; {remedy}")
    if kind == "Parquet" and not found or head.lstrip()[:1] == b"<":
        raise UserError(f"{file}: not {kind} ({shown(head[:20].decode('latin-1'))}); {FETCH}")
    if kind == "Parquet" and tail[-4:] != b"PAR1":
        raise UserError(f"{file}: cut off: its end, which says where its columns are, is missing; "
                        f"{FETCH}")


@contextmanager
def named_faults(file, row):
    """Turn what pyarrow raises into a UserError with the file and the last row that was read."""
    import_pyarrow(file)
    from pyarrow import ArrowException
    try:
        yield
    except UserError:
        raise
    except MemoryError:
        remedy = "write it as Parquet, or " * (not ends_in(file, ".parquet")) + "take it out"
        raise UserError(f"{file}:{row + 1}: to unpack the rows from here on takes over "
                        f"{MOST_MEMORY:,} bytes of memory; {remedy}") from None
    except (ArrowException, OSError, ValueError, KeyError, OverflowError, RecursionError) as error:
        if getattr(error, "errno", None):  # of the disk
            raise
        reason = str(error).strip().partition("\n")[0][:200]
        if "decrypt" in reason:
            raise UserError(f"{file}: encrypted; {DECRYPT}") from None
        message = f"{file}: cannot be read after row {row:,} ({reason}); {FETCH}"
        # a stream has batches up to where it ends; Parquet and Feather lose all with their end
        raise (Truncated if row and ends_in(file, ".arrow") else UserError)(message) from None


@contextmanager
def memory_limit():
    """Let no more than MOST_MEMORY be taken in this block: MemoryError, and not a killed process.

    A file of a few kilobytes can hold a page that unpacks to gigabytes, and no field of it says so
    that could be believed. Only Linux has a limit on what a process takes.
    """
    pages = pages_of_data() if sys.platform == "linux" else 0
    if not pages:
        yield
        return
    import resource
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = pages * resource.getpagesize() + MOST_MEMORY
    if before[0] != resource.RLIM_INFINITY:
        limit = min(limit, before[0])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def pages_of_data():
    """The pages of memory that this process may write to, as the limit counts them; 0: unknown."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[5])


# ---- Batches of rows -----------------------------------------------------------------------------

def parquet_batches(file, choose):
    """Yield (pyarrow.RecordBatch, share of the rows that is read), of a few rows each."""
    from pyarrow.parquet import ParquetFile
    with ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False,
                     page_checksum_verification=True) as table:
        names = chosen_columns(table.schema_arrow, choose, file)
        total = table.metadata.num_rows
        done = 0
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
            most_rows = min(MOST_ROWS, max(1, BATCH_BYTES // row_bytes))
            for batch in table.iter_batches(most_rows, [number], names, use_threads=False):
                done += batch.num_rows
                yield batch.select(names), done / max(done, total)
        if done != total:
            raise ValueError(f"it holds {done:,} rows, where it says {total:,}")


def arrow_batches(file, choose):
    """Yield (pyarrow.RecordBatch, share of the file that is read) of Arrow's two formats.

    The file format (Feather) has a list of its batches at its end, and the stream format, which
    `datasets` writes, an end mark. A batch is held in memory whole.
    """
    from pyarrow import OSFile, ipc
    with OSFile(str(file)) as source:
        is_stream = source.read(6) != b"ARROW1"
        opened = ipc.open_stream if is_stream else ipc.open_file
        source.seek(0)
        schema = opened(source).schema
        names = chosen_columns(schema, choose, file)
        numbers = [schema.get_field_index(name) for name in names]
        options = ipc.IpcReadOptions(included_fields=numbers, use_threads=False)
        source.seek(0)
        reader = opened(source, options=options)
        for batch, share in (stream_batches if is_stream else listed_batches)(source, reader):
            check_arrays(batch)
            yield batch.select(names), share


def listed_batches(source, reader):
    """Yield (batch, share of the file that is read) of the file format."""
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number), (number + 1) / reader.num_record_batches


def stream_batches(source, reader):
    """Yield (batch, share of the file that is read) of the stream format."""
    for batch in reader:
        yield batch, source.tell() / source.size()
    # subtle: pyarrow takes a file that was cut off between two batches for a whole one
    source.seek(max(0, source.size() - len(END_OF_STREAM)))
    if source.read() != END_OF_STREAM:
        raise ValueError("its end mark is missing")


def check_arrays(batch):
    """ArrowInvalid for arrays that point outside of their bytes, which Arrow reads as they lie."""
    from pyarrow import ArrowInvalid
    try:
        batch.validate(full=True)
    except ArrowInvalid:
        # perhaps for text that is not UTF-8, which is an error of its row alone
        for column in batch.columns:
            changed(column, bytes_for_text).validate(full=True)


def chosen_columns(schema, choose, file):
    """The names of the columns to read."""
    types = {field.name: kind_of(field.type) for field in schema}
    names = list(types) if choose is None else choose(types)
    counts = Counter(schema.names)
    for name in names:
        if counts[name] > 1:
            raise UserError(f"{file}: the column {name} is there {counts[name]} times; rename or "
                            "remove the others")
    if not names:
        raise UserError(f"{file}: a table without columns; take it out")
    return names


# ---- Rows ----------------------------------------------------------------------------------------

def small_parts(batch):
    """Yield the batch in parts of MOST_ROWS, of types that Python has; large rows one by one."""
    from pyarrow import RecordBatch
    names = batch.schema.names
    for begin in range(0, batch.num_rows, MOST_ROWS):
        columns = []
        for column in batch.slice(begin, MOST_ROWS).columns:
            column = changed(column, utc_for_zones)  # a zone may be one that nobody knows
            columns.append(changed(column, plain_type))
        part = RecordBatch.from_arrays(columns, names)
        if part.nbytes <= BATCH_BYTES:
            yield part
        else:
            for row in range(part.num_rows):
                yield part.slice(row, 1)


def rows_of(batch):
    """The rows of a batch, a list of dicts."""
    columns = [values_of(column) for column in batch.columns]
    names = batch.schema.names
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
