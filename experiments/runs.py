"""One run of an experiment: its command, the code with its patch, and the record of its result.

    OUT/runs/VARIANT-seedN/        the run directory
    OUT/runs/VARIANT-seedN.log     what the command printed
    OUT/runs/VARIANT-seedN.json    its record: key, code, machines, seconds, and its figures at
                                   the end
    OUT/code/PATCH/                the patched copy of the code
    OUT/data/, OUT/corpora/        the built data, and the texts of corpora.py
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time

from configs import ROOT
from experiments.corpora import write_corpora
from experiments.results import figures_of
from scaling.code_files import PARTS, code_version
from support.files import UserError, file_sha256, read_json, to_json, write_json

FOLDERS = ("configs", *PARTS)


def patch_file(name):
    return ROOT / "experiments" / f"{name}.patch"


def run_of(variant, seed, out):
    """The run directory of a variant."""
    return out / "runs" / f"{variant.name}-seed{seed}"


def beside(run, ending):
    """The file beside a run directory that has its name and this ending."""
    return run.with_name(run.name + ending)  # with_suffix would cut the name lr_0.001


def command_of(variant, seed, out):
    """The words after `python`: what a reader could type in the folder of the code."""
    words = ["adapt.py" if variant.after else "train.py", variant.config, *variant.common]
    corpora = str(out / "corpora")
    words += [option.replace("{corpora}", corpora) for option in variant.options]
    if variant.after:  # the base fixes the seed
        words.append(f"--start_from={run_of(variant.after, seed, out)}")
    else:
        words += [f"--data_dir={out / 'data'}", f"--seed={seed}"]
    return [*words, f"--run_dir={run_of(variant, seed, out)}"]


def key_of(variant, seed, out, extra):
    """A digest of what decides the result: the commands and patches up to this run."""
    patch = patch_file(variant.patch).read_text() if variant.patch else ""
    before = key_of(variant.after, seed, out, extra) if variant.after else ""
    parts = [command_of(variant, seed, out), list(extra), patch, before]
    digest = hashlib.sha256(to_json(parts).encode())
    return digest.hexdigest()[:16]


def record_of(variant, seed, out, extra):
    """{key, machines, seconds, figures} of a run; figures is None until it is finished.

    A record of an older version names no machine: it is taken to be of this one.
    """
    record = {"key": key_of(variant, seed, out, extra), "machines": [], "seconds": 0.0,
              "figures": None}
    path = beside(run_of(variant, seed, out), ".json")
    if path.is_file():
        known = read_json(path)
        if known.get("key") == record["key"]:
            return {"machines": [this_machine()], **known}
    return record


def this_machine():
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


def finish(variant, seed, out, extra=()):
    """Run a variant to its end, and before it the run that it tunes; returns its record.

    A finished run is not run again. A run that was stopped continues from its newest checkpoint. A
    run of another command or patch is overwritten.
    """
    if variant.after:
        finish(variant.after, seed, out, extra)
    record = record_of(variant, seed, out, extra)
    if record["figures"]:
        return record
    run = run_of(variant, seed, out)
    words = [*command_of(variant, seed, out), *extra]
    if is_of_another(run, record["key"]):
        words.append("--overwrite")
    run.parent.mkdir(parents=True, exist_ok=True)
    if "{corpora}" in "".join(variant.options):
        write_corpora(out / "corpora")
    folder = patched_code(variant.patch, out / "code") if variant.patch else ROOT

    log = beside(run, ".log")
    print(f"experiments: {run.name} begins; it prints into {log}", flush=True)
    record["code"] = code_of(variant)
    code = timed(record, beside(run, ".json"), words, folder, log)
    if code:
        raise UserError(f"{run.name}: ended with exit code {code}; its output is in {log}. "
                        "The same command continues")
    record["figures"] = figures_of(run, variant.name)
    write_json(beside(run, ".json"), record)
    print(f"experiments: {run.name} took {record['seconds']:.0f} s", flush=True)
    return record


def is_of_another(run, key):
    """Whether a run directory is there that another command or patch has made."""
    if not run.exists():
        return False
    known = beside(run, ".json")
    return not known.is_file() or read_json(known).get("key") != key


def timed(record, file, words, folder, log):
    """Start a command, and add the seconds that it took to its record; returns its exit code.

    The record is written before and after, also where Ctrl-C ends it: the seconds of all starts
    are added up.
    """
    if this_machine() not in record["machines"]:
        record["machines"].append(this_machine())
    write_json(file, record)
    began = time.monotonic()
    try:
        return start(words, folder, log)
    finally:
        record["seconds"] += time.monotonic() - began
        write_json(file, record)


def start(words, folder, log):
    """Run `python WORDS` in a folder; its output is added to the file `log`. Returns the code."""
    with open(log, "a") as file:
        print("$ python", *words, file=file, flush=True)
        process = subprocess.Popen([sys.executable, *words], cwd=folder, stdin=subprocess.DEVNULL,
                                   stdout=file, stderr=subprocess.STDOUT)
        try:
            return process.wait()
        except (KeyboardInterrupt, SystemExit) as stop:
            if isinstance(stop, SystemExit):  # SIGTERM, which the run has not heard; Ctrl-C it has
                process.terminate()
            stop.add_note(f"stopped; {file.name} says which step is saved, and the same command "
                          "continues after it")
            process.wait()  # it saves its step, and ends
            raise


def code_of(variant):
    """A hash of the code and of the variant's config, which the hash of the code leaves out."""
    digests = code_version() + file_sha256(ROOT / variant.config)
    return hashlib.sha256(digests.encode()).hexdigest()[:12]


def made_by_other_code(experiments, seeds, out, extra):
    """The names of the finished runs that another version of the code has made."""
    names = {}  # as an ordered set
    for experiment in experiments:
        for variant in experiment.variants:
            now = code_of(variant)
            for seed in seeds:
                record = record_of(variant, seed, out, extra)
                if record["figures"] and record.get("code", now) != now:
                    names[run_of(variant, seed, out).name] = None
    return list(names)


def patched_code(name, folder):
    """A copy of the code in `folder`/NAME, with the patch applied by git; returns its path.

    The copy is made again each time, so that it never holds an older patch.
    """
    copy = folder / name
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, copy)
    for part in FOLDERS:
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    apply(patch_file(name), copy)
    return copy


def apply(patch, folder):
    """Apply a patch to the code in a folder; UserError if it does not fit."""
    # subtle: inside a repository, git apply skips files that lie outside the current folder, and
    # names files from the top; with this variable it finds no repository
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent.resolve())}
    done = subprocess.run(["git", "apply", str(patch)], cwd=folder, env=environment, text=True,
                          capture_output=True)
    if done.returncode:
        raise UserError(f"{patch}: does not fit the code: {done.stderr.strip()}")
