"""Talking to a tuned model: in the terminal, or a file of prompts."""

import json
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from configs import load_config
from corpus.documents import Record, parse, read_records, without_surrogates
from corpus.tokenizer import Tokenizer
from data import render_chat
from model import generate, generate_stream
from scaling.checkpoint import run_of
from scaling.machine import choose_device
from support.chats import checked_messages, require
from support.cpu import packed_weights
from support.files import UserError
from support.models import open_base
from support.weights import load_model

ANSWER_BATCH = 8  # prompts answered together: of a 7B their keys and values take up to 8.6 GB


@dataclass(frozen=True)
class AnswerOptions:
    """How `chat` and `generate` draw their answers."""

    temperature: float = 0.0
    """0 takes the likeliest token each time; 1 samples from the model as it is."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens that holds this much of the probability."""
    max_new_tokens: int = 512
    """Longest answer in tokens; the context length ends it too."""
    sample_seed: int = 1
    """Seed of the sampling."""
    answer_batch: int = ANSWER_BATCH
    """Prompts that `generate` answers at a time."""

    def __post_init__(self):
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise UserError(f"temperature={self.temperature} must be at least 0 and "
                            f"top_p={self.top_p} above 0 and at most 1")
        if min(self.max_new_tokens, self.answer_batch) < 1:
            raise UserError("max_new_tokens and answer_batch must be at least 1")


def open_assistant(path):
    """(model, tokenizer) of a run, a step or a Hugging Face directory."""
    home = run_of(path)
    return load_model(path, choose_device()), Tokenizer.load(home / "tokenizer.json")


def coloured(example, tokenizer, on, off):
    """The text of an Example, special tokens too, with each trained stretch between on and off."""
    text, begin = "", 0
    for end in range(1, len(example.ids) + 1):
        if end == len(example.ids) or example.trained[end] != example.trained[begin]:
            part = harmless(tokenizer.decode(example.ids[begin:end]))
            text += f"{on}{part}{off}" if example.trained[begin] else part
            begin = end
    return text


def harmless(text):
    """`text` without the control characters that a terminal would obey."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def speak(model, tokenizer, prompt, options):
    """Print the answer to the ids of a prompt as it comes; returns its text."""
    ids, shown = [], ""
    stream = generate_stream(model, [prompt], options.max_new_tokens, options.temperature,
                             options.top_p, (tokenizer.eos_token_id,), options.sample_seed)
    with packed_weights(model):
        for chosen in stream:
            if chosen[0] != tokenizer.eos_token_id:
                ids.append(chosen[0])
            text = tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # of a character's bytes there may be more to come
                print(harmless(text[len(shown):]), end="", flush=True)
                shown = text
    text = tokenizer.decode(ids)
    print(harmless(text[len(shown):]))
    return text


def fitted(messages, tokenizer, room):
    """(messages without as many of the oldest turns as are in the way, how many those are)."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns, dropped = messages[len(system):], 0
    while len(render_chat([*system, *turns], tokenizer, reply=True)[0]) > room and len(turns) > 2:
        turns, dropped = turns[2:], dropped + 1
    return [*system, *turns], dropped


CHAT_HELP = """/reset           forget what was said
/system TEXT     begin anew with this system message; without a text, with none
/temperature X   0 takes the likeliest token each time
/quit            or Ctrl-D"""


def chat(argv):
    """A conversation in the terminal: history, answers as they come, commands that begin with /."""
    paths = [word for word in argv if not word.startswith("-")]
    [options] = load_config([word for word in argv if word.startswith("-")], AnswerOptions)
    require(len(paths) == 1, "the form is chat RUN")
    model, tokenizer = open_assistant(paths[0])
    room, messages = model.config.max_seq_len * 3 // 4, []
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    print(f"{paths[0]}: /help shows the commands")
    while True:
        try:
            line = without_surrogates(input("> ")).strip()
        except EOFError:
            print()
            return
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word == "/help":
            print(CHAT_HELP)
        elif word in ("/reset", "/system"):
            kept = messages[:1] if messages and messages[0]["role"] == "system" else []
            messages = kept if word == "/reset" else [
                {"role": "system", "content": rest}] if rest.strip() else []
            print("(begun anew)")
        elif word == "/temperature":
            try:
                options = replace(options, temperature=float(rest))
                print(f"(temperature {options.temperature:g})")
            except ValueError:
                print(f"({rest!r} is no temperature; 0 or more is wanted)")
        elif word.startswith("/"):
            print(f"({word} is no command)\n{CHAT_HELP}")
        elif line:
            wanted, dropped = fitted([*messages, {"role": "user", "content": line}], tokenizer,
                                     room)
            prompt, _ = render_chat(wanted, tokenizer, reply=True)
            if len(prompt) >= model.config.max_seq_len:
                print(f"(that is {len(prompt):,} tokens, and the model sees "
                      f"{model.config.max_seq_len:,}; say it in fewer words)")
                continue
            if dropped:
                print(f"(the oldest {dropped} turns no longer fit and were forgotten)")
            messages = [*wanted, {"role": "assistant",
                                  "content": speak(model, tokenizer, prompt, options)}]
            options = replace(options, sample_seed=options.sample_seed + 1)


def prompt_of(row, place):
    """The messages that a row of a prompt file asks to be answered."""
    require(isinstance(row, dict) and {"prompt", "instruction", "messages"} & row.keys(),
            f"{place}: no object with a prompt, an instruction or messages")
    text = row.get("prompt", row.get("instruction"))
    messages = row.get("messages", [{"role": "user", "content": text}])
    return checked_messages(messages, f"{place}: messages" if "messages" in row
                            else f"{place}: prompt", "user")


def generate_answers(argv):
    """Write a row for each row of a prompt file: it, with `output`, and whether that ended.

    Rows that OUT has already, of the same weights and options, are not done again.
    """
    paths = [word for word in argv if not word.startswith("-")]
    [options] = load_config([word for word in argv if word.startswith("-")], AnswerOptions)
    require(len(paths) == 3 and paths[2].endswith(".jsonl"),
            "the form is generate RUN PROMPTS.jsonl OUT.jsonl, the last with this ending")
    run, prompts, out = Path(paths[0]).as_posix(), paths[1], Path(paths[2])
    require(out.resolve().parent.is_dir(), f"{out}: there is no such directory; make it")
    records = list(read_records(prompts, "", Counter()))
    rows = [parse(record) for record in records]
    asked = [prompt_of(row, record.place) for row, record in zip(rows, records, strict=True)]
    drawn = {"generator": run, "weights": open_base(run, "size").digest, **asdict(options)}
    del drawn["answer_batch"]
    done = rows_done(out, rows, drawn)
    model, tokenizer = open_assistant(run)
    ids = [render_chat(messages, tokenizer, reply=True)[0] for messages in asked]
    for prompt, record in zip(ids, records, strict=True):
        require(len(prompt) < model.config.max_seq_len, f"{record.place}: {len(prompt):,} tokens, "
                f"and the model sees {model.config.max_seq_len:,}; shorten it")
    with open(out, "a", encoding="utf-8") as file, packed_weights(model):
        # a batch that is half done is drawn anew, for each has its own random streams
        for begin in tqdm(range(done - done % options.answer_batch, len(rows),
                                options.answer_batch), unit="batch"):
            answers = generate(model, ids[begin:begin + options.answer_batch],
                               options.max_new_tokens, options.temperature, options.top_p,
                               (tokenizer.eos_token_id,), options.sample_seed + begin)
            answered = list(zip(rows[begin:], answers, strict=False))
            for row, answer in answered[max(0, done - begin):]:
                ended = answer[-1] == tokenizer.eos_token_id
                output = tokenizer.decode(answer[:-1] if ended else answer)
                file.write(json.dumps({**row, "output": output, "ended": ended, **drawn}) + "\n")
            file.flush()
    print(f"wrote {out}: {len(rows):,} answers, {done:,} of them were there already")


def rows_done(out, rows, drawn):
    """How many of `rows` a file of answers `drawn` so has; a last line that a crash tore is cut.

    UserError, and nothing is touched, for a file that holds anything else.
    """
    if not out.is_file():
        return 0
    content = out.read_bytes()
    whole, torn = content[:content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1:]
    answered = [parse(Record(out.name, number, f"{out}:{number}", line))
                for number, line in enumerate(whole.splitlines(), 1)]
    own = "output", "ended"  # a row may bring others' of these names, and of those of `drawn`
    same = len(answered) <= len(rows) and (not torn or torn.startswith(b"{")) and all(
        isinstance(answer, dict) and all(answer.get(key) == value for key, value
                                         in {**row, **drawn}.items() if key not in own)
        for answer, row in zip(answered, rows, strict=False))
    require(same, f"{out}: holds something else than answers of {drawn['generator']}, as it is "
            "now, to these prompts with these options; choose another OUT")
    if torn:
        out.write_bytes(whole)
    return len(answered)
