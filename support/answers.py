"""Answers of a tuned model: to held-out prompts in training, and to a file of prompts."""

import json
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from corpus.lines import JSON_SUFFIXES, ends_in
from corpus.source_files import is_there
from corpus.tables import TABLE_SUFFIXES
from data import render_chat
from model import generate
from scaling.ranks import from_rank0
from scaling.sharding import evaluating
from support.bars import bar, noted
from support.chat_forms import PROMPTS
from support.chats import checked_request
from support.fields import require
from support.files import here, named_in_errors, to_json
from support.generation import fixed_weights
from support.memory import Half, remedied
from support.models import open_base
from support.progress import watched
from support.rows import Faults, checked_rows, listed
from support.talk import ANSWER_BATCH, answer_dtype, open_assistant, paths_and_options
from support.text import parsed_json

# the keys that `generate` adds to a row, beside how it was drawn
OF_AN_ANSWER = ("output", "ended", "error")

# How a sampled text was drawn. A file of another sampler is not continued: it would mix the two.
SAMPLER = "race of stream sha256(seed, row)"


# ---- Held-out prompts ----------------------------------------------------------------------------

def answer_prompts(model, tokenizer, prompts, max_new_tokens):
    """Returns (texts, ended): prompts with their greedy answers, and the share of them that end.

    prompts: lists of ids, which begin with EOS. All ranks answer together, with rank 0's tokens.
    """
    answers = []
    less = Half("max_new_tokens", max_new_tokens)
    with remedied("in an answer", less), evaluating(model):
        for begin in watched(range(0, len(prompts), ANSWER_BATCH), "batch of answers"):
            answers += generate(model, prompts[begin:begin + ANSWER_BATCH], max_new_tokens,
                                stop_ids=(tokenizer.eos_token_id,), sync=from_rank0)
    texts = []
    ended = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        texts.append(tokenizer.decode([*prompt[1:], *answer]))  # without the EOS it begins with
        ended += answer[-1] == tokenizer.eos_token_id
    return texts, ended / len(prompts)


# ---- A file of prompts ---------------------------------------------------------------------------

def generate_answers(argv):
    """Write a row for each row of a prompt file: that row, with `output`, and whether it ended.

    A row that OUT already has, made by the same weights and options, is not made again. A prompt
    that leaves no room for an answer has an `error` instead; the exit code is then 1.
    """
    paths, options = paths_and_options(argv)
    require(len(paths) == 3,
            f"{' '.join(['generate', *paths])}: the form is generate RUN PROMPTS.jsonl OUT.jsonl")
    require(is_there(paths[1]), f"{paths[1]}: no such file or folder{here(paths[1])}; name a file "
            "of prompts")
    is_read = not Path(paths[1]).is_file() or ends_in(paths[1], JSON_SUFFIXES + TABLE_SUFFIXES)
    require(is_read, f"{paths[1]}: the name of a file of prompts must end in .jsonl, with an "
            f"object a line, in .json or in {', '.join(TABLE_SUFFIXES)}")
    require(paths[2].endswith(".jsonl"), f"{paths[2]}: answers are written as an object a line: "
            "give OUT a name that ends in .jsonl")
    run = Path(paths[0]).as_posix()
    out = Path(paths[2])
    require(out.resolve().parent.is_dir(), f"{out}: there is no such directory; make it")
    drawn = {"generator": run, "weights": open_base(run, "size").digest, **asdict(options)}
    del drawn["answer_batch"]  # a file may be continued with another one
    dtype = answer_dtype(options)
    drawn["dtype"] = str(dtype).removeprefix("torch.")
    places, rows, requests = read_prompts(paths[1], drawn)
    if options.temperature:
        drawn["sampler"] = SAMPLER
    done = rows_done(out, rows, drawn)
    model, tokenizer = open_assistant(run, dtype)
    prompts = [render_chat(messages, tokenizer, reply=True)[0] for messages in requests]

    less = (Half("answer_batch", options.answer_batch),
            Half("max_new_tokens", options.max_new_tokens))
    with (named_in_errors(out), open(out, "a", encoding="utf-8") as file, fixed_weights(model),
          remedied("in an answer", *less),
          noted(f"stopped: {out} keeps its answers, and the same command continues")):
        for begin in bar(range(done, len(rows), options.answer_batch), "answering", unit="batches"):
            end = begin + options.answer_batch
            found = answers_of(model, tokenizer, prompts[begin:end], options, begin)
            for row, answer in zip(rows[begin:end], found, strict=True):
                row = {key: value for key, value in row.items() if key not in OF_AN_ANSWER}
                file.write(to_json({**row, **answer, **drawn}) + "\n")
            file.flush()
    fits = [len(prompt) < model.config.max_seq_len for prompt in prompts]
    too_long = len(rows) - sum(fits)
    print(f"wrote {out}: {sum(fits):,} answers, {sum(fits[:done]):,} of them were there already")
    if too_long:
        first = places[fits.index(False)]
        print(f"no room for an answer: {too_long:,} of the prompts, the first {first}; shorten "
              "them (their rows have an error and no output)")
    return 1 if too_long else 0


def read_prompts(path, drawn):
    """Returns (places, rows, requests) of a prompt file; a request is a list of messages.

    UserError sums up the rows that are no prompt, and those that ask to be drawn differently.
    """
    def check(row, place):
        messages = checked_request(row, place)
        for key in ("temperature", "top_p", "max_new_tokens", "sample_seed"):
            require(row.get(key) in (None, drawn[key]), f"{place}: {key}: {row.get(key)}, and the "
                    f"answers are drawn with {drawn[key]}; give --{key}, or remove the field")
        return messages

    faults, counts = Faults(), Counter()
    found = list(checked_rows(path, PROMPTS, check, counts, faults))
    faults.stop()
    if any(counts.values()):
        print(f"{path}{listed(counts)}")
    return zip(*found, strict=True)


def answers_of(model, tokenizer, prompts, options, first_row):
    """What is added to the rows of some prompts: {output, ended}, or an {error}.

    first_row: the number of the first prompt in its file. A row's text depends on its number and
    the seed, and not on its batch, as far as rounding in another batch leaves the logits alike.
    """
    max_seq_len = model.config.max_seq_len
    fitting = {}
    for number, prompt in enumerate(prompts, first_row):
        if len(prompt) < max_seq_len:
            fitting[number] = prompt
    answers = {}
    if fitting:
        new = generate(model, list(fitting.values()), options.max_new_tokens, options.temperature,
                       options.top_p, (tokenizer.eos_token_id,), options.sample_seed, list(fitting))
        answers = dict(zip(fitting, new, strict=True))
    found = []
    for number, prompt in enumerate(prompts, first_row):
        if number in answers:
            found.append(as_answer(answers[number], tokenizer))
        else:
            error = f"{len(prompt):,} tokens, and the model sees {max_seq_len:,}"
            found.append({"output": "", "ended": False, "error": error})
    return found


def as_answer(ids, tokenizer):
    """{output, ended} of an answer's ids."""
    ended = ids[-1] == tokenizer.eos_token_id
    return {"output": tokenizer.decode(ids[:-1] if ended else ids), "ended": ended}


def rows_done(out, rows, drawn):
    """How many of `rows` the file `out` already answers; a last line that a crash tore is cut off.

    UserError, and nothing is changed, for a file that holds anything else.
    """
    if not out.is_file():
        return 0
    content = out.read_bytes()
    size = content.rfind(b"\n") + 1  # of the complete lines
    torn = content[size:]
    answered = []
    for number, line in enumerate(content[:size].splitlines(), 1):
        answered.append(parsed_json(line, f"{out}:{number}"))
    ours = len(answered) <= len(rows) and (not torn or torn.startswith(b"{"))
    for answer, row in zip(answered, rows, strict=False):
        ours = ours and answers_row(answer, row, drawn)
    require(ours, f"{out}: holds other rows than answers of {drawn['generator']}, with its present "
            "weights, to these prompts with these options; choose another OUT")
    if torn:
        os.truncate(out, size)
    return len(answered)


def answers_row(answer, row, drawn):
    """Whether a line of OUT is an answer to `row`, drawn like that.

    The prompt's own OF_AN_ANSWER do not count: the answer has replaced them.
    """
    if not isinstance(answer, dict):
        return False
    # rows had no dtype when float32 was the only one
    return canonical({"dtype": "float32", **answer}) == canonical({**row, **drawn})


def canonical(row):
    """The JSON of a row without its answer: equal rows have equal texts.

    It is OUT's: that has null for NaN, and base64 for the bytes in a table.
    """
    kept = {key: value for key, value in row.items() if key not in OF_AN_ANSWER}
    return json.dumps(json.loads(to_json(kept)), sort_keys=True)
