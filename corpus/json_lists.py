"""JSON files: an object a line, one list of objects, or objects over several lines.

What is not an object a line is cut into its values here, by quotes and brackets alone. They are
parsed one by one later, like lines, so a list of many GB is never in memory.
"""

import re

from tqdm import tqdm

from corpus.lines import MOST_BYTES, Truncated, line_number, opened, read_lines
from support.text import MOST_LEVELS, UserError, lines_after, parsed_json, refuse_pointer

NO_SPACE = re.compile(rb"[^ \t\r\n]")
MARK = re.compile(rb'["\[\]{}]')
WORD_END = re.compile(rb"[ \t\r\n,\[\]{}]")  # of a number, or of null, or of what is no JSON
MOST_OF_SETTINGS = 2**26  # bytes of a .json file that may be a configuration, or a vocabulary
CLOSING = {b"{": b"}", b"[": b"]"}


def read_json_values(file, bar):
    """Yield (line, number, bytes) of each line or value of a JSON file.

    line: where it begins; number: which of the values that begin on this line it is, from 1.
    """
    with opened(file, bar) as content:
        if holds_lines(content.head()):
            for line, each in read_lines(file, content):
                yield line, 1, each
            return
        values = Values(file, content, MOST_BYTES)
        is_list = values.next_char() == b"["
        yield from values.of_list() if is_list else values.one_by_one()


def holds_lines(head):
    """Whether a JSON file that begins like this has a value on each line."""
    begin = head.lstrip()
    first, newline, others = begin.partition(b"\n")
    if begin.startswith(b"{"):  # an object that goes on on the next line
        return not (newline and first.rstrip().endswith((b"{", b"[", b",", b":")))
    # a list on each line: chats in another form, of which each is an error of its line
    return not begin.startswith(b"[") or (bool(others.strip()) and is_json(first))


def is_json(line):
    try:
        parsed_json(line, ":1")
    except UserError:
        return False
    return True


def holds_rows(file):
    """Whether a .json file in a folder is data: a list of objects, or several objects.

    Else it is one object, as the configuration of something is. What is an error to read, such as
    UTF-16, is data: the error tells more than a count.
    """
    try:
        refuse_pointer(file)
        with opened(file, tqdm(disable=True)) as content:
            head = content.head().lstrip()
            if head.startswith(b"["):
                return head[1:].lstrip().startswith(b"{")
            if b"\n" in head and holds_lines(head):
                others = head.partition(b"\n")[2].lstrip()
                return head.startswith(b"{") and others.startswith(b"{")
            return holds_objects(Values(file, content, MOST_OF_SETTINGS))
    except (UserError, OSError):
        return True


def holds_objects(values):
    """Whether there is more than one object, or one that is too long for a configuration."""
    try:
        first = values.next_char()
        values.value()
        return first == b"{" and values.next_char() == b"{"
    except UserError:  # what is broken before its end is not even one
        return len(values.held) > MOST_OF_SETTINGS


def list_inside(file):
    """The key under which the one object of a .json file holds a list of objects; "" if none.

    A chat, which is such an object, has a list too, and is a row itself.
    """
    try:
        with opened(file, tqdm(disable=True)) as content:
            values = Values(file, content, MOST_OF_SETTINGS)
            values.next_char()
            value = parsed_json(values.value()[2], f"{file}:1")
    except (UserError, OSError):
        return ""
    if not isinstance(value, dict) or value.keys() & {"messages", "conversations", "conversation"}:
        return ""
    lists = [key for key, rows in value.items() if isinstance(rows, list)]
    return next((key for key in lists if value[key] and isinstance(value[key][0], dict)), "")


class Values:
    """Cuts a stream of JSON into its outermost values."""

    def __init__(self, file, content, most_bytes):
        self.file = file
        self.content = content
        self.most_bytes = most_bytes  # of a value
        self.held = bytearray()  # what is read and not taken
        self.line = 1  # on which it begins
        self.begun = 0  # the line on which the last value begins
        self.number = 0  # which of the values that begin there it is

    def of_list(self):
        """Yield (line, number, bytes) of the values in a list, whose bracket is next."""
        self.take(1)
        char = self.next_char()
        while char != b"]":
            if not char:
                raise Truncated(f"{self.file}: cut off on line {self.line}, where its list has no "
                                "end; fetch it again")
            yield self.value()
            char = self.next_char()
            if char == b",":
                self.take(1)
                char = self.next_char()
                if char == b"]":
                    raise self.fault("a comma before the end of the list", "remove it")
            elif char not in (b"]", b""):
                raise self.fault("no comma between two values of a list", "write it")
        self.take(1)
        if self.next_char():
            raise self.fault("more after the end of the list", "remove what is not the list")

    def one_by_one(self):
        """Yield (line, number, bytes) of values after one another."""
        while self.next_char():
            yield self.value()

    def next_char(self):
        """The next character that is no space, which is then the first held; b"" at the end."""
        while not (found := NO_SPACE.search(self.held)):
            self.take(len(self.held))
            if not self.fill():
                return b""
        self.take(found.start())
        return bytes(self.held[:1])

    def value(self):
        """Returns (line, number, bytes) of the value that is next, and takes it."""
        self.number = self.number + 1 if self.line == self.begun else 1
        self.begun = self.line
        return self.begun, self.number, self.take(self.end())

    def end(self):
        """Where the value ends that begins what is held."""
        first = bytes(self.held[:1])
        if first not in (b"{", b"[", b'"'):
            return self.end_of_word()
        closing = []  # the brackets that must come yet, the next one last
        position = 0
        while True:
            found = MARK.search(self.held, position)
            if not found:
                position = len(self.held)
                self.fill_value()
                continue
            mark = found[0]
            position = found.end()
            if mark == b'"':
                position = self.end_of_string(position)
            elif mark in CLOSING:
                closing.append(CLOSING[mark])
            elif mark != closing.pop():
                raise self.fault(f"{mark.decode()} closes what it did not open", "correct it",
                                 found.start())
            if not closing:
                return position
            if len(closing) > MOST_LEVELS:
                raise self.fault(f"lists or objects in each other, over {MOST_LEVELS} levels",
                                 "remove the value")

    def end_of_word(self):
        """Where a number, null or what is no JSON ends that begins what is held."""
        position = 1
        while not (found := WORD_END.search(self.held, position)):
            position = len(self.held)
            if not self.fill():
                return position
        return found.start()

    def end_of_string(self, position):
        """Where the string ends whose first character is at `position`."""
        while True:
            quote = self.held.find(b'"', position)
            if quote < 0:
                position = len(self.held)
                self.fill_value()
                continue
            escapes = 0
            while self.held[quote - 1 - escapes] == ord("\\"):
                escapes += 1
            position = quote + 1
            if escapes % 2 == 0:
                return position

    def fill(self):
        """Read more; returns whether there was more. UserError if one value takes too much."""
        if len(self.held) > self.most_bytes:
            raise self.fault(f"one value of over {self.most_bytes:,} bytes", "write several")
        chunk = self.content.take()
        self.held += chunk
        return bool(chunk)

    def fill_value(self):
        """The same within a value, which must have an end."""
        if not self.fill():
            raise Truncated(f"{self.file}: cut off in the value that begins on line "
                            f"{line_number(self.begun, self.number)}; fetch it again")

    def take(self, size):
        """Removes the first bytes from what is held, and returns them."""
        taken = bytes(self.held[:size])
        self.line += taken.count(b"\n")
        del self.held[:size]  # subtle: takes no time, as a bytearray keeps its start
        return taken

    def fault(self, what, remedy, position=0):
        """The UserError for a fault at this position of what is held."""
        place = f"{self.file}:{line_number(self.begun, self.number)}"
        lines = self.line - self.begun + self.held.count(b"\n", 0, position)
        return UserError(f"{lines_after(place, lines)}: {what}; {remedy}")
