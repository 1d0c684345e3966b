"""The curation against planted dirt, slow counters, brute-force search and a Python set."""

import contextlib
import gzip
import io
import json
import math
import os
import random
import re
import string
import subprocess
import sys
import textwrap
import tracemalloc
import zlib
from collections import Counter, defaultdict

import numpy as np
import pytest
import regex

import corpus.stages as stages
import data
from conftest import contents_of, data_config, kept_documents, manifest_of, write_jsonl
from corpus.dedup import (BloomFilter, DigestSet, digest_of, find_copies, keys_of,
                          without_copies)
from corpus.funnel import Funnel, print_table
from corpus.gopher import ngram_ratios
from corpus.rules import (CONTENT_SCORERS, PII, RULES, SENTENCES, Drop, Page, english_score,
                          numbered)
from corpus.tokenizer import PATTERN
from data import build_data
from support.files import UserError

EMAIL, PHONE, IP = (f" |||{kind}||| " for kind in ("EMAIL_ADDRESS", "PHONE_NUMBER", "IP_ADDRESS"))


# ---- Helpers -------------------------------------------------------------------------------------

def word(dice):
    return "".join(dice.choices(string.ascii_lowercase, k=6)) + dice.choice(["", "", "", "é"])


def filled(dice, pattern):
    """`pattern` with a new word for each _."""
    return re.sub("_", lambda _: word(dice), pattern)


def prose(dice, lines=3):
    """English that every rule keeps: 30 words a line, and no two n-grams alike."""
    return "\n".join(filled(dice, " ".join(["The _ and _ of _ have _ with _."] * 3))
                     for _ in range(lines))


def paragraph(dice, n):
    """A paragraph of n words as evaluation sets count them: the full stop is one."""
    return filled(dice, " ".join(["The"] + ["_"] * (n - 2)) + ".")


def program(dice):
    return filled(dice, "def _(_, _):\n    _ = _ + _\n    return _\n\n\n" * 5)


def verdict(rule, text, id="it", scorers=None, **metadata):
    return RULES[rule](Page({"id": id, "text": text, "metadata": metadata}, scorers or {}))


def drops(rule, text, **options):
    return isinstance(verdict(rule, text, **options), Drop)


def edited(rule, text, **options):
    """The text as the rule leaves it."""
    edit = verdict(rule, text, **options)
    return text if edit is None else edit.text


def texts_of(documents):
    return [(document["id"], document["text"]) for document in documents]


def write_texts(path, *texts):
    return write_jsonl(path, [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)])


def words_of(folder, path, rules, **changes):
    """The same on the command line."""
    settings = {"data_dir": folder / "built", "tokenizer": "bpe:300", "eval_share": 0, "workers": 1,
                "sources": {"s": {"path": path, "rules": rules}}} | changes
    return [f"--{key}={value}" for key, value in settings.items()]


# ---- Planted dirt --------------------------------------------------------------------------------
# A row is (text, steps, metadata): a document, and what the rules do to it. A step is (rule, the
# text that it leaves, or None if it drops the document).

def row(text, *steps, **metadata):
    return text, steps, metadata


def bad(text, rule, **metadata):
    return row(text, (rule, None), **metadata)


def web_dirt(dice):
    """A row for each kind of dirt that the rules "web c4" find in a document by itself."""
    clean, name, extra = prose(dice), word(dice).strip("é"), word(dice)
    first, rest = clean.split("\n", 1)
    opening, more = first.split(". ", 1)
    stop_words_only = " ".join(dice.choices(["to", "be", "of", "a", "in"], k=60)) + "."
    numbers = "".join(f" {n}" for n in dice.sample(range(100, 999), 30)) + "."
    return [
        bad(" \n\t", "empty"),
        bad(filled(dice, "_ " * 60 + "."), "language"),
        row(f"{clean}\n\nHome | News | {name}", ("c4_punctuation", f"{clean}\n")),
        bad(clean.replace(".", ";"), "c4_punctuation"),
        row(f"Read {name}.\n{clean}", ("c4_short_lines", clean)),
        bad("As is.\nNot now.", "c4_short_lines"),
        bad(f"{clean} It has Lorem Ipsum.", "c4_document"),
        bad(prose(dice, 1), "gopher_word_count"),
        bad(stop_words_only, "gopher_word_length"),
        bad(clean.replace("The ", "#The ") + " #a #b.", "gopher_symbols"),
        bad(clean + numbers, "gopher_alphabetic"),
        bad(filled(dice, "A _ is in _ on _ for _ as _. " * 6), "gopher_stop_words"),
        bad("- " + clean.replace("\n", "\n- "), "gopher_bullets"),
        bad(f"{first}\n{clean}", "gopher_repetition"),
        bad(prose(dice, 50) + f" {name[:2]}" * 100 + ".", "repeated_tokens"),
        row(f"{opening}. This is vile, {name}. {more}\n{rest}", ("content", clean)),
        bad(clean.replace("The", "The vile"), "content"),
        row(f"{clean}\nFor {extra}: {name}@example.org, 555-123-4567.",
            ("pii", f"{clean}\nFor {extra}: {EMAIL}, {PHONE}.")),
        row(f"{clean}\nThe {extra} is (10.0.0.1)!\nOf {name}: yes",
            ("c4_punctuation", f"{clean}\nThe {extra} is (10.0.0.1)!\n"),
            ("pii", f"{clean}\nThe {extra} is ({IP})!\n")),
        bad(clean + "".join(f" {name}{i}@a.example.com." for i in range(6)), "pii")]


def code_dirt(dice):
    code, name = program(dice), word(dice)
    return [
        bad(code, "code_extension", path="a.py/b.asm"),
        row(f"# Copyright {name}\n# All rights reserved.\n{code}", ("code_header", code)),
        row(f"/* (c)\n copyright {name} */\n{code}", ("code_header", code)),
        bad(f"// Copyright {name}\n", "code_header"),
        bad(filled(dice, "_ = " + "_ + " * 15 + "1\n") * 9, "code_mean_line"),
        bad(code * 3 + "x = '" + "abcdefgh " * 112 + "'", "code_longest_line"),
        bad(filled(dice, "_ ++ -- (*) [[]] == != <> %% && || ~~ ^^ :: ;; {{ }} // ??\n" * 5),
            "code_alphanumeric"),
        bad("\n".join(str(dice.randint(10, 999)) for _ in range(60)), "code_letters")]


def each(dirt, dice):
    """One row of every kind, no two made of the same clean text."""
    return [dirt(dice)[i] for i in range(len(dirt(dice)))]


def lines_of(rows, name):
    """({id: row}, the JSON lines of them)."""
    named = {f"{name}{i}": row for i, row in enumerate(rows)}
    return named, [json.dumps({"id": key, "text": text, "metadata": {"url": key} | metadata})
                   .encode() for key, (text, _, metadata) in named.items()]


BAD_LINES = [b'{"text": "cut', b'["a list"]', b'{"text": 5}', b'{"id": 1}', b'{"text": "\xff"}',
             b'{"text": "a", "id": [1]}', b'{"text": "a", "id": true}']


def plant_web(dice, folder, paragraphs):
    """A .jsonl, a .jsonl.gz and a .gz cut off: ({id: row}, [place of each bad line])."""
    clean = [row(prose(dice, dice.randint(2, 5)), url=f"of {i}") for i in range(40)]
    rows = clean + [dirt for _ in range(dice.randint(2, 3)) for dirt in each(web_dirt, dice)]
    rows += [row(f"{prose(dice)}\n{paragraphs[12]}"), row(f"{prose(dice)}\n{paragraphs['marks']}"),
             bad(f"{prose(dice)}\n{paragraphs[13]}", "decontaminate:paloma"),
             bad(f"{paragraphs['mail']}\n{prose(dice)}", "decontaminate:paloma")]
    dice.shuffle(rows)
    # a copy in a dropped document must not cost a later document its own paragraphs
    rows.insert(0, bad(f"{clean[20][0]}\n{paragraphs[14]}", "decontaminate:paloma"))
    for one, other in zip(clean[0:10:2], clean[1:10:2], strict=True):
        own, mixed = prose(dice), "\n".join(f"{one[0]}\n{other[0]}".split("\n")[::-1])
        for copy in (bad(prose(dice), "url", **one[2]), bad(other[0], "document"),
                     row(own + "\n" + one[0].split("\n")[0], ("paragraph", own)),
                     bad(mixed, "paragraph")):  # anywhere after what it copies
            first = max(rows.index(one), rows.index(other)) + 1
            rows.insert(dice.randint(first, len(rows)), copy)
    rows, lines = lines_of(rows, "w")
    for line in BAD_LINES:
        lines.insert(dice.randint(0, len(lines)), line)
    lines.insert(5, b" ")  # a blank line is no document
    parts = {"a/one.jsonl": lines[:70], "b.jsonl.gz": lines[70:]}
    (folder / "a").mkdir(parents=True)
    (folder / "a/one.jsonl").write_bytes(b"\n".join(lines[:70]) + b"\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[70:])))
    (folder / "c.pdf").write_bytes(b"%PDF")
    tail, lines = lines_of([row(prose(dice)) for _ in range(40)], "cut")
    cut = gzip.compress(b"\n".join(lines))[:-2000]
    (folder / "cut.jsonl.gz").write_bytes(cut)
    complete = zlib.decompressobj(wbits=31).decompress(cut).count(b"\n")
    assert 10 < complete < 40
    return rows | dict(list(tail.items())[:complete]), [
        f"{folder}/{file}:{i}: " for file, part in parts.items()
        for i, line in enumerate(part, 1) if line in BAD_LINES]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(folder, {source: ({id: row}, [place of each bad line])}, output) of a build of all this."""
    home, dice = tmp_path_factory.mktemp("planted"), random.Random(6198)
    paragraphs = {n: paragraph(dice, n) for n in (12, 13, 14)}
    paragraphs["marks"] = "! ? " * 8 + "!"
    paragraphs["mail"] = f"{paragraph(dice, 14)} me@a.co."  # decontaminated before it is masked
    write_texts(home / "paloma.jsonl", *(f"Of:\n{text}" for text in paragraphs.values()))
    code, lines = lines_of([
        *(row(program(dice)) for _ in range(20)), *each(code_dirt, dice), *each(code_dirt, dice),
        row(f"# no right is reserved\n{program(dice)}"),
        row(f"{program(dice)}\n{paragraphs[13]}")], "c")  # code is exempt from decontamination
    (home / "code.json.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    short = filled(dice, "The " + "_ and " * 11)  # 23 words
    books = {f"{i}.txt:1": book for i, book in enumerate([
        row(prose(dice)), row(f"{short}_."), bad(f"{short}.", "min_words"), bad("", "empty"),
        bad(filled(dice, "_ " * 40), "language"),
        bad(f"{prose(dice)}\n{paragraphs[14]}", "decontaminate:paloma")])}
    (home / "books").mkdir()
    for name, book in books.items():
        (home / "books" / name[:-2]).write_text(book[0], encoding="utf-8")
    (home / "books/latin.txt").write_bytes("é".encode("latin-1"))
    text = prose(dice)
    forum, lines = lines_of([
        row(prose(dice)), row(f"{text} me@a.co", ("pii", f"{text} {EMAIL}")),
        bad(prose(dice).replace(".\n", " \u2026\n"), "gopher_ellipsis")], "f")
    (home / "forum.jsonl").write_bytes(b"\n".join(lines))
    rows = {"web": plant_web(dice, home / "web", paragraphs), "code": (code, []),
            "books": (books, [f"{home}/books/latin.txt:1: "]), "forum": (forum, [])}
    settings = dict(decontaminate={"paloma": f"{home}/paloma.jsonl"}, sources={
        "web": {"path": f"{home}/web", "rules": "web c4"},
        "code": {"path": f"{home}/code.json.gz", "rules": "code"},
        "books": {"path": f"{home}/books", "rules": "books"},
        "forum": {"path": f"{home}/forum.jsonl", "rules": "gopher pii"}},
        content_scorer="vileness")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONTENT_SCORERS, "vileness", lambda text: 0.4 if "vile" in text else 0.3)
        patch.setattr(stages, "BATCH_BYTES", 20_000)
        with pytest.raises(UserError, match=r"web/cut\.jsonl\.gz.*--allow_truncated=true"):
            build_data(data_config(home, **settings))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            folder = build_data(data_config(home, **settings, allow_truncated=True, workers=2))
    assert "cut.jsonl.gz" in printed.getvalue()
    return folder, rows, printed.getvalue()


def outcome(rows):
    """([(id, text)] of what is kept, {rule: what the funnel must count}) of {id: row}."""
    kept, by_rule = [], defaultdict(lambda: defaultdict(int))
    for name, (text, steps, _) in rows.items():
        for rule, left in steps:
            by_rule[rule]["dropped" if left is None else "edited"] += 1
            by_rule[rule]["bytes"] += len(text.encode()) - len((left or "").encode())
            text = left
        kept += [(name, text)] if text is not None else []
    return kept, by_rule


@pytest.mark.parametrize("source", ["web", "code", "books", "forum"])
def test_a_build_keeps_exactly_what_was_clean_and_counts_what_was_planted(planted, source):
    """The bytes too, which an edit may add to: masks are longer than most of what they mask."""
    folder, rows, printed = planted
    (rows, places), found = rows[source], manifest_of(folder)["sources"][source]
    kept, by_rule = outcome(rows)
    documents = kept_documents(folder, source)
    assert texts_of(documents) == kept
    for document in documents:
        steps = rows[document["id"]][1]
        assert set(document["metadata"].get("edited_by", {})) == {rule for rule, _ in steps}
    assert found["by_rule"] == by_rule
    assert found["documents in"] == len(rows) and found["documents"] == len(kept)
    assert found["bytes in"] == sum(len(row[0].encode()) for row in rows.values())
    assert found["bytes"] == sum(len(text.encode()) for _, text in kept)
    assert found.get("bad lines", 0) == len(places) == len(found["bad_lines"])
    for message, place in zip(found["bad_lines"], places, strict=True):
        assert message.startswith(place) and printed.count(message) == 1
    assert found["notes"] == ({
        "files not read: .pdf (first c.pdf); to make one that is read: pdftotext OLD NEW.txt": 1,
        "files cut off": 1} if source == "web" else {})


def test_the_table_shows_every_counter_and_every_rule_was_planted(planted, capsys):
    folder, rows, _ = planted
    print_table(folder)
    table = {line[2:32].strip(): line[32:].split() for line in capsys.readouterr().out.splitlines()}
    kept, by_rule = zip(*(outcome(planted) for planted, _ in rows.values()), strict=True)
    assert table[""] == list(rows)
    assert table["documents in"] == [str(len(planted)) for planted, _ in rows.values()]
    assert table["bad lines left out"] == [str(len(places) or "-") for _, places in rows.values()]
    assert table["documents kept"] == [str(len(documents)) for documents in kept]
    shown = {key: cells for key, cells in table.items() if key.endswith((" dropped", " edited"))}
    assert shown == {f"{rule} {what}": [str(one.get(rule, {}).get(what, "-")) for one in by_rule]
                     for rules in by_rule for rule in rules for what in rules[rule]
                     if what != "bytes"}
    assert {*RULES, "url", "document", "paragraph", "decontaminate:paloma"} == set().union(*by_rule)


# ---- Gopher and repetition -----------------------------------------------------------------------

LIMITS = {2: 0.20, 3: 0.18, 4: 0.16, 5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def slow_ratios(words):
    """(n, ratio) for each n with an n-gram that occurs twice."""
    for n in LIMITS:
        grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
        times = Counter(grams)
        if max(times.values(), default=1) > 1:
            top = max(grams, key=times.get)  # the first of the most frequent
            again = sum(sum(map(len, gram)) for gram in grams if times[gram] > 1)
            everything = sum(sum(map(len, gram)) for gram in grams)
            yield n, (times[top] * sum(map(len, top)) / sum(map(len, words)) if n < 5 else
                      again / everything)


def slow_repetition(text):
    """Which measure drops the text: "lines", "characters", an n, or None."""
    words, lines = text.split(), [line for line in text.split("\n") if line.strip()]
    again = [line for line in lines if lines.count(line) > 1]
    if len(again) / len(lines) > 0.3:
        return "lines"
    if sum(map(len, again)) / sum(map(len, words)) > 0.3:
        return "characters"
    return next((n for n, part in slow_ratios(words) if part > LIMITS[n]), None)


def repetition(text):
    """The same by the rule, read from its reason."""
    drop = verdict("gopher_repetition", text)
    found = drop and re.search(r"\d+(?=-gram)|characters(?= in repeated)|lines", drop.why)[0]
    return int(found) if found and found.isdigit() else found


def with_phrase(n, times, size, stretch=lambda: 0):
    """`size` words of 4 letters in which a phrase of n words, perhaps longer ones, comes again."""
    words = [f"u{i:03d}" for i in range(size)]
    phrase = [f"p{i:03d}" + "x" * stretch() for i in range(n)]
    for i in range(times):
        words[i * (n + 8):i * (n + 8) + n] = phrase
    return " ".join(words)


def test_repetition_is_judged_as_by_a_slow_counter():
    dice, seen = random.Random(2), set()
    for i in range(300):
        n, times = (19, 2) if i % 3 else (dice.randint(2, 5), dice.randint(2, 12))
        text = with_phrase(n, times, dice.randint(198, 215) if i % 3 else
                           times * (n + 8) + dice.randint(0, 40),
                           lambda i=i: dice.randint(0, 0 if i % 3 else 6))
        if i % 7 == 0:
            lines = [filled(dice, "_ " * dice.randint(1, 12)) for _ in range(12)]
            text = "\n".join(lines + dice.choices(lines, k=dice.randint(0, 3)))
        seen.add(slow_repetition(text))
        assert repetition(text) == slow_repetition(text), text
    assert seen == {"lines", "characters", None, *LIMITS}


def test_the_ratios_of_all_ngrams_are_those_of_a_slow_counter():
    dice = random.Random(12)
    for _ in range(300):
        kinds = [word(dice) for _ in range(dice.randint(1, 30))]
        words = dice.choices(kinds, k=dice.randint(0, 40))
        page = Page({"text": " ".join(words)}, {})
        found = list(ngram_ratios(page.word_ids, page.word_lengths))
        assert {n: part for n, part, _ in found} == dict(slow_ratios(words))
        for n, _, first in found:
            grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
            times = Counter(grams)
            assert grams.index(max(grams, key=times.get)) == first


@pytest.mark.parametrize("text, dropped_by", [
    # n x times of 50 words are the limit; those of n from 5 are among the texts above
    *((with_phrase(n, times, size), dropped_by) for n, times, size, dropped_by in [
        (2, 5, 50, None), (2, 5, 49, 2), (3, 3, 50, None), (3, 3, 49, 3), (4, 2, 50, None),
        (4, 2, 49, 4)]),
    *((lines.replace(" ", "\n"), dropped_by) for lines, dropped_by in [
        ("zz u1 u2 u3 zz u5 zz u7 u8 u9", None), ("zz u1 u2 u3 zz u5 zz u7 u8 zz", "lines"),
        ("zz  u1  u2  zz  u3 u4 u5", None),  # blank lines do not count
        ("zzz u1 u2 zzz u3 u4 u5 u6", "characters")])])
def test_repetition_at_its_limits_is_kept(text, dropped_by):
    assert repetition(text) == dropped_by


def slow_gopher(text):
    """{rule: whether it drops the text} by Dolma's table of measures, repetition aside."""
    words, lines = text.split(), [line for line in text.split("\n") if line.strip()]
    n, ordered = len(words), sorted(len(w) for w in words)
    stops = sum(words.count(w) for w in ("the", "be", "to", "of", "and", "that", "have", "with"))
    return {
        "word_count": n < 50 or n > 100_000,
        "word_length": not 3 <= (ordered[(n - 1) // 2] + ordered[n // 2]) / 2 <= 10,
        "symbols": len([w for w in words if "#" in w or "\u2026" in w]) / n > 0.1,
        "alphabetic": len([w for w in words if w.lower() != w.upper()]) / n < 0.8,
        "stop_words": stops < 2,
        "bullets": len([line for line in lines if line[0] in "*-"]) / len(lines) > 0.9,
        "ellipsis": len([line for line in lines if line[-1] == "\u2026"]) / len(lines) > 0.3}


def test_gopher_rules_judge_as_the_table_of_their_measures():
    dice, seen = random.Random(3), defaultdict(set)
    for _ in range(300):
        length, lines = dice.choice([2, 3, 10, 11]), []
        symbol, number, bullet, dots = dice.choices([0, 0.1, 0.2, 0.3, 0.9, 1], k=4)
        for _ in range(10):
            words = ["#" + word(dice) if dice.random() < symbol else
                     str(dice.randint(10, 9999)) if dice.random() < number / 2 else
                     word(dice).ljust(12, "x")[:dice.choice([length, length, 5])]
                     for _ in range(dice.randint(4, 6))]
            lines.append("- " * (dice.random() < bullet) + " ".join(words)
                         + " \u2026" * (dice.random() < dots))
        text = "\n".join(lines + dice.choices(["the end", "The be", "of it", "so", ""], k=2))
        for rule, dropped in slow_gopher(text).items():
            seen[rule].add(dropped)
            assert drops(f"gopher_{rule}", text) == dropped, (rule, text)
    assert len(seen) == 7 and all(both == {False, True} for both in seen.values())


def test_repeated_tokens_are_found_as_by_a_slow_scan():
    dice, seen = random.Random(4), []
    for _ in range(120):
        pattern = dice.choices([" a", " b", " c"], k=dice.randint(1, 14))
        before, after = (dice.choices([" a", " b"], k=dice.randint(0, 40)) for _ in range(2))
        run = (pattern * 101)[:dice.randint(98 * len(pattern), 101 * len(pattern))]
        tokens = before + run + after
        seen.append(any(tokens[i:i + 100 * n] == tokens[i:i + n] * 100 for n in range(1, 14)
                        for i in range(len(tokens) - 100 * n + 1)))
        assert drops("repeated_tokens", "".join(tokens)) == seen[-1]
    assert 30 < sum(seen) < 90
    for period in range(1, 15):
        pattern = "".join(f" {chr(97 + i)}" for i in range(period))
        assert not drops("repeated_tokens", f" z{pattern * 99} y z")
        assert drops("repeated_tokens", f" z{pattern * 100} y z") == (period < 14)


def test_repeated_tokens_of_any_kind_are_found_though_words_are_looked_at_first():
    """Patterns within a word, of spaces, and with marks that end words but no tokens."""
    dice, seen = random.Random(9), Counter()
    for i in range(400):
        kind = dice.choice(["a1!", "ab \x1c!", "  \n", "a b.", "é, \t"])
        unit = "".join(dice.choices(kind, k=dice.randint(1, 5)))
        text = dice.choice(["", "it "]) + unit * dice.choice([98, 99, 100, 101]) + " end" * (i % 2)
        ids = numbered(regex.findall(PATTERN, text))[0].tolist()
        found = any(ids[i:i + 99 * n] == ids[i + n:i + 100 * n] for n in range(1, 14)
                    for i in range(len(ids) - 100 * n + 1))
        seen[kind, found] += 1
        assert drops("repeated_tokens", text) == found, unit
    # two tokens and 15 words, which end where no token does
    assert drops("repeated_tokens", ("a" + "!\x1c" * 14 + "! ") * 101)
    assert len(seen) == 10 and min(seen.values()) > 3


# ---- Limits, cuts and masks ----------------------------------------------------------------------

AT_THE_LIMIT = [  # (rule, a text that it keeps, one just beyond that it drops)
    ("gopher_word_count", "a " * 50, "a " * 49),
    ("gopher_word_count", "a " * 100_000, "a " * 100_001),
    # a median of 3: the middle of an even number of words
    ("gopher_word_length", "aa " * 5 + "aaaa " * 5, "aa " * 5 + "aaa " * 5),
    ("gopher_word_length", ("a" * 10 + " ") * 2 + "a" * 99, "a" * 10 + " " + "a" * 11),
    ("gopher_symbols", "# a…b " * 2 + "# " + "a " * 45, "# a…b " * 3 + "a " * 45),
    ("gopher_alphabetic", "a1 " * 30 + "é " * 10 + "12 " * 10, "a1 " * 30 + "é " * 9 + "12 " * 10),
    ("gopher_stop_words", "the the", "the cat"), ("gopher_stop_words", "of to", "The The of."),
    ("gopher_bullets", "- a\n" * 9 + "\n\na", "- a\n" * 9 + "* b"),
    ("gopher_ellipsis", "a\u2026\n" * 3 + "b...\n" * 7, "a\u2026\n" * 4 + "b\n" * 9),
    ("empty", ".", "\u2003\n\t "), ("c4_document", "lorem  ipsum java script ( [", "LOREM IPSUM"),
    ("c4_document", "java", "Get javaScripts"), ("c4_document", "x }", "x {"),
    ("code_mean_line", "\n".join(["x" * 100] * 9), "\n".join(["x" * 100] * 8 + ["x" * 101])),
    ("code_longest_line", "x\n" * 20 + "x" * 1000, "x\n" * 20 + "x" * 1001),
    ("code_alphanumeric", "a1" + "-" * 6, "a1" + "-" * 7), ("code_letters", "aaa", "aaa +"),
    ("min_words", "a " * 24 + ".", "a-b " * 8), ("min_words", "我" * 25, "can't 3.14 " * 12),
    ("language", "the naïve", "the наивный"),
    ("language", "x y z q v w u s r the", "x y z q v w u s r t the"),
    ("language", "12 the", "12 34 56")]


def test_a_value_at_the_limit_is_kept_and_the_next_is_dropped():
    scorers = {"language": english_score}
    for rule, kept, dropped in AT_THE_LIMIT:
        assert not drops(rule, kept, scorers=scorers), (rule, kept)
        assert drops(rule, dropped, scorers=scorers), (rule, dropped)


@pytest.mark.parametrize("rule, text, left", [
    # as the toolkit's tagger and mixer leave them: a line with its newline, blank lines too
    ("c4_punctuation", 'One.\nTwo\nThree?\nFour!\nHe: "5"\nSix:', 'One.\nThree?\nFour!\nHe: "5"\n'),
    ("c4_punctuation", "  One.  \n\n \nTwo\u2026", "  One.  \n"),
    ("c4_short_lines", "a b c\na b.\n\n a  b \tc \na-b-c", "a b c\n a  b \tc \n"),
    ("code_header", "#!/bin/sh\n# COPYRIGHT me\n\n# more\nx = 1\n# tail\n", "x = 1\n# tail\n"),
    ("code_header", "/* Copyright */ x = 1", "/* Copyright */ x = 1"),
    ("code_header", "x = 1\n# Copyright", "x = 1\n# Copyright"),
    ("code_header", "-- copyright\n; and\n% so on\nx", "x"),
    ("code_header", "/* Copyright */ \r\nint f();\n/* end */\n", "int f();\n/* end */\n"),
    *(("code_header", f"// Copyright\n{line}\nx", f"{line}\nx") for line in (
        "#include <a>", "#define A", "#import <a>", "#undef A", "#![no_std]", "#[derive(A)]"))])
def test_rules_that_cut_leave_this(rule, text, left):
    assert edited(rule, text) == edited(rule, left) == left


@pytest.mark.parametrize("name, metadata, dropped", [
    ("a/b.csv", {}, True), ("a/b.py", {}, False), ("a.csv", {"path": "a.py"}, False),
    ("a.py", {"path": "a.SVG"}, True), ("a.csv", {"ext": "py"}, False), ("json", {}, False),
    ("a.py", {"ext": ".Asm"}, True), ("a.py", {"path": "a.jsonl"}, False)])
def test_files_of_data_are_told_by_their_extension(name, metadata, dropped):
    assert drops("code_extension", "x", id=name, **metadata) == dropped


def test_scores_are_compared_with_dolmas_limits():
    for score, dropped in ((0.5, False), (0.4999, True)):
        assert drops("language", "x", scorers={"language": lambda _, s=score: s}) == dropped
    scores = {"Good one.": 0.1, "Bad!?": 0.4, "Fine 3.5 too.": 0.3999, "Worse.": 1.0,
              "No stop here": 0, "End.": 0, "": 0}  # a KeyError: another sentence was scored
    scorers = {"content": scores.__getitem__}
    for text, lines in (
            ("Good one. Bad!? Fine 3.5 too.\nWorse.\n\nNo stop here\nEnd.",
             ["Good one. Fine 3.5 too.", "No stop here", "End."]),
            ("Good one. Bad!?\nNo stop here\nEnd.", ["Good one.", "No stop here", "End."])):
        left = edited("content", text, scorers=scorers).split("\n")  # no two lines become one
        assert [line.strip() for line in left if line.strip()] == lines
    assert edited("content", text, scorers={"content": None}) == text


def test_a_sentence_ends_at_a_mark_before_a_space_and_around_a_newline():
    dice, ends = random.Random(10), re.compile(r"(?<=[.!?])(?=\s)|(?=\n)|(?<=\n)")
    for _ in range(2000):
        text = "".join(dice.choices("ab.!? \n\u2028\x1c", k=dice.randint(0, 12)))
        assert SENTENCES.findall(text) == [part for part in ends.split(text) if part]


def test_c4_document_is_not_fooled_by_letters_of_other_scripts():
    wanted = regex.compile(r"(?i)\{|lorem ipsum|javascript")
    for text in ("java\u017fcript", "LOREM \u0130PSUM", "lorem ip\u017fum", "l\u014drem ipsum",
                 "JAVASCR\u0131PT", "\u0130 javaScript", "lorem", "\u212a {"):
        assert drops("c4_document", text) == bool(wanted.search(text)), text


FOUND = [("ann.b+c@mail.example.org", EMAIL), ("x_y-z@a.co", EMAIL), ("192.168.0.1", IP),
         ("255.255.255.255", IP), ("555-123-4567", PHONE), ("(555) 123-4567", PHONE),
         ("5551234567", PHONE), ("555.123.4567", PHONE), ("192.168.001.010", IP),
         ("josé@müller.de", EMAIL),
         ("почта@почта.рф", EMAIL)]
NOT_FOUND = ["10.20.30.4567", "1.2.3.4.5", "256.1.1.1", "v1.2.3.4", "55512345678", "1-555-123-4567",
             "555-123-456", "555-123-4567x", "a@b", "@user.name", "user@", "1.2.3", "a@.b", "12345",
             "555-123-4567-8901"]


@pytest.mark.parametrize("thing, mask", FOUND + [(thing, thing) for thing in NOT_FOUND])
def test_personal_information_is_masked_and_nothing_around_it(thing, mask):
    around = [("", ""), ("At ", ""), ("", " so"), ("At ", "."), ("At ", ", so"), ("a\n", "\nb"),
              ("a\t", "!?"), ("At ", ").")]
    around += [("(", ")"), ("<", ">"), ("mail:", "/"), ('"', '"')] if mask != PHONE else []
    for before, after in around:
        assert edited("pii", before + thing + after) == before + mask + after


def test_what_is_searched_for_first_is_in_every_match():
    """A quick search decides whether the pattern is searched for at all."""
    dice, seen = random.Random(11), Counter()
    for _ in range(20_000):
        text = "".join(dice.choices(dice.choice(["a@.-", "12(). -", "012."]), k=30))
        for mask, (hint, pattern) in PII.items():
            seen[mask] += bool(pattern.search(text))
            assert hint.search(text) or not pattern.search(text), text
    assert len(seen) == 3 and min(seen.values()) > 20


def test_masking_equals_replacing_the_spans_from_right_to_left_and_is_idempotent():
    dice = random.Random(5)
    for _ in range(300):
        text, spans = "", []
        for _ in range(dice.randint(1, 5)):
            text += word(dice) + dice.choice([" ", "\n", ": ", " - "])
            thing, mask = dice.choice(FOUND + [(decoy, None) for decoy in NOT_FOUND])
            spans += [(len(text), len(text) + len(thing), mask)] if mask else []
            text += thing + dice.choice([" ", ", ", "; ", "! "])
        masked = text
        for start, end, mask in reversed(spans):
            masked = masked[:start] + mask + masked[end:]
        assert edited("pii", text) == edited("pii", masked) == masked
    assert edited("pii", "10.0.0.1(555) 123-4567") == f"{IP}{PHONE}"  # a mask sets a number free
    things, masks = zip(*FOUND, strict=True)
    assert edited("pii", " and ".join(things[1:6])) == " and ".join(masks[1:6])
    assert drops("pii", " and ".join(things[:6]))


# ---- Deduplication and decontamination -----------------------------------------------------------

@pytest.mark.parametrize("rate", [0.1, 0.01])
def test_bloom_filter_forgets_nothing_and_is_wrong_at_the_rate_of_the_formula(rate):
    dice, n, probes, wrong, seen = random.Random(6), 5000, 20_000, 0, set()
    bits, bloom = -n * math.log(rate) / math.log(2) ** 2, BloomFilter(n, rate)
    assert bits <= bloom.bits < bits + 1 and bloom.hashes == round(bits / n * math.log(2))
    while len(seen) < n:
        item = str(dice.randint(0, 2 * n))
        assert bloom.add_all([digest_of(item)]) == [True] or item not in seen
        seen.add(item)
    assert all(bloom.add_all(list(map(digest_of, seen))))
    full, m, k = bytes(bloom.table), bloom.bits, bloom.hashes
    for i in range(probes):
        wrong += bloom.add_all([digest_of(f"new {i}")])[0]
        bloom.table[:] = full
    expected = (1 - (1 - 1 / m) ** (k * n)) ** k
    assert expected == pytest.approx(rate, rel=0.05)
    assert abs(wrong / probes - expected) < 3 * math.sqrt(expected * (1 - expected) / probes)


@pytest.mark.parametrize("items, rate", [(20, 0.3), (200, 1e-6), (2000, 1e-300)])
def test_a_bloom_filter_takes_many_items_as_it_takes_one_after_another(items, rate):
    """The witness sets a bit at a time, by whole numbers of any size."""
    dice, bloom, seen, count = random.Random(items), BloomFilter(items, rate), set(), 0
    for _ in range(20):
        digests = [digest_of(str(dice.randint(0, items))) for _ in range(dice.choice([0, 1, 40]))]
        expected = []
        for digest in digests:
            first, step = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big") | 1
            bits = {(first + i * step) % bloom.bits for i in range(bloom.hashes)}
            expected.append(bits <= seen)
            seen |= bits
        assert bloom.add_all(digests) == expected
        count += expected.count(False)
    table = np.unpackbits(np.frombuffer(bloom.table, np.uint8), bitorder="little")
    assert seen == set(table.nonzero()[0].tolist()) and bloom.count == count


def test_many_items_are_added_in_little_memory_and_with_the_same_answers(monkeypatch):
    """As the lines of one long document; all at once they took 1.8 kB each."""
    digests = [digest_of(str(i % 50_000)) for i in range(60_000)]
    bloom, whole = BloomFilter(60_000, 1e-6), BloomFilter(60_000, 1e-6)
    tracemalloc.start()
    answers = bloom.add_all(digests)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 30e6
    monkeypatch.setattr("corpus.dedup.BLOOM_CHUNK", 60_000)
    assert whole.add_all(digests) == answers == [False] * 50_000 + [True] * 10_000
    assert whole.table == bloom.table and whole.count == bloom.count == 50_000


def slow_deduplicate(documents, levels):
    """[(id, text)] of what is kept, level by level, each compared with all that came before."""
    for level, key in (("url", lambda d: d["metadata"]["url"] or d["id"]),
                       ("document", lambda d: d["text"])):
        if level in levels:
            documents = [d for i, d in enumerate(documents)
                         if all(key(e) != key(d) for e in documents[:i])]
    before, left = [], []
    for name, text in texts_of(documents):
        own = []
        for line in text.split("\n"):
            own += [line] if not line.strip() or line not in before else []
            before += [line] if "paragraph" in levels else []
        if "".join(own).strip() or "\n".join(own) == text:
            left.append((name, "\n".join(own)))
    return left


def deduplicated(documents, levels, make, funnel):
    """The documents that are left, deduplicated in batches of 15 as in a build."""
    left, seen = [], {level: make() for level in levels}
    for begin in range(0, len(documents), 15):
        batch = documents[begin:begin + 15]
        left += without_copies(batch, find_copies(keys_of(batch, levels), seen), funnel)
    return left


@pytest.mark.parametrize("levels", ["url", "document", "paragraph", "url document paragraph"])
def test_deduplication_keeps_what_a_quadratic_search_keeps(levels):
    dice, levels = random.Random(levels), levels.split()
    for _ in range(20):
        lines = ["", " ", *(word(dice) for _ in range(dice.choice([5, 40])))]
        documents = [{"id": f"d{i}", "text": "\n".join(dice.choices(lines, k=dice.randint(1, 4))),
                      "source": "s", "metadata": {"provenance": f"f:{i}", "url": dice.choice(
                          [None, "", *range(1, 60)])}} for i in range(40)]
        for make in (DigestSet, lambda: BloomFilter(500, 1e-12)):
            funnel = Funnel()
            left = deduplicated(documents, levels, make, funnel)
            assert texts_of(left) == slow_deduplicate(documents, levels)
            assert sum(n["dropped"] for n in funnel.rules.values()) == 40 - len(left)
            assert deduplicated(left, levels, make, funnel) == left


def test_no_document_with_an_evaluation_paragraph_is_kept_whatever_file_held_it(tmp_path):
    dice = random.Random(7)
    plain, paper, bare, context, short = (paragraph(dice, n) for n in (13, 14, 15, 6, 12))
    continuation = " so" + filled(dice, " _" * 6)  # 13 words with the context's last line
    (tmp_path / "plain.txt").write_text(f"Title\n  {plain}\t\n{short}\n")
    write_texts(tmp_path / "papers.jsonl", f"{paper}\n\n{'- ' * 20}")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/requests.jsonl").write_text(json.dumps({"doc_id": 0, "request": {
        "context": f"Say this:\n{context}", "continuation": continuation},
        "doc": {"id": 7, "choices": [{"text": f"A word.\n{bare}"}]}}))
    hits = [plain, f"\t{plain} \r", paper, paper, context + continuation, bare]
    misses = [short, "- " * 20, context, continuation, plain.lower(), f"{plain} not", "Title"]
    texts = [f"{prose(dice)}\n{line}\n{prose(dice)}" for line in hits + misses]
    sets = {"plain": "plain.txt", "papers": "papers.jsonl", "tasks": "tasks"}
    folder = build_data(data_config(
        tmp_path, sources={"s": write_texts(tmp_path / "s.jsonl", *texts)},
        decontaminate={name: f"{tmp_path}/{file}" for name, file in sets.items()}))
    kept = [document["text"] for document in kept_documents(folder, "s")]
    assert kept == texts[len(hits):]
    by_rule = manifest_of(folder)["sources"]["s"]["by_rule"]
    assert {rule: counts["dropped"] for rule, counts in by_rule.items()} == {
        "decontaminate:plain": 2, "decontaminate:papers": 2, "decontaminate:tasks": 2}


# ---- Builds and the command line -----------------------------------------------------------------

SMALL_PARTS = ("import sys, corpus.stages, corpus.storage, data; "
               "corpus.stages.BATCH_BYTES = corpus.storage.BLOCK_BYTES = 4000")


def test_builds_of_any_number_of_workers_are_byte_for_byte_the_same(tmp_path, monkeypatch):
    """One without hard links, and one in a process where sets of strings have another order."""
    dice = random.Random(8)
    texts = [text for _ in range(4) for text, _, _ in each(web_dirt, dice)]
    dice.shuffle(texts)
    path = write_texts(tmp_path / "s.jsonl", *texts, *dice.sample(texts, 9))
    monkeypatch.setattr(stages, "BATCH_BYTES", 4000)
    monkeypatch.setattr("corpus.storage.BLOCK_BYTES", 4000)
    builds = []
    for workers in (1, 2, 4):
        with monkeypatch.context() as patch:
            if workers == 2:
                patch.setattr(os, "link", lambda *paths: open("no/such/place"))
            builds.append(build_data(data_config(
                tmp_path, data_dir=f"{tmp_path}/{workers}", workers=workers, eval_share=0.2,
                sources={"s": {"path": path, "rules": "web"}})))
    code = f"{SMALL_PARTS}; data.main(sys.argv[1:])"
    words = words_of(tmp_path, path, "web", workers=0, eval_share=0.2)
    subprocess.run([sys.executable, "-c", code, *words], cwd=stages.ROOT, check=True,
                   capture_output=True, env={**os.environ, "PYTHONHASHSEED": "1"})
    builds.append(tmp_path / "built" / builds[0].name)
    first, *others = map(contents_of, builds)
    assert others == [first] * 3
    assert len(first["s.blocks"]) > 16 * 3
    assert sorted(first) == [
        "documents/s-00000.jsonl.gz", "dropped/s.jsonl", "held_out/s.jsonl", "manifest.json",
        "s-00000.bin", "s-00000.index", "s.blocks", "s.funnel.json", "s.shards.json",
        "tokenizer.json"]
    assert [(folder / "s.blocks").stat().st_nlink for folder in builds] == [2, 1, 2, 2]


def test_show_prints_what_a_rule_dropped_or_edited_marked_and_why(tmp_path, call, refused):
    path = write_texts(tmp_path / "s.jsonl", "It has lorem ipsum.", "Write to a@b.co.",
                       "As it was.\nHead:", "As it was.\nAnd so on.", prose(random.Random(1), 9))
    words = words_of(tmp_path, path, "c4 pii paragraph")
    for rule, parts in {
            "c4_document": ["dropped by c4_document: ", "d0 (s.jsonl:1)",
                            "It has >>>lorem ipsum<<<."],
            "pii": ["edited by pii: ", "d1 (s.jsonl:2)", "to >>>a@b.co<<<."],
            "paragraph": ["d3 (s.jsonl:4)", "| >>>As it was.<<<\n    | And so on."]}.items():
        printed = call(data, *words, f"--show={rule}").stdout
        assert printed.count(" (s.jsonl:") == 1
        for part in parts:
            assert part in printed
    refused(call(data, *words, "--show=c4_dokument"), "--show=c4_dokument", "c4_document, ")
    refused(call(data, *words, "--show=code_header"), "no source has this rule (s has c4_punct")
    words = words_of(tmp_path, path, "")
    refused(call(data, *words, "--show=pii"), "(s has no rules)",
            '"s": {"path": ..., "rules": "pii"')
    refused(call(data, *words, "--show=empty"), "dropped and edited nothing")


def test_stand_ins_and_the_memory_of_bloom_filters_are_announced(tmp_path, call):
    path = write_texts(tmp_path / "s.jsonl", *(prose(random.Random(i)) for i in range(20)))
    words = words_of(tmp_path, path, "web")
    printed = call(data, *words).stdout
    assert "language_scorer" in printed and "content_scorer" in printed
    assert "Bloom" not in printed
    printed = call(data, *words, "--bloom_items=2_000_000").stdout
    assert re.search("Bloom filters .* 7.2 MB", printed) and "bloom_items" not in printed
    done = call(data, *words, "--bloom_items=10", "--bloom_fp_rate=1e-9")
    assert done.stdout.index("Bloom filters") < done.stdout.index("documents in")
    assert re.search("document .*20 items.*bloom_items", done.stderr)


@pytest.mark.parametrize("entry, words", [
    ({"rules": "gohper"}, ["'gohper'", "gopher?"]),
    ({"rules": "web c4_documents"}, ["'c4_documents'", "c4_document?"]),
    ({"rules": "paragraf"}, ["'paragraf'", "paragraph?"]),
    ({"rule": "web"}, ["'rule'", "path, rules"]),
    *(({"weight": weight}, ["weight", weight]) for weight in (0, True, "1", 1e9))])
def test_mistake_in_a_source_is_refused_before_anything_is_built(tmp_path, call, refused, entry,
                                                                 words):
    entry = {"path": write_texts(tmp_path / "s.jsonl", "a")} | entry
    refused(call(data, *words_of(tmp_path, "", "", sources={"s": entry})), "sources: s: ", *words)
    assert not (tmp_path / "built").exists()


def test_rules_that_take_out_half_of_a_source_are_named_above_its_table(tmp_path, call):
    """Hard-wrapped lines do not end as sentences do, so the rules of the web take them out."""
    good = [prose(random.Random(i)) for i in range(20)]
    wrapped = [textwrap.fill(text.replace("\n", " "), 40) for text in good]
    sources = {name: {"path": write_texts(tmp_path / f"{name}.jsonl", *texts), "rules": "c4"}
               for name, texts in (("good", good), ("wrapped", wrapped))}
    words = words_of(tmp_path, "", "", sources=sources)
    lines = call(data, *words).stdout.splitlines()
    [warning] = [line for line in lines if line.startswith("warning: ")]
    table = next(i for i, line in enumerate(lines) if line.startswith("data: "))
    assert warning.startswith("warning: wrapped: rules took out ") and "good" not in warning
    assert lines.index(warning) < table
    show = re.search(r"--show=\w+", warning)[0]
    shown = call(data, *words, show)
    assert shown.returncode == 0 and "wrapped.jsonl:1" in shown.stdout
