"""What of a folder is not read: how many files for which reason, the first of them, what to do."""

from collections import Counter

NAMED_ENDINGS = 5  # the commonest of the files that are not read; the others are counted together

# How a file of another kind becomes one that is read, by its ending. pandas names what it lacks.
TABLE = ('python -c "import pandas; pandas.read_{}.to_json(\'NEW.jsonl\', '
         'orient=\'records\', lines=True)"')
EXCEL = TABLE.format("excel('OLD')")
TEXT = "save it as text, NAME.txt"
REMEDIES = {
    ".zst": "zstd -d OLD; what holds JSON may be packed, as NAME.jsonl.zst",
    ".gz": "gunzip OLD; what holds JSON may be packed, as NAME.jsonl.gz",
    ".xz": "unxz OLD", ".bz2": "bunzip2 OLD", ".zip": "unzip OLD", ".7z": "7z x OLD",
    **dict.fromkeys((".tar", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2", ".tar.zst"), "tar -xf OLD"),
    ".csv": TABLE.format("csv('OLD')"), ".tsv": TABLE.format("csv('OLD', sep='\\t')"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), EXCEL), ".orc": TABLE.format("orc('OLD')"),
    **dict.fromkeys((".sqlite", ".sqlite3"), "sqlite3 -json OLD 'SELECT * FROM TABLE' > NEW.json"),
    ".pdf": "pdftotext OLD NEW.txt",
    **dict.fromkeys((".doc", ".docx", ".odt", ".rtf", ".html", ".htm", ".epub"), TEXT)}
CAN_BE_READ = "to make one that is read"
ANY_OTHER = "save another kind as text, NAME.txt, or as an object a line, NAME.jsonl"


class LeftOut:
    """The files of a source that are not read, counted by reason."""

    def __init__(self, root):
        self.root = root
        self.counts = Counter()  # {a line that begins with what is counted: how many}
        self.first = {}  # {the same: the first of them}

    def add(self, what, path):
        """Count a file or folder, with what is said of it, such as "links not followed: broken"."""
        self.counts[what] += 1
        self.first.setdefault(what, path)

    def add_files(self, why, files):
        for file in files:
            self.add(f"files not read: {why}", file)

    def add_endings(self, files):
        """Count files of other kinds by the ends of their names."""
        endings = Counter(map(ending_of, files))
        named = {ending for ending, _ in endings.most_common(NAMED_ENDINGS)}
        for file in files:
            ending = ending_of(file)
            remedy = remedy_for(file)
            if ending in named or remedy:
                way = f"; {CAN_BE_READ}: {remedy}" if remedy else ""
                self.add_files((ending or "a name without an ending") + way, [file])
            else:
                self.add_files("other endings", [file])

    def update(self, other):
        """Add what is counted of another part of the source, which comes next."""
        self.counts.update(other.counts)
        self.first = {**other.first, **self.first}

    def notes(self):
        """{what, with the name of the first: how many}."""
        notes = {}
        for what, n in self.counts.items():
            reason, mark, remedy = what.partition(";")
            if what in self.first:
                reason += f" (first {self.first[what].relative_to(self.root).as_posix()})"
            notes[reason + mark + remedy] = n
        return notes


def ending_of(file):
    """.png, or .csv.gz of a compressed file; "" if there is none."""
    is_compressed = file.suffix.lower() in (".gz", ".zst", ".xz", ".bz2", ".zip")
    return "".join(file.suffixes[-2:]) if is_compressed else file.suffix


def remedy_for(file):
    """How a file of another kind becomes one that is read; "" if its ending does not tell."""
    return REMEDIES.get(ending_of(file).lower()) or REMEDIES.get(file.suffix.lower(), "")
