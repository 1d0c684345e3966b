"""The batch of a step as an HTML page: its documents in alternating colours, token by token."""

import codecs
import itertools
from collections import Counter
from pathlib import Path

from support.files import UserError, replace_file
from support.page import escaped, page, shares
from support.text import counted


MOST_TOKENS = 250_000  # of a page: a browser is slow with more; OLMo-7B's batch has 4 million

STYLE = """.doc{display:grid;grid-template-columns:17rem 1fr;gap:0 1rem;padding:.35rem .7rem;
border-left:4px solid #2f6fab;background:#eaf2fb;border-top:2px dashed #2f6fab}
.doc.b{border-color:#b0681b;background:#fdf3e6}.doc.begins{border-top-style:solid}
.about{font-size:.8rem;color:#57606a}.about b{color:#1b1f24}.text{white-space:pre-wrap;
font:13px/1.55 ui-monospace,monospace;min-width:0;padding-bottom:.3rem}
.text span:nth-child(even){background:#0001}
.text i::before{content:"\\21b5";color:#8c959f}.text .eos{background:#1b1f24!important;color:#fff;
border-radius:3px;padding:0 .2rem}@media(max-width:600px){.doc{grid-template-columns:1fr}
.about{margin-bottom:.4rem}}"""


def write_batch_page(file, heading, data, spans):
    """Write the page to `file`; data: the RunData of the run, spans: those of RunData.trace."""
    file = Path(file)
    if file.suffix != ".html" or not file.parent.is_dir():
        raise UserError(f"--html={file}: name a file that ends in .html, in a folder that is there")
    most = max(1, MOST_TOKENS // data.shards.seq_len)
    sequences = [list(group) for _, group in itertools.groupby(spans, lambda span: span.sequence)]
    shown = sequences[:most]
    parts = [batch_summary(heading, sequences)]
    if len(shown) < len(sequences):
        parts.append(f"<p class=note>The page shows the first {len(shown):,} sequences of "
                     f"{len(sequences):,}; --rank and --world_size choose others.</p>")
    for sequence in shown:
        parts.append(f"<h2>sequence {sequence[0].sequence}, instance {sequence[0].instance}</h2>")
        for number, span in enumerate(sequence):
            parts.append(document_part(data, span, number))
    content = page(f"{data.run.resolve().name}: {heading}", parts, STYLE)
    # "replace": an id may be no text, such as half a surrogate pair
    replace_file(file, content.encode("utf-8", "replace"))
    print(f"wrote {file}")


def batch_summary(heading, sequences):
    """How to read the page, and the tokens that each source has in the batch."""
    tokens = Counter()
    documents = 0
    for span in itertools.chain(*sequences):
        begin, end = span.tokens
        tokens[span.document["source"] or "token files"] += end - begin
        documents += 1
    return (f"<p>{counted(len(sequences), 'sequence')}, {counted(documents, 'part')} of documents. "
            "The colour changes where the document changes. A solid upper border is the beginning "
            "of a document; under a dashed one, a document goes on whose beginning is in another "
            "sequence. Neighbouring tokens differ in shade. ↵ is a newline. <span class=text><span "
            "class=eos>&lt;|endoftext|&gt;</span></span> ends a document.</p>"
            + shares(dict(tokens.most_common()), "tokens"))


def document_part(data, span, number):
    """A document's part of a sequence: what and where it is, beside its tokens."""
    begin, end = span.tokens
    first, stop = span.document_tokens
    ids = data.shards[span.instance][begin:end].tolist()
    document = span.document
    about = [f"<b>{escaped(document['id'])}</b>",
             escaped(f"{document['source']} {document['metadata']['provenance']}"),
             f"tokens {begin}–{end - 1} of the sequence",
             f"tokens {first}–{stop - 1} of the document"]
    for rule, cuts in document["metadata"].get("edited_by", {}).items():
        about.append(escaped(f"{rule} cut {cuts}"))
    if ids[-1] != data.tokenizer.eos_token_id:
        about.append("cut here by the end of the sequence")
    classes = "doc" + " b" * (number % 2) + " begins" * (first == 0)
    return (f"<div class='{classes}'><div class=about>{'<br>'.join(about)}</div>"
            f"<div class=text>{token_spans(ids, data.tokenizer)}</div></div>")


def token_spans(ids, tokenizer):
    """The tokens as HTML, a span each. A character of several tokens is in the span of its last."""
    # a token may end within a character: the decoder keeps those bytes until the next token
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    lines = []
    for position, token in enumerate(ids):
        is_last = position == len(ids) - 1
        text = decoder.decode(tokenizer.token_bytes[token], final=is_last)
        if text:
            kind = " class=eos" * (token == tokenizer.eos_token_id)
            shown = escaped(text).replace("\n", "<i></i>\n")
            lines.append(f"<span{kind}>{shown}</span>")
    return "".join(lines)
