"""The commands of eval.py: one model, every step of a run, samples; printed and recorded.

eval.py says how a model is measured and hands its functions `evaluate` and `sample_text` over.
Here is what surrounds them: finding the model and the suites, tables, rows of RUN/eval.jsonl.
"""

import time
from dataclasses import replace

from corpus.documents import warn
from corpus.trace import held_out_of
from scaling.checkpoint import run_of, step_directories
from support.files import UserError
from support.memory import Half, remedied
from support.models import check_description, open_model
from support.prompts import draw_samples, open_prompts, read_prompts
from support.records import (domains_table, evaluation_key, keys_recorded, record, sample_key,
                             tasks_table, verdict_on)
from support.run_hints import not_one_run
from support.suites import open_suites

VERBS = ("sample", "report")


# ---- The command line ----------------------------------------------------------------------------

def split_words(argv):
    """(verb, paths, options) of a command line; the verb is "evaluate" if none is written."""
    paths = [word for word in argv if not word.startswith("-")]
    options = [word for word in argv if word.startswith("-")]
    if paths and paths[0] in VERBS:
        return paths[0], paths[1:], options
    return "evaluate", paths, options


def check_paths(verb, paths):
    """UserError unless the paths are those of runs or models, one for all verbs but report."""
    if not paths or (len(paths) > 1 and verb != "report"):
        raise not_one_run(verb, paths)
    for path in paths:
        run_of(path)  # it must be there


# ---- Evaluations ---------------------------------------------------------------------------------

def evaluate_path(path, config, evaluate, data_dir=""):
    """Evaluate one model on the suites of the config; data_dir: where its data is, if it moved."""
    run = run_of(path)
    check_description(path)  # a directory that is no OLMo says so before it lacks a suite
    # Before the model, as every file is read once: a faulty one shows now.
    suites = suites_for(run, config, data_dir)
    model, tokenizer, state = open_model(path, config)
    evaluate_and_record(run, model, tokenizer, state, suites, config, evaluate, set())


def suites_for(run, config, data_dir):
    """The suites of a command line; UserError for an option that none of them would use."""
    suites = open_suites(config, lambda: held_out_of(run, data_dir))
    with_tasks = [bool(suite.tasks) for suite in suites]
    for key, of_tasks in (("chat", True), ("limit", True), ("metric", True), ("subdomain", False)):
        value = getattr(config, key)
        if value != type(config).__dataclass_fields__[key].default and of_tasks not in with_tasks:
            kind, other = ("tasks", "texts") if of_tasks else ("texts", "tasks")
            raise UserError(f"{key}={value}: it is for {kind}, and suite={config.suite} holds "
                            f"{other} alone; leave it out, or name a suite of {kind}")
    return suites


def evaluate_and_record(run, model, tokenizer, state, suites, config, evaluate, told):
    """Evaluate suites one by one: print the table of each, add a row to RUN/eval.jsonl.

    told: the set of sentences that need not be printed again.
    """
    for suite in suites:
        began = time.monotonic()
        with remedied("in an evaluation", *memory_left(model, config)):
            results = evaluate(model, tokenizer, [suite], config)
        [key] = results.pop("of")
        if suite.tasks:
            print(tasks_table(results["tasks"]))
        else:
            print(domains_table(results["sums"]))
        # A number is only as good as the data is clean: was the suite in the training data?
        verdict, said = verdict_on(suite, key, run, state)
        why = said.partition("decontaminated: ")[2]  # several suites may have the same reason
        print(f"{suite.name}: {said}\n" * (why not in told), end="")
        told.add(why)
        if state:  # a step of a run; a Hugging Face directory is left alone
            seconds = round(time.monotonic() - began, 1)
            record(run, "eval", state, of=key, decontaminated=verdict, said=said, **results,
                   seconds=seconds)


def memory_left(model, config):
    """The remedies of support/memory.py; one sequence of the context length is the least."""
    dtype = "--eval_dtype=bfloat16" if config.eval_dtype == "float32" else None
    return Half("eval_batch_tokens", config.eval_batch_tokens, model.config.max_seq_len), dtype


def evaluate_every_checkpoint(path, config, evaluate, sample_text, data_dir=""):
    """Evaluate every complete step of a run and draw a sample from it.

    What eval.jsonl has already, for the same weights and an equal key, is skipped.
    """
    run = run_of(path)
    steps = step_directories(run)
    if not steps:
        check_description(run)  # a directory that is no model says so first
        raise UserError(f"{run}: --every_checkpoint needs a run with step directories")
    suites = suites_for(run, config, data_dir)
    errors = []
    told = set()
    for step in steps:
        try:
            evaluate_missing(run, step, suites, config, evaluate, sample_text, told)
        except UserError as error:  # a damaged step does not stop the others
            warn(f"{error}; the other steps are evaluated")
            errors.append(error)
    if len(errors) == len(steps):
        raise UserError(f"{run}: none of its {len(steps)} steps could be evaluated, as {errors[0]}")
    print(f"the numbers are in {run / 'eval.jsonl'}; python eval.py report {run} draws them")


def evaluate_missing(run, step, suites, config, evaluate, sample_text, told):
    """Evaluate one step on the suites that eval.jsonl lacks, and draw the samples that it lacks."""
    done = keys_recorded(run, step)
    missing = [suite for suite in suites
               if evaluation_key(suite, config, config.eval_dtype) not in done]
    prompts = [prompt for _, prompt in read_prompts(config.prompts)] or [config.prompt]
    prompts = [prompt for prompt in prompts
               if sample_key(replace(config, prompt=prompt)) not in done]
    if not missing and not prompts:
        print(f"{step}: done already")
        return
    print(f"{step}:")
    model, tokenizer, state = open_model(step, config)
    open_prompts(config, tokenizer, model.config.max_seq_len)  # one that is too long is told now
    evaluate_and_record(run, model, tokenizer, state, missing, config, evaluate, told)
    for prompt in prompts:
        [text] = draw_samples(model, tokenizer, [prompt], config, sample_text)
        record(run, "sample", state, of=sample_key(replace(config, prompt=prompt)), text=text)


# ---- Samples -------------------------------------------------------------------------------------

def print_samples(path, options, config, sample_text):
    """Print a sample for each --prompt= of the command line, or for the prompts of the config."""
    if config.chat:
        raise UserError("chat=True: `sample` continues a text; python adapt.py chat "
                        f"{run_of(path)} talks to a tuned model")
    given = [word.partition("=")[2] for word in options if word.startswith("--prompt=")]
    if given and config.prompts:
        raise UserError(f"--prompt={given[0]} and --prompts={config.prompts}: give one of the two")
    read_prompts(config.prompts)  # a fault is told before the model is loaded
    model, tokenizer, _ = open_model(path, config)
    prompts = given or open_prompts(config, tokenizer, model.config.max_seq_len)
    for i, prompt in enumerate(prompts):
        if i > 0:
            print("-" * 40)
        print(*draw_samples(model, tokenizer, [prompt], config, sample_text))
