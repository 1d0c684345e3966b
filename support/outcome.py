"""What a run says at its end: what tuning changed, and which commands come next."""

import re

from support.files import free_name, log_rows, read_json
from support.hf_tokenizer import template_of
from support.records import aligned, bits_per_byte


# ---- Before and after tuning ---------------------------------------------------------------------

def answer_numbers(tuned):
    """{what: value, as text} of the numbers of held-out answers (support/held_out.py)."""
    numbers = {}
    if "loss" in tuned:
        numbers["nats per token"] = f"{tuned['loss']:.4f} +- {tuned['loss_error']:.4f}"
    if "dpo_loss" in tuned:
        error = 100 * tuned["accuracy_error"]
        numbers["DPO loss"] = f"{tuned['dpo_loss']:.4f}"
        numbers["chosen answer is likelier"] = f"{tuned['accuracy']:.1%} +- {error:.1f}"
        numbers["reward accuracy"] = f"{tuned['reward_accuracy']:.1%}"
        numbers["reward margin"] = f"{tuned['reward_margin']:.4f}"
    if "ended" in tuned:
        numbers["answers that end"] = f"{tuned['ended']:.1%}"
    return numbers


def tuning_table(run, results, eval_data):
    """What was measured before a tuning and after it, as text."""
    rows = log_rows(run, "metrics.jsonl")
    evaluations = [row for row in rows if row.get("kind") == "eval"]
    first = evaluations[0] if evaluations else results  # of step 0: the model that is tuned
    lines = before_and_after(f"held-out answers of {eval_data}",
                             answer_numbers(first.get("tuned", {})),
                             answer_numbers(results.get("tuned", {})))
    lines += before_and_after("bits per byte of text",
                              text_numbers(first.get("sums", {})),
                              text_numbers(results["sums"]))
    table = aligned(lines, left=[0])
    if results["sums"]:
        table.append("fewer bits are better; a rise shows what the tuning made the model forget")
    return "\n".join(table)


def text_numbers(results):
    """{domain: bits per byte, as text} of {domain: sums}."""
    return {name: f"{bits_per_byte(sums):.4f}" for name, sums in results.items()}


def before_and_after(title, before, after):
    """Rows of cells under a title; none if nothing was measured."""
    if not after:
        return []
    rows = [[title, "before", "after"]]
    for name, value in after.items():
        rows.append([f"  {name}", before.get(name, "-"), value])
    return rows


def without_blank_runs(text):
    """A sample for the screen: four blank lines or more in a row become a line that counts them."""
    def count_of(found):
        lines = found[0].count("\n") - 1
        return f"\n[{lines} blank lines]\n"

    return re.sub(r"\n(\s*\n){4,}", count_of, text)


# ---- What comes next -----------------------------------------------------------------------------

def print_next(run, chosen):
    """The commands that a reader may want after a run. chosen: the run, or its best step."""
    settings = read_json(run / "config.json")
    method = settings.get("method")
    dpo = tuning_command("dpo", run, chosen, settings)
    sft = tuning_command("sft", run, chosen, settings)
    report = f"python eval.py report {run}"
    chat = f"python adapt.py chat {chosen}"
    if method == "sft":
        commands = [chat, dpo, report]
    elif method == "dpo":
        commands = [chat, report, f"python model.py export {chosen} {free_name(f'{run}-hf')}"]
    else:
        sample = f"python eval.py sample {chosen} --prompt={example_prompt(settings)}"
        commands = [f"python eval.py {chosen}", sample, report, sft]
    print("\nnext:", *commands, sep="\n  ")


def example_prompt(settings):
    """A prompt, quoted, that fits the text of a run: of Python, or a place for the user's own."""
    is_python = "stdlib" in str(settings.get("sources"))
    return '"def read_"' if is_python else '"THE BEGINNING OF A TEXT"'


def tuning_command(method, run, start_from, settings):
    """The command that tunes a model: SFT of a base model, or DPO of what SFT has made of it.

    run: its directory. settings: of its config; from elsewhere, at least its d_model.
    """
    size = settings["d_model"]
    if size < 1024:
        configs = f"configs/tiny_{method}.py"
    elif size < 4096:  # adds to that of the 7B
        configs = f"configs/olmo_7b_{method}.py configs/olmo_1b_{method}.py"
    else:
        configs = f"configs/olmo_7b_{method}.py"
    data = settings.get("train_data", str(settings.get("sources", "stdlib")))
    own = ""
    if "stdlib" not in data:
        file = "chats.jsonl" if method == "sft" else "preferences.jsonl"
        own = f" --train_data={file} --eval_data="
        if size < 1024:  # as in the README, for few chats
            own += " --batch_size=8 --epochs=20" + " --lr=1e-3" * (method == "sft")
    pretrained = str(run).removesuffix("_sft")
    name = free_name(f"{pretrained}_{method}")
    return f"python adapt.py {configs} --start_from={start_from}{own} --run_dir={name}"


def say_if_untuned(path, home, **known):
    """Two lines about a model that was never tuned on chats: what it does, and how to tune it.

    home: its directory, of which `path` may be a step. known: settings that tuning_command needs.
    """
    if template_of(home) is not None:
        return
    config = home / "config.json"
    settings = (read_json(config) if config.is_file() else {}) | known
    print(f"warning: {path} was never tuned on chats, as far as its files say: it continues the "
          "text and does not answer. SFT teaches it to answer:\n"
          f"  {tuning_command('sft', home, path, settings)}")
