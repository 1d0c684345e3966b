"""What `data.py trace` and `data.py find` print: a step's documents, and a document's steps.

data: the RunData of the run, see corpus/trace.py.
"""

import itertools
import json

from corpus.storage import held_out_files
from support.text import counted


def print_trace(heading, data, spans, chars):
    """Print the documents in a step, sequence by sequence."""
    print(heading)
    for sequence, parts in itertools.groupby(spans, key=lambda span: span.sequence):
        parts = list(parts)
        print(f"\nsequence {sequence}, instance {parts[0].instance}")
        for span in parts:
            print_span(data, span, chars)


def print_span(data, span, chars):
    """Print where a span is, first to last token counted from 0, and its text."""
    begin, end = span.tokens
    document_begin, document_end = span.document_tokens
    document = span.document
    metadata = document["metadata"]
    where = (f"{document['source']}, {metadata['provenance']}, its tokens "
             f"{document_begin}-{document_end - 1}")
    for rule, cuts in metadata.get("edited_by", {}).items():
        where += f", {rule} cut {cuts}"
    print(f"  tokens {begin}-{end - 1}: {document['id']}  ({where})")
    text = data.tokenizer.decode(data.shards[span.instance][begin:end].tolist())
    shown = text[:chars] if chars else text
    for line in shown.splitlines():
        print(f"    | {line}")
    if len(shown) < len(text):
        print(f"    ... {len(text) - len(shown):,} more characters")


def print_document(data, name):
    """Print the steps that saw the documents with an id, and whether one is held out."""
    found = list(data.find(name))
    print(f"the mix has {counted(len(found), 'document')} with the id {name}")
    print_steps(data, found)
    for source, file in held_out_files(data.folder).items():
        if any(json.loads(row)["id"] == name for row in file.open()):
            print(f"one of {source} is held out")


def print_texts(data, text, limit):
    """Print the steps that saw the first `limit` documents that hold `text`; count the others."""
    count = 0
    for document in data.search(text):
        count += 1
        if count <= limit:
            # an id may occur twice: only the document that holds the text
            found = data.find(document["id"], text)
            print_steps(data, [entry for entry in found if entry[0] == document])
    rest = f"; the first {limit} are shown" if count > limit else ""
    print(f"{counted(count, 'clean document')} with {text!r}{rest}")


def print_steps(data, found):
    """Print where each (document, instances) was seen in the run's steps so far."""
    done = data.steps_done()
    first = data.first_step
    if first > 1:
        print(f"steps 1 to {first - 1} were taken on other data, and are not searched")
    for document, instances in found:
        steps = data.steps_of(instances, done)
        print(f"{document['id']}  ({document['source']}, {document['metadata']['provenance']})")
        print(f"  in {counted(len(steps), 'sequence')} of steps {first} to {done}")
        for step, sequence, instance in steps:
            print(f"  step {step}, sequence {sequence}, instance {instance}")
