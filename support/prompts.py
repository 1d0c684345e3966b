"""The prompts of samples: the config's one, or a file of them; and the samples of a model."""

from dataclasses import replace
from pathlib import Path

from corpus.documents import parse, print_line, read_records
from corpus.lines import TEXT_SUFFIXES, ends_in
from support.files import UserError, here
from support.memory import Half, remedied
from support.progress import watched
from support.text import counted, decoded, shown


def draw_samples(model, tokenizer, prompts, config, sample_text):
    """A sample for each prompt, as texts that begin with it. sample_text: eval.sample_text.

    A prompt's sample is the same alone and among others. All ranks return the same.
    """
    with remedied("in a sample", Half("max_new_tokens", config.max_new_tokens)):
        return [sample_text(model, tokenizer, replace(config, prompt=prompt))
                for prompt in watched(prompts, "sample")]


def open_prompts(config, tokenizer, max_seq_len):
    """The prompts of the samples, as texts: those in the file config.prompts, or config.prompt.

    Raises UserError for a prompt that leaves no room in the context.
    """
    prompts = read_prompts(config.prompts) or [("prompt", config.prompt)]
    too_long = []
    for place, prompt in prompts:
        length = 1 + len(tokenizer.encode(prompt))  # a document begins after an EOS
        if length >= max_seq_len:
            too_long.append(f"{place}: {shown(prompt)}: {length:,} tokens")
    if too_long:
        others = f" ({len(too_long):,} of {len(prompts):,} prompts are too long)"
        raise UserError(f"{too_long[0]}, and the model sees {max_seq_len:,}, the sample included; "
                        "shorten the prompt" + others * (len(prompts) > 1))
    return [prompt for _, prompt in prompts]


def read_prompts(path):
    """[(file:line, text), ...] of a file of prompts; [] without a path.

    A text file has a prompt a line, blank lines aside, which are counted. All other formats that
    are read for documents have a row with `prompt`.
    """
    if not path:
        return []
    file = Path(path)
    if not file.is_file():
        kind = "a folder, not a file" if file.is_dir() else f"no such file{here(path)}"
        raise UserError(f"prompts={path}: {kind}; name a text file with a prompt a line, or JSON "
                        'lines of {"prompt": TEXT}')
    prompts = []
    for record in read_records(path):
        is_text = ends_in(path, TEXT_SUFFIXES)
        prompts += prompts_of_lines(file, record) if is_text else [prompt_of(record)]
    if not prompts:
        raise UserError(f"prompts={path}: holds no prompt; write one a line")
    return prompts


def prompts_of_lines(file, record):
    """[(file:line, text), ...] of a text file."""
    lines = decoded(record.content, record.place).removesuffix("\n").split("\n")
    prompts = [(f"{file}:{number}", line.removesuffix("\r")) for number, line in enumerate(lines, 1)
               if line.strip()]
    blank = len(lines) - len(prompts)
    if blank:
        print_line(f"{file}: left out: {counted(blank, 'blank line')}")
    return prompts


def prompt_of(record):
    """(file:line, text) of a row of JSON lines or of a table."""
    row = parse(record)
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str):
        raise UserError(f"{record.place}: holds no text under the key prompt; a sample goes on "
                        'from a text, {"prompt": TEXT}; python adapt.py generate answers chats')
    return record.place, prompt
