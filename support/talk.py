"""Talking to a tuned model: a chat in the terminal."""

import math
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

from configs import load_config, setting
from corpus.documents import without_surrogates
from data import render_chat
from model import generate_stream
from scaling.checkpoint import run_of
from scaling.machine import choose_device, choose_dtype
from support.fields import require
from support.files import UserError
from support.generation import fixed_weights
from support.hf_tokenizer import warn_of_other_template
from support.models import open_with_tokenizer
from support.outcome import say_if_untuned
from support.text import harmless

ANSWER_BATCH = 8  # prompts answered together: a 7B's keys and values then take up to 8.6 GB


@dataclass(frozen=True)
class AnswerOptions:
    """How `chat` and `generate` draw their answers."""

    temperature: float = setting(0.0, "0 takes the likeliest token; 1 samples from the model.")
    top_p: float = setting(1.0, "Sample from the likeliest tokens that hold this probability.")
    max_new_tokens: int = setting(512, "Longest answer in tokens; the context length ends it too.")
    sample_seed: int = setting(1, "Seed of the sampling.")
    answer_batch: int = setting(ANSWER_BATCH, "Prompts that `generate` answers at a time.")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Dtype of the weights; auto is bfloat16 where the chip multiplies it fast.")

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise UserError(f"temperature={self.temperature} must be at least 0 and "
                            f"top_p={self.top_p} above 0 and at most 1")
        if min(self.max_new_tokens, self.answer_batch) < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} and answer_batch="
                            f"{self.answer_batch} must be at least 1")


# ---- Chat ----------------------------------------------------------------------------------------

CHAT_HELP = """/reset           forget what was said; the model reads all of it for each answer
/system TEXT     start again with this system message; without a text, with none
/temperature X   0 takes the likeliest token each time
/quit            ends the chat, as Ctrl-D does; Ctrl-C stops an answer or clears the line"""


STOPPED = " (stopped)"


def chat(argv):
    """A conversation in the terminal; a line that begins with / is a command."""
    with suppress(ImportError):  # a Python may be built without it
        import readline  # noqa: F401  input() then knows the arrow keys and the lines before
    paths, options = paths_and_options(argv)
    require(len(paths) == 1, f"{' '.join(['chat', *paths])}: the form is chat RUN")
    model, tokenizer = open_assistant(paths[0], answer_dtype(options))
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a terminal may send bytes that are not UTF-8
    print(f"{paths[0]}: the model reads the whole chat for each answer (/reset starts a new one); "
          "/help shows the commands")
    messages = []  # what was said so far; the model sees all of it each time
    numbers = count()  # each answer draws from a stream of its own
    for line in questions():
        try:
            if line.partition(" ")[0] == "/quit" or line in ("quit", "exit"):
                return
            if line.startswith("/"):
                messages, options = obey(line, messages, options)
            elif line:
                messages = reply(line, messages, model, tokenizer, options, next(numbers))
        except KeyboardInterrupt:  # before an answer's first token, or behind its last
            print(STOPPED)


def questions():
    """Yield each line that the user types, until Ctrl-D or a second Ctrl-C; one clears the line.

    A line from a pipe is printed, as a terminal would show it.
    """
    is_terminal = sys.stdin.isatty()
    is_last = False  # whether Ctrl-C ends the chat
    while True:
        try:
            line = without_surrogates(input("> " if is_terminal else "")).strip()
            is_last = False
        except EOFError:
            print(end="\n" * is_terminal)
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            if is_last:
                print()
                return
            is_last = True
            print("\n(Ctrl-C again, or Ctrl-D, ends the chat)")
            continue
        if not is_terminal and line:
            print(f"> {line}")
        yield line


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


def reply(line, messages, model, tokenizer, options, number):
    """Answer a line of the user's, the chat's `number`-th; returns the messages after it."""
    max_seq_len = model.config.max_seq_len
    asked = [*messages, {"role": "user", "content": line}]
    asked, dropped = fitted(asked, tokenizer, max_seq_len * 3 // 4)  # the rest is for the answer
    prompt, _ = render_chat(asked, tokenizer, reply=True)
    if len(prompt) >= max_seq_len:
        print(f"(that is {len(prompt):,} tokens, and the model sees {max_seq_len:,}; say it in "
              "fewer words)")
        return messages
    if dropped:
        turns = "turn was" if dropped == 1 else f"{dropped} turns were"
        print(f"(the oldest {turns} forgotten: the model sees {max_seq_len:,} tokens)")
    answer = speak(model, tokenizer, prompt, options, number)
    if not answer.strip():  # an empty one, or one that was stopped at once
        print("(no answer: the question is forgotten)")
        return messages
    return [*asked, {"role": "assistant", "content": answer}]


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


def speak(model, tokenizer, prompt, options, number):
    """Print the answer to the ids of a prompt as it comes; returns its text.

    Ctrl-C ends the answer, and not the chat. number: of the answer, from 0; its stream.
    """
    ids = []
    shown = ""  # what is printed already
    stream = generate_stream(model, [prompt], options.max_new_tokens, options.temperature,
                             options.top_p, (tokenizer.eos_token_id,), options.sample_seed,
                             [number])
    end = ""
    try:
        with fixed_weights(model):
            for chosen in stream:
                if chosen[0] != tokenizer.eos_token_id:
                    ids.append(chosen[0])
                text = tokenizer.decode(ids)
                if not text.endswith("\ufffd"):  # else more bytes of the last character may come
                    print(harmless(text[len(shown):]), end="", flush=True)
                    shown = text
    except KeyboardInterrupt:
        end = STOPPED
    text = tokenizer.decode(ids)
    print(harmless(text[len(shown):]) + end)
    return text


def answer_dtype(options):
    """The dtype in which answers are computed."""
    return choose_dtype(options.dtype, choose_device())


def open_assistant(path, dtype):
    """Returns (model, tokenizer) of a run, a step or a Hugging Face directory, weights in `dtype`.
    """
    model, tokenizer, _ = open_with_tokenizer(path)
    model.to(dtype)
    warn_of_other_template(run_of(path))
    say_if_untuned(path, run_of(path), d_model=model.config.d_model)
    return model, tokenizer


def paths_and_options(argv):
    """Returns (paths, AnswerOptions) of a command line."""
    paths = [word for word in argv if not word.startswith("-")]
    words = [word for word in argv if word.startswith("-")]
    [options] = load_config(words, AnswerOptions)
    return paths, options
