"""What `xz -9` needs for the held-out text of a run: a measure that every model should beat."""

import json
import lzma
from pathlib import Path

from corpus.trace import held_out_of
from support.files import UserError


MOST_BYTES = 8_000_000  # of a domain: xz -9 takes about a second for 2 MB


def xz_levels(found):
    """{domain: bits per byte of xz -9}, of {run: Evaluations}.

    A domain is left out if its text is not here, is larger than MOST_BYTES, or differs in its
    number of bytes from what was measured of any of the runs: the line holds for all of them.
    """
    sizes = {}  # {domain: the bytes that were measured, one number for equal texts}
    for evaluations in found.values():
        for domain, points in evaluations.sums.items():
            sizes.setdefault(domain, set()).add(points[max(points)]["bytes"])
    levels = {}
    for run, evaluations in found.items():
        try:
            files = held_out_of(Path(run))
        except (UserError, OSError, KeyError):  # a tuned run, or data that is gone
            continue
        for domain in evaluations.sums:
            size = max(sizes[domain])
            if domain in files and domain not in levels and 0 < size <= MOST_BYTES:
                lines = files[domain].read_bytes().splitlines()
                text = b"".join(json.loads(line)["text"].encode() for line in lines)
                if sizes[domain] == {len(text)}:
                    levels[domain] = 8 * len(lzma.compress(text, preset=9)) / size
    return levels
