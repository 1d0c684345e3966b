"""Sets of chats, preferences and prompts: their files are read, and their faults are summed up."""

import re
from collections import Counter

from corpus.documents import parse, read_records
from corpus.questions import stdlib_chats, stdlib_preferences
from corpus.source_files import is_there
from support.bars import stage
from support.chat_forms import CHATS, PREFERENCES, FormOfFile
from support.chats import checked_chat, checked_preference
from support.files import UserError, here, near_file
from support.text import counted, noted

EXAMPLES = 10  # a message shows so many faulty rows
REASONS = 20  # and so many reasons
ON_ONE_LINE = 5  # so few faults need no table


# ---- A set ---------------------------------------------------------------------------------------

@stage("reading the examples")
def read_examples(config, key, encode, eval_share):
    """The examples of the set that `key` names, in its order; [] if no eval_data is named.

    key: "train_data" or "eval_data". encode(row, place=, counts=) makes an example of a row, or
    None. Prints how many rows were cut or dropped.
    """
    path = getattr(config, key)
    if not path and key == "eval_data":
        return []
    if not path:
        raise UserError("train_data: name the rows to train on, --train_data=FILE.jsonl, or "
                        "--train_data=stdlib for the embedded set")
    beside = "" if path == "stdlib" or is_there(path) else near_file(path)
    if beside:
        raise UserError(f"{key}={path}{here(path)}: no such file or folder; {beside}")
    counts = Counter()  # {what was done to rows: how many}; nothing is dropped in silence
    examples = []
    for place, row in read_set(path, config, key == "eval_data", eval_share, counts):
        example = encode(row, place=place, counts=counts)
        if example is not None:
            examples.append(example)
    if not examples:
        raise UserError(f"{key}={path}: none of its rows can be used{listed(counts)}; name "
                        "another file")
    kind = "chats" if config.method == "sft" else "pairs"
    print_set(key, path, kind, sequences_of(examples), len(examples), counts)
    return examples


def sequences_of(examples):
    """The Examples of a set; for Pairs all the chosen ones, and then all the rejected ones."""
    if examples and hasattr(examples[0], "chosen"):
        chosen = [pair.chosen for pair in examples]
        rejected = [pair.rejected for pair in examples]
        return chosen + rejected
    return list(examples)


def print_set(key, path, kind, sequences, examples, counts):
    """A line on a set that was read: its size, what of it is trained, what was cut or dropped."""
    tokens = sum(len(sequence.ids) for sequence in sequences)
    trained = sum(int(sequence.trained.sum()) for sequence in sequences)
    print(f"{key}={path}: {noted(examples, kind)} of {tokens:,} tokens, {trained / tokens:.0%} of "
          f"them in answers{listed(counts)}")


def listed(counts):
    """What was done to rows and files, and how often: `; 3 dropped, as ...; 1 cut, ...`."""
    return "".join(f"; {noted(count, what)}" for what, count in counts.items() if count)


def read_set(path, config, held_out, eval_share, counts):
    """[(place, row)] of a set: messages for SFT, {prompt, chosen, rejected} for DPO.

    UserError sums up the faulty rows; with config.faulty "skip" they are dropped and counted.
    """
    if config.method == "sft":
        check, forms = checked_chat, CHATS
        embedded = stdlib_chats
    else:
        check, forms = checked_preference, PREFERENCES
        embedded = stdlib_preferences
    if path == "stdlib":
        rows = [(f"stdlib:{name}", row) for name, row in embedded(held_out, eval_share)]
        return [(place, check(row, place)) for place, row in rows]
    faults = Faults()
    rows = [(place, checked)
            for place, _, checked in checked_rows(path, forms, check, counts, faults)]
    if config.method == "sft":
        counts["answers of weight 0, not trained"] += sum(
            "weight" in message for _, messages in rows for message in messages)
    if config.faulty == "stop":
        faults.stop(", or drop them with --faulty=skip")
    elif faults.rows:
        counts["faulty rows skipped"] += faults.rows
        print(f"{path}: skipped {faults.rows:,} faulty rows of {faults.rows + len(rows):,}:\n"
              f"{faults.table()}")
    return rows


# ---- Rows ----------------------------------------------------------------------------------------

def checked_rows(path, forms, check, counts, faults):
    """Yield (place, row, check(row, place)) of a file or folder; place is file:line.

    A file whose form is not ours is said to be read as what it is: Alpaca, ShareGPT, ...
    A row with a fault goes to `faults`, and the others go on: the user wants to know all faults.
    UserError if there is no row at all.
    """
    is_empty = True
    form = FormOfFile(forms)
    for record in read_records(path, "", counts):
        is_empty = False
        try:
            row = parse(record)
            form.check(row, record.place)
            checked = check(row, record.place)
        except UserError as fault:
            faults.add(record.place, str(fault))
            continue
        faults.sound += 1
        yield record.place, row, checked
    if is_empty:
        raise UserError(f"{path}: holds no rows{listed(counts)}; name a file of JSON objects")


class Faults:
    """The faulty rows of a set, counted by reason."""

    def __init__(self):
        self.sound = 0  # rows without a fault
        self.rows = 0
        self.examples = []  # the first messages, with their places
        self.reasons = Counter()
        self.first = {}  # {reason: the first place}

    def add(self, place, fault):
        self.rows += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(fault)
        # numbers differ from row to row; without them equal faults are counted together
        reason = re.sub(r"[0-9][0-9,]*", "N", fault.removeprefix(f"{place}: "))
        self.reasons[reason] += 1
        self.first.setdefault(reason, place)

    def table(self):
        """A line for each reason: how many rows, what is wrong, and the first of them."""
        lines = []
        for reason, count in self.reasons.most_common(REASONS):
            lines.append(f"  {counted(count, 'row')}, the first {self.first[reason]}: {reason}")
        others = len(self.reasons) - REASONS
        if others > 0:
            count = self.rows - sum(n for _, n in self.reasons.most_common(REASONS))
            lines.append(f"  {counted(count, 'row')} for {others:,} other reasons")
        return "\n".join(lines)

    def stop(self, or_else=""):
        """UserError if there are faulty rows."""
        if not self.rows:
            return
        remedy = f"mend {self.rows:,} of {counted(self.rows + self.sound, 'row')}{or_else}"
        if len(self.reasons) == 1 and self.rows > 1 and not self.sound:  # of another kind
            raise UserError(f"{self.examples[0]} (all {self.rows:,} rows have this fault)")
        if self.rows <= ON_ONE_LINE:
            raise UserError(f"{'; '.join(self.examples)}; {remedy}")
        examples = "\n  ".join(self.examples)
        print(f"the first {len(self.examples)} of {self.rows:,} faulty rows:\n  {examples}\n"
              f"all by reason:\n{self.table()}")
        raise UserError(f"{self.examples[0]}; {remedy}; the others are listed above")
