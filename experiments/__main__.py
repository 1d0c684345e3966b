"""Run the experiments one after another, and write a table for each.

    python -m experiments                                      # all of them, three seeds each
    python -m experiments --only=no_warmup,learned_gain --seeds=1
    python -m experiments --list                               # what each of them changes

The results are written to OUT/results.md after each run. The same command continues where it was
stopped. A run that several experiments share is trained once. docs/experiments.md tells what each
experiment asks.
"""

from support.command import UserError, run_main  # first: Ctrl-C is quiet from here on
import difflib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from configs import load_config, setting
from experiments.catalogue import EXPERIMENTS
from experiments.results import table
from experiments.runs import finish, record_of
from support.files import replace_file

FIRST_SEED = 6198  # OLMo's own, the default of train.py


@dataclass(frozen=True)
class ExperimentsConfig:
    """What is run, and where the results go."""

    only: str = setting("", "Names of experiments, with commas between; empty: all.")
    seeds: int = setting(3, "Runs of each variant: with the seeds 6198, 6199, ...", least=1)
    out: str = setting("runs/experiments", "Folder for runs, data and results.md.")
    extra: str = setting("", "Options for every run, with spaces between, such as --compile=false.")
    list: bool = setting(False, "Print the experiments, and run nothing.")

    def chosen(self):
        """The experiments that `only` names, in the order of the list."""
        known = {experiment.name: experiment for experiment in EXPERIMENTS}
        names = [name.strip() for name in self.only.split(",")] if self.only else list(known)
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1) or known
                raise UserError(f"only={name}: no such experiment; there is {', '.join(near)}")
        return [known[name] for name in known if name in names]


def main(argv):
    [config] = load_config(argv, ExperimentsConfig)
    chosen = config.chosen()
    if config.list:
        print("\n".join(listed(chosen)))
        return
    out = Path(config.out).resolve()
    extra = config.extra.split()
    seeds = range(FIRST_SEED, FIRST_SEED + config.seeds)
    for experiment in chosen:
        for seed in seeds:
            for variant in experiment.variants:
                finish(variant, seed, out, extra)
                write_results(EXPERIMENTS, seeds, out, extra)
        print("\n".join(lines_of(experiment, seeds, out, extra)))
        runs = [f"{out}/runs/{variant.name}-seed{FIRST_SEED}" for variant in experiment.variants]
        print(f"the picture: python eval.py report {' '.join(runs)}\n")
    print(f"all tables: {out / 'results.md'}")


def lines_of(experiment, seeds, out, extra):
    """The table of an experiment, of the runs that are finished."""
    records = {}
    for variant in experiment.variants:
        of_seeds = {seed: record_of(variant, seed, out, extra) for seed in seeds}
        records[variant.name] = {seed: record for seed, record in of_seeds.items()
                                 if record["figures"]}
    return table(experiment, records)


def write_results(experiments, seeds, out, extra):
    """OUT/results.md: the machine, and a table for each experiment."""
    count = len(seeds)
    lines = [f"# Results: {count} seed{'s' * (count > 1)}, {os.cpu_count()} cores, "
             f"{platform.machine()}, Python {platform.python_version()}", ""]
    for experiment in experiments:
        lines += lines_of(experiment, seeds, out, extra)
    replace_file(out / "results.md", "\n".join(lines).encode())


def listed(experiments):
    """Markdown: the hypothesis of each experiment, and what each variant changes."""
    lines = []
    for experiment in experiments:
        lines += [f"### {experiment.name}", "", f"Hypothesis: {experiment.hypothesis}", "",
                  f"Compared: {', '.join(experiment.figures)}.", "",
                  "| variant | options | patch |", "|---|---|---|"]
        for variant in experiment.variants:
            options = " ".join(variant.options).replace("|", "\\|")
            patch = f"[{variant.patch}](../experiments/{variant.patch}.patch)"
            lines.append(f"| {variant.name} | {f'`{options}`' * bool(options)} | "
                         f"{patch * bool(variant.patch)} |")
        lines.append("")
    return lines


if __name__ == "__main__":
    run_main(main)
