"""Documents: files of JSON and text in, one checked dict a document out."""

import difflib
import hashlib
import sys
from collections import Counter
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from corpus.json_lists import read_json_values
from corpus.left_out import CAN_BE_READ
from corpus.lines import (JSON_SUFFIXES, TEXT_SUFFIXES, Truncated, ends_in, line_number,
                          read_parts)
from corpus.source_files import input_files, name_in
from corpus.stdlib import stdlib_documents
from corpus.tables import TABLE_SUFFIXES, read_table
from corpus.tokenizer import EOS
from support.bars import bar
from support.text import UserError, decoded, json_type, noted, parsed_json, refuse_pointer

# What the text is called in data sets of others, for "did you mean".
TEXT_KEYS = ("text", "content", "raw_content", "body", "document", "article", "story", "passage",
             "code", "markdown", "sentence", "page_content", "completion", "abstract")
OF_A_DOCUMENT = ("id", "metadata", "added", "created")  # its keys beside the text, as in Dolma
LEAST_HELD_OUT = 100  # characters at the end of a text; fewer measure nothing
MANY_EOS = 10  # so many in one text file are no accident: many corpora put it between documents


def read_documents(path, source, counts=None):
    """Yield {id, text, source, metadata} from a file, a folder (sorted, recursive) or "stdlib".

    metadata.provenance is file:line; where a separator cuts a line into several documents, the
    second one's is file:line.2. Documents with the same metadata.split_group are held out
    together or not at all. `counts`, a Counter, receives how much was repaired or skipped.
    Raises UserError with file and line for input that cannot be read.
    """
    notes = Counter() if counts is None else counts
    for record in read_records(path, source, counts):
        yield as_document(record, source, notes)
    if counts is None:
        print_once(path, notes)


class Record(NamedTuple):
    """A document as it is in its file: unparsed, so that worker processes can parse it."""
    file: str  # relative to the source's path
    line: int
    place: str  # file:line as the user knows it, for messages
    content: bytes | dict  # JSON, text, a row of a table, or an embedded document (finished)
    part: int = 1  # of the documents that begin on this line, which one
    alone: bool = False  # whether its source holds nothing else


def read_records(path, source="", counts=None, allow_truncated=None, progress=False,
                 separator="", text_key=""):
    """Yield the Records of a source.

    counts: a Counter of what is not read, for the caller to show; None prints it here.
    allow_truncated: read a file that is cut off as far as it goes, warn and count it; False names
    this key in the error, and None does not, as for what the user cannot set it for.
    progress: show a bar of the bytes read. separator: cuts a text file into documents. text_key:
    of a table, read only what a document is made of, whose text has this key; "" reads all columns.
    """
    if path == "stdlib":
        for document in stdlib_documents(source):
            yield Record("", 0, "", document)
        return
    root = Path(path)
    notes = Counter() if counts is None else counts
    files = input_files(root, notes)
    if counts is None:
        print_once(path, notes)
    elif progress:  # a build may take hours, and its table comes last
        for what in notes:
            if CAN_BE_READ in what:
                warn(f"{source}: {noted(notes[what], what)}")
    if separator and not any(ends_in(file, TEXT_SUFFIXES) for file in files):
        raise UserError(f"{root}: separator={separator!r} cuts text files, and none is there; "
                        "leave it out")
    total = sum(file.stat().st_size for file in files)
    with bar(None, f"cleaning {source}", total, "B", hidden=not progress) as shown:
        for file in files:
            name = name_in(root, file)
            try:
                is_empty = True
                for line, part, content in contents_of(file, separator, text_key, shown):
                    is_empty = False
                    place = f"{file}:{line_number(line, part)}"
                    yield Record(name, line, place, content, part)
                notes["tables without rows"] += is_empty and ends_in(name, TABLE_SUFFIXES)
            except OSError as error:
                raise UserError(f"{file}: cannot be read ({error.strerror}); restore it or its "
                                "rights, or take it out") from None
            except Truncated as error:
                if not allow_truncated:
                    way = ", or read what is there: --allow_truncated=true"
                    raise UserError(f"{error}{way * (allow_truncated is False)}") from None
                notes["files cut off"] += 1
                warn(str(error))


def alone_marked(records):
    """Yield the records of an iterator; one that comes alone is marked as such."""
    first = list(islice(records, 2))
    if len(first) == 1:
        first = [first[0]._replace(alone=True)]
    while first:
        yield first.pop(0)  # not held until the end: it may have 1 GiB
    yield from records


def contents_of(file, separator, text_key, bar):
    """Yield (line, part, content) of each document in a file, as Record has them."""
    refuse_pointer(file)
    if ends_in(file, TABLE_SUFFIXES):
        columns = partial(columns_of_documents, file, text_key) if text_key else None
        for row, values in read_table(file, columns, bar):
            yield row, 1, values
    elif ends_in(file, JSON_SUFFIXES):
        yield from read_json_values(file, bar)
    else:
        yield from read_parts(file, separator, bar)


def columns_of_documents(file, text_key, columns):
    """The names of the columns to read of a table of documents.

    columns: {name: what it holds}. UserError, once for the table, if there is no text.
    """
    values = {name: "" if kind == "a string" else None for name, kind in columns.items()}
    if text_key not in columns:
        raise UserError(f"{file}: {why_no_text(values, text_key)}")
    kind = columns[text_key]
    if kind != "a string":
        del values[text_key]
        other = text_key_in(values, text_key)
        remedy = "make it a column of strings, or take the table out"
        if kind == "bytes":
            remedy = f'make it text, as by pandas: table["{text_key}"].str.decode("utf-8")'
        elif other:
            remedy = f'did you mean {other}? {{"path": PATH, "text": "{other}"}}'
        raise UserError(f"{file}: the column {text_key} holds {kind} in each row, not a string; "
                        + remedy)
    return [text_key, *(name for name in OF_A_DOCUMENT if name in columns and name != text_key)]


def parse(record):
    """The JSON value in a Record; for a text file, an object with its text."""
    if isinstance(record.content, dict):
        return record.content
    if ends_in(record.file, JSON_SUFFIXES):
        return parsed_json(record.content, record.place)
    return {"text": decoded(record.content, record.place)}


def as_document(record, source, counts, text_key=None):
    """The document in a Record: the fields that Dolma's format keeps, checked.

    text_key: where its text is, if the user can name it; a text file has none. Raises UserError
    with file:line and the remedy for a field that is missing or of the wrong type.
    """
    if not record.file:  # an embedded document is finished already
        return record.content
    entry = parse(record)
    place = record.place
    if not isinstance(entry, dict):
        raise UserError(f"{place}: holds {json_type(entry)}, not a JSON object; correct or delete "
                        "it")
    is_text_file = ends_in(record.file, TEXT_SUFFIXES)
    text = entry.get("text" if is_text_file or not text_key else text_key)
    if not isinstance(text, str):
        raise UserError(f"{place}: {why_no_text(entry, text_key, record.file)}")
    # where it was read, as in Dolma: trace leads back to this line
    provenance = f"{record.file}:{line_number(record.line, record.part)}"
    # null means none: a table has each column in each row
    given = {key: entry[key] for key in OF_A_DOCUMENT if entry.get(key) is not None}
    name = given.get("id", provenance)
    metadata = given.get("metadata") or {}
    # subtle: True is an int in Python, and no id
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise UserError(f"{place}: id is {json_type(name)}, not a string; correct it")
    if not isinstance(metadata, dict):
        counts["documents whose metadata is no object, and is left out"] += 1
        metadata = {}
    metadata = {**metadata, "provenance": provenance}
    metadata.pop("edited_by", None)  # written by an earlier build
    repaired = without_surrogates(text)
    counts["texts with lone surrogates repaired"] += repaired != text
    counts["texts with NUL characters, which are kept"] += "\0" in text
    if is_text_file:
        note_oddities(text, counts)
    dates = {key: given[key] for key in ("added", "created") if key in given}
    alone = {"alone": True} if record.alone else {}  # split_held_out takes it out again
    return {"id": without_surrogates(str(name)), "text": repaired, "source": source, **dates,
            "metadata": metadata, **alone}


def parse_documents(records, source, funnel):
    """Yield the documents in `records`; a record that holds none is counted and named."""
    for record in records:
        try:
            document = as_document(record, source.name, funnel.notes, source.text)
        except UserError as error:
            # a few bad lines among billions do not stop a build
            funnel.bad_line(str(error), record.place)
            continue
        funnel.counts["documents in"] += 1
        funnel.counts["bytes in"] += size_of(document["text"])
        yield document


def note_oddities(text, counts):
    """Count what is kept in a text file and what few people want there."""
    if text.count(EOS) >= MANY_EOS:
        counts[f"text files read as one document with {EOS} {MANY_EOS} times or more; to cut it, "
               f"set separator=\"{EOS}\" of the source"] += 1
    counts["text files with the line ends of Windows (CR LF), which are kept; to change them: "
           "sed -i 's/\\r$//' FILE"] += "\r\n" in text


def why_no_text(entry, text_key, file=""):
    """What is wrong with a JSON object that holds no text, and what may be meant by it.

    text_key: where its text is, if the user can name it; if not, `file` itself must be changed.
    """
    key = text_key or "text"
    if isinstance(entry.get(key), bytes):  # of a table
        return f"{key} is bytes that are not UTF-8; correct or delete it"
    if not text_key and key in entry and entry[key] is None:
        way = change(file, ".dropna(subset=['text'])", "select(.text != null)")
        return f"text is null, not a string; correct it, or drop each such row: {way}"
    if key in entry:
        return f"{key} is {json_type(entry[key])}, not a string; correct or delete it"
    keys = ", ".join(list(entry)[:10]) or "none at all"
    message = f"no key {key}; its keys are {keys}"
    if entry.keys() & {"messages", "conversations", "prompt", "chosen", "instruction"}:
        return f"{message}: chats and prompts are read by adapt.py, not as documents"
    if "request" in entry:
        return (f"{message}: a request, and not a document; a file holds one of the two kinds: "
                "move the requests to another, which eval.py --suite=FILE reads")
    for name, value in entry.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return f"{message}; if {name} holds the rows: jq -c '.{name}[]' OLD > NEW.jsonl"
    found = text_key_in(entry, key)
    asked = f"did you mean {found}? " if found else ""
    if not text_key:
        name = found or "KEY"
        way = change(file, f".rename(columns={{'{name}': 'text'}})", f".text = .{name}")
        return f"{message}; {asked}rename it to text: {way}"
    return f'{message}; {asked}name it in `sources`: {{"path": PATH, "text": "{found or "KEY"}"}}'


def change(file, of_table, of_object):
    """A command that changes each row of a table, or of another file by a filter of jq."""
    kind = next((kind for kind in ("parquet", "feather") if ends_in(file, f".{kind}")), None)
    if kind:
        return (f"python -c \"import pandas; pandas.read_{kind}('OLD'){of_table}"
                f".to_{kind}('NEW')\"")
    return f"jq -c '{of_object}' OLD > NEW.jsonl"


def text_key_in(entry, key):
    """Which key of an object may hold its text: one spelt like `key`, or a usual one; or ""."""
    texts = [name for name, value in entry.items() if isinstance(value, str)]
    likely = difflib.get_close_matches(key, texts, n=1)
    likely += [name for name in TEXT_KEYS if name in texts]
    return likely[0] if likely else ""


def without_surrogates(text):
    """`text` with U+FFFD for each lone surrogate, which JSON can hold and UTF-8 cannot."""
    if text.isascii():
        return text
    # through UTF-16, as a proper pair of surrogates becomes its character there
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def split_held_out(documents, eval_share, notes):
    """Yield (document, whether it is held out) of the documents that passed all rules.

    Where a document is all that its source holds, no hash can choose a share. Its last part is
    held out, as nanoGPT does with its input.txt; `notes` receives a line about it.
    """
    for document in documents:
        alone = document.pop("alone", False)
        text = document["text"]
        cut = begin_of_end(text, eval_share) if alone else 0
        if not text[:cut].strip() or len(text[cut:].strip()) < LEAST_HELD_OUT:
            yield document, is_held_out(document, eval_share)
            continue
        yield {**document, "text": text[:cut]}, False
        end = f"{document['id']}.2"
        place = document["metadata"]["provenance"]
        share = 100 * (1 - cut / len(text))
        notes[f"documents, {place}, is the whole source; its last {share:.3g} % are held out, as "
              f"document {end}"] += 1
        metadata = {**document["metadata"], "provenance": f"{place}.2"}
        yield {**document, "id": end, "text": text[cut:], "metadata": metadata}, True


def begin_of_end(text, share):
    """Where the last part of a text begins: after a line break, a blank line if one is near."""
    place = round(len(text) * (1 - share))
    least = max(0, place - (len(text) - place) // 4)  # the part is a quarter longer at the most
    for mark in ("\n\n", "\n\r\n", "\n", " "):
        found = text.rfind(mark, least, place)
        if found >= 0:
            return found + len(mark)
    return place


def is_held_out(document, eval_share):
    """Whether the hash of the document's group falls into the held-out share.

    A hash, not a random draw: a document is on the same side when others are added or removed, and
    in every later build (Dolma's held-out sets are drawn by hash too).
    """
    # kept together: near copies on both sides would make the held-out text too easy
    group = str(document["metadata"].get("split_group", document["id"]))
    digest = hashlib.sha256(group.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < eval_share * 2**64  # 64 bits as a fraction of 1


def size_of(text):
    """UTF-8 bytes of a text."""
    return len(text) if text.isascii() else len(text.encode())


def print_once(path, counts):
    """Print what was repaired or not read at `path`, each line once in this process."""
    for what, n in (+counts).items():
        print_line(f"{path}: {noted(n, what)}")


@lru_cache  # a line that was printed is not printed again
def print_line(line):
    tqdm.write(line)


def warn(message):
    """One line on stderr, above any progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)
