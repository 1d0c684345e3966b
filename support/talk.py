"""Talking to a tuned model: a chat in the terminal, a file of answers."""

import json
import os
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from configs import load_config, setting
from corpus.documents import Record, parse, read_records, without_surrogates
from data import render_chat
from model import generate, generate_stream
from scaling.checkpoint import run_of
from scaling.ranks import from_rank0
from scaling.sharding import evaluating
from support.chats import checked_messages, require
from support.cpu import packed_weights
from support.files import UserError
from support.hf_tokenizer import warn_of_other_template
from support.models import open_base, open_with_tokenizer

ANSWER_BATCH = 8  # prompts answered together: a 7B's keys and values then take up to 8.6 GB


@dataclass(frozen=True)
class AnswerOptions:
    """How `chat` and `generate` draw their answers."""

    temperature: float = setting(0.0, "0 takes the likeliest token; 1 samples from the model.")
    top_p: float = setting(1.0, "Sample from the likeliest tokens that hold this probability.")
    max_new_tokens: int = setting(512, "Longest answer in tokens; the context length ends it too.")
    sample_seed: int = setting(1, "Seed of the sampling.")
    answer_batch: int = setting(ANSWER_BATCH, "Prompts that `generate` answers at a time.")

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"temperature={self.temperature} must be at least 0 and "
                            f"top_p={self.top_p} above 0 and at most 1")
        if min(self.max_new_tokens, self.answer_batch) < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} and answer_batch="
                            f"{self.answer_batch} must be at least 1")


# ---- Chat ----------------------------------------------------------------------------------------

CHAT_HELP = """/reset           forget what was said
/system TEXT     start again with this system message; without a text, with none
/temperature X   0 takes the likeliest token each time
/quit            or Ctrl-D"""


def chat(argv):
    """A conversation in the terminal; a line that begins with / is a command."""
    paths, options = paths_and_options(argv)
    require(len(paths) == 1, f"chat {' '.join(paths)}: the form is chat RUN")
    model, tokenizer = open_assistant(paths[0])
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a terminal may send bytes that are not UTF-8
    print(f"{paths[0]}: /help shows the commands")
    messages = []  # what was said so far; the model sees all of it each time
    while True:
        try:
            line = without_surrogates(input("> ")).strip()
        except EOFError:
            print()
            return
        if line.partition(" ")[0] == "/quit":
            return
        if line.startswith("/"):
            messages, options = obey(line, messages, options)
        elif line:
            messages, options = reply(line, messages, model, tokenizer, options)


def obey(line, messages, options):
    """Carry out a command; returns (messages, options) as they are after it."""
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word == "/help":
        print(CHAT_HELP)
    elif word == "/reset":
        messages = system_message(messages)
        print("(started again)")
    elif word == "/system":
        messages = [{"role": "system", "content": rest}] if rest else []
        print("(started again)")
    elif word == "/temperature":
        try:
            options = replace(options, temperature=float(rest))
            print(f"(temperature {options.temperature:g})")
        except ValueError:  # a UserError is one too
            print(f"({rest!r} is no temperature; give a number of at least 0)")
    else:
        print(f"({word} is no command)\n{CHAT_HELP}")
    return messages, options


def reply(line, messages, model, tokenizer, options):
    """Answer a line of the user's; returns (messages, options) as they are after it."""
    max_seq_len = model.config.max_seq_len
    asked = [*messages, {"role": "user", "content": line}]
    asked, dropped = fitted(asked, tokenizer, max_seq_len * 3 // 4)  # the rest is for the answer
    prompt, _ = render_chat(asked, tokenizer, reply=True)
    if len(prompt) >= max_seq_len:
        print(f"(that is {len(prompt):,} tokens, and the model sees {max_seq_len:,}; say it in "
              "fewer words)")
        return messages, options
    if dropped:
        print(f"(the oldest {dropped} turns no longer fit and were forgotten)")
    answer = speak(model, tokenizer, prompt, options)
    options = replace(options, sample_seed=options.sample_seed + 1)  # so that answers vary
    return [*asked, {"role": "assistant", "content": answer}], options


def system_message(messages):
    """The first message in a list, if it is the system's; else an empty list."""
    return [message for message in messages[:1] if message["role"] == "system"]


def fitted(messages, tokenizer, room):
    """Returns (messages, dropped): without the oldest turns that do not fit into `room` tokens."""
    system = system_message(messages)
    turns = messages[len(system):]
    dropped = 0
    while len(turns) > 2:
        prompt, _ = render_chat(system + turns, tokenizer, reply=True)
        if len(prompt) <= room:
            break
        turns = turns[2:]  # a question and its answer
        dropped += 1
    return system + turns, dropped


def speak(model, tokenizer, prompt, options):
    """Print the answer to the ids of a prompt as it comes; returns its text."""
    ids = []
    shown = ""  # what is printed already
    stream = generate_stream(model, [prompt], options.max_new_tokens, options.temperature,
                             options.top_p, (tokenizer.eos_token_id,), options.sample_seed)
    with packed_weights(model):
        for chosen in stream:
            if chosen[0] != tokenizer.eos_token_id:
                ids.append(chosen[0])
            text = tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # else more bytes of the last character may come
                print(harmless(text[len(shown):]), end="", flush=True)
                shown = text
    text = tokenizer.decode(ids)
    print(harmless(text[len(shown):]))
    return text


def open_assistant(path):
    """Returns (model, tokenizer) of a run, a step or a Hugging Face directory."""
    model, tokenizer, _ = open_with_tokenizer(path)
    warn_of_other_template(run_of(path))
    return model, tokenizer


def paths_and_options(argv):
    """Returns (paths, AnswerOptions) of a command line."""
    paths = [word for word in argv if not word.startswith("-")]
    words = [word for word in argv if word.startswith("-")]
    [options] = load_config(words, AnswerOptions)
    return paths, options


# ---- Generate ------------------------------------------------------------------------------------

def answer_prompts(model, tokenizer, prompts, max_new_tokens):
    """Returns (texts, ended): prompts with their greedy answers, and the share of them that end.

    prompts: lists of ids, which begin with EOS. All ranks answer together, with rank 0's tokens.
    """
    answers = []
    with evaluating(model), packed_weights(model):
        for begin in range(0, len(prompts), ANSWER_BATCH):
            answers += generate(model, prompts[begin:begin + ANSWER_BATCH], max_new_tokens,
                                stop_ids=(tokenizer.eos_token_id,), sync=from_rank0)
    texts = []
    ended = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        texts.append(tokenizer.decode([*prompt[1:], *answer]))  # without the EOS it begins with
        ended += answer[-1] == tokenizer.eos_token_id
    return texts, ended / len(prompts)


def generate_answers(argv):
    """Write a row for each row of a prompt file: that row, with `output`, and whether it ended.

    A row that OUT already has, made by the same weights and options, is not made again.
    """
    paths, options = paths_and_options(argv)
    require(len(paths) == 3 and paths[2].endswith(".jsonl"),
            f"generate {' '.join(paths)}: the form is generate RUN PROMPTS.jsonl OUT.jsonl")
    run = Path(paths[0]).as_posix()
    out = Path(paths[2])
    require(out.resolve().parent.is_dir(), f"{out}: there is no such directory; make it")
    rows, places, requests = read_prompts(paths[1])
    drawn = {"generator": run, "weights": open_base(run, "size").digest, **asdict(options)}
    del drawn["answer_batch"]  # a file may be continued with another one
    done = rows_done(out, rows, drawn)
    model, tokenizer = open_assistant(run)
    prompts = encode_prompts(requests, places, tokenizer, model.config.max_seq_len)

    # A batch that is half done is drawn again, as each of its rows has its own random stream
    first = done - done % options.answer_batch
    with open(out, "a", encoding="utf-8") as file, packed_weights(model):
        for begin in tqdm(range(first, len(rows), options.answer_batch), unit="batch"):
            end = begin + options.answer_batch
            answers = generate(model, prompts[begin:end], options.max_new_tokens,
                               options.temperature, options.top_p, (tokenizer.eos_token_id,),
                               options.sample_seed + begin)
            for number, answer in enumerate(answers, begin):
                if number >= done:
                    row = answered_row(rows[number], answer, tokenizer, drawn)
                    file.write(json.dumps(row) + "\n")
            file.flush()
    print(f"wrote {out}: {len(rows):,} answers, {done:,} of them were there already")


def read_prompts(path):
    """Returns (rows, places, requests) of a prompt file; a request is a list of messages."""
    rows = []
    places = []  # file:line
    requests = []
    for record in read_records(path, "", Counter()):
        row = parse(record)
        rows.append(row)
        places.append(record.place)
        requests.append(prompt_of(row, record.place))
    return rows, places, requests


def prompt_of(row, place):
    """The messages that a row of a prompt file asks to be answered."""
    require(isinstance(row, dict) and {"prompt", "instruction", "messages"} & row.keys(),
            f"{place}: needs a key prompt, instruction or messages; add one")
    if "messages" in row:
        return checked_messages(row["messages"], f"{place}: messages", "user")
    text = row.get("prompt", row.get("instruction"))
    return checked_messages([{"role": "user", "content": text}], f"{place}: prompt", "user")


def encode_prompts(requests, places, tokenizer, max_seq_len):
    """The ids of each request; UserError for one that leaves no room for an answer."""
    prompts = []
    for messages, place in zip(requests, places, strict=True):
        ids, _ = render_chat(messages, tokenizer, reply=True)
        require(len(ids) < max_seq_len, f"{place}: {len(ids):,} tokens, and the model sees "
                f"{max_seq_len:,}; shorten it")
        prompts.append(ids)
    return prompts


def answered_row(row, answer, tokenizer, drawn):
    """A row with its answer: `output`, `ended`, and how it was drawn."""
    ended = answer[-1] == tokenizer.eos_token_id
    output = tokenizer.decode(answer[:-1] if ended else answer)
    return {**row, "output": output, "ended": ended, **drawn}


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
        answered.append(parse(Record(out.name, number, f"{out}:{number}", line)))
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

    The prompt's own `output` and `ended` do not count: the answer has replaced them.
    """
    expected = {**row, **drawn}
    expected.pop("output", None)
    expected.pop("ended", None)
    if not isinstance(answer, dict):
        return False
    return all(answer.get(key) == value for key, value in expected.items())


def harmless(text):
    """`text` without the control characters that a terminal would obey."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
