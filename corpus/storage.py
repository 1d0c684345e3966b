"""The files of built data: clean documents in gzip blocks, token shards with an index."""

import errno
import gzip
import hashlib
import json
import zlib

import numpy as np

from corpus.funnel import why_nothing_is_left
from support.files import UserError, file_sha256, fsync, read_json, to_json, write_json
from support.lock import Lock

BLOCK_BYTES = 2**16  # JSON lines compressed together: what is read to get at one document
FILE_BYTES = 2**30  # a file of clean documents is closed when it is larger (compressed)

# A row for each document of a shard: NAME.index next to NAME.bin.
DOCUMENT_INDEX = np.dtype([
    ("start", "<i8"), ("end", "<i8"),  # its tokens in the shard, EOS included, end exclusive
    ("id", "<u8"),  # hash_of_id of its id
    ("file", "<i4"), ("line", "<i4"), ("block", "<i8"),  # where its text is: see read_block
])


def store_documents(folder, batches, workers, source, funnel):
    """Write the clean documents of a source, the held-out ones, and what the rules did.

    batches: (lines, held-out lines, funnel), a generator that does all the work; a line is a
    document in JSON, bytes. The workers compress them.
    """
    for name in ("documents", "held_out", "dropped"):
        (folder / name).mkdir()
    writer = DocumentWriter(folder / "documents", source.name)
    with open(folder / "held_out" / f"{source.name}.jsonl", "wb") as held_out_file:
        lines = lines_to_train_on(batches, held_out_file, funnel)
        # by bytes, as a block may be a document of 1 GiB; small ones cost less in one message
        for members in workers.map(pack, in_groups(in_blocks(lines), len, 8 * BLOCK_BYTES)):
            for member in members:
                writer.add(member)
    writer.close()
    if not writer.blocks:
        raise UserError(why_nothing_is_left(source, funnel))
    np.array(writer.blocks, "<i8").tofile(folder / f"{source.name}.blocks")
    with open(folder / "dropped" / f"{source.name}.jsonl", "w") as dropped_file:
        for rule, examples in funnel.examples.items():
            for example in examples:
                dropped_file.write(to_json({"rule": rule, **example}) + "\n")
    write_json(folder / f"{source.name}.funnel.json", funnel.as_json())


def lines_to_train_on(batches, held_out_file, funnel):
    """Yield the lines of the training documents, and write down all else that batches hold."""
    for lines, held_out, part in batches:
        funnel.add(part)
        held_out_file.writelines(held_out)
        yield from lines


def in_blocks(lines):
    """Yield the lines joined to blocks of BLOCK_BYTES or a little more."""
    return map(b"".join, in_groups(lines, len, BLOCK_BYTES))


def in_groups(items, size_of, least):
    """Yield the items in lists, in order; a list is full when it has `least` bytes or more."""
    group = []
    size = 0
    for item in items:
        group.append(item)
        size += size_of(item)
        if size >= least:
            yield group
            group = []
            size = 0
    if group:
        yield group


def pack(blocks):
    """Each block as a gzip member."""
    # mtime=0: gzip stores the time, and the same documents must give the same bytes
    return [gzip.compress(block, 3, mtime=0) for block in blocks]


class DocumentWriter:
    """Writes clean documents in Dolma's layout: SOURCE-00000.jsonl.gz, -00001, ...

    A gzip file may consist of many members, and each can be read without the ones before it. So
    each block of lines is a member of its own; `blocks` lists (file number, first byte) of each.
    """

    def __init__(self, folder, source):
        self.folder = folder
        self.source = source
        self.blocks = []
        self.files = 0
        self.out = None

    def add(self, member):
        """Append a block that is packed."""
        if self.out is None or self.out.tell() > FILE_BYTES:
            self.open_next_file()
        self.blocks.append((self.files - 1, self.out.tell()))
        self.out.write(member)

    def open_next_file(self):
        self.close()
        self.out = open(self.folder / f"{self.source}-{self.files:05d}.jsonl.gz", "wb")
        self.files += 1

    def close(self):
        if self.out:
            self.out.close()


def read_block(folder, source, file, begin):
    """The JSON lines, list of bytes, of the block that begins at byte `begin` of a file."""
    member = zlib.decompressobj(wbits=31)  # 31: gzip's header; it stops after one member
    parts = []  # joined at the end: one document may have 100 MB
    with open(folder / f"{source}-{file:05d}.jsonl.gz", "rb") as compressed:
        compressed.seek(begin)
        while not member.eof:
            part = compressed.read(BLOCK_BYTES)
            if not part:
                raise UserError(f"{compressed.name}: cut off at byte {compressed.tell()}; delete "
                                "the built data and its stages: they are then built again")
            parts.append(member.decompress(part))
    return b"".join(parts).splitlines()


def blocks_of(folder, source):
    """[[file number, first byte]] of the blocks of a source, as the clean stage wrote them."""
    return np.fromfile(folder / f"{source}.blocks", "<i8").reshape(-1, 2).tolist()


def stored_documents(folder, source):
    """Yield the clean documents of a source in their order."""
    for file, begin in blocks_of(folder, source):
        for line in read_block(folder / "documents", source, file, begin):
            yield json.loads(line)


def held_out_files(folder):
    """{source: file} of the held-out documents in a folder of built data."""
    return {path.stem: path for path in sorted((folder / "held_out").glob("*.jsonl"))}


def hash_of_id(name):
    """64 bits of the hash of a document's id: finds it in an index, draws it for a part."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


class ShardWriter:
    """Writes one shard: NAME.bin, its token ids without a header, and NAME.index."""

    def __init__(self, folder, name):
        self.path = folder / f"{name}.bin"
        self.token_file = open(self.path, "wb")
        self.index_file = open(self.path.with_suffix(".index"), "wb")
        self.tokens = 0
        self.documents = 0

    def add(self, ids, row):
        """Append a document; row: its DOCUMENT_INDEX, but for its place in this shard."""
        row = row.copy()
        row["start"] = self.tokens
        row["end"] = self.tokens + len(ids)
        self.token_file.write(ids.tobytes())
        self.index_file.write(row.tobytes())
        self.tokens += len(ids)
        self.documents += 1

    def close(self):
        """Returns the shard's entry in the manifest."""
        self.token_file.close()
        self.index_file.close()
        return {"file": self.path.name, "tokens": self.tokens, "documents": self.documents,
                "sha256": file_sha256(self.path)}


def shards_of(folder, source):
    """The list of a source's shards, as write_shards gave it: {file, tokens, documents, sha256}."""
    return json.loads((folder / f"{source}.shards.json").read_text())


def token_dtype(vocab_size):
    """The narrowest unsigned type that holds every id: 2 bytes a token for OLMo's 50,280 ids."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def vocabulary_of(tokenizer):
    """What the manifest says about the ids in its shards."""
    return {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id, "dtype": token_dtype(tokenizer.vocab_size).name}


def mapped_order(path, make, n):
    """The memory-mapped order of n instances in the file `path`, uint32 (n,); make() computes it.

    Data that may only be read needs no file: the order is then returned as make() gives it.
    """
    def is_there():
        return path.is_file() and path.stat().st_size == 4 * n

    try:
        # subtle: one that is there is complete, as it was renamed, and needs no lock to be read
        if not is_there():
            with Lock(path.parent / ".lock"):  # the first rank writes it, the others wait
                if not is_there():
                    aside = path.with_name(path.name + ".tmp")
                    aside.write_bytes(make().tobytes())
                    fsync(aside)  # a name promises a complete order, also after a power cut
                    aside.rename(path)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return make()  # 4 bytes an instance, in each process
    return np.memmap(path, np.uint32, "r")


def hash_of(settings):
    """SHA-256, in hex, of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def tokenizer_digest(path):
    """SHA-256 of what a tokenizer.json says, however the file is laid out."""
    return hash_of(read_json(path))
