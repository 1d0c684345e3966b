"""Run the experiments one after another, and write a table for each.

    python -m experiments                                      # all of them, three seeds each
    python -m experiments --only=no_warmup,learned_gain --seeds=1
    python -m experiments --list                               # what each of them changes
    python -m experiments --publish                            # tables and pictures for the docs

The results are written to OUT/results.md after each run. The same command continues where it was
stopped. A run that several experiments share is trained once. docs/experiments.md tells what each
experiment asks.
"""

from support.command import UserError, run_main  # first: Ctrl-C is quiet from here on
import difflib
from dataclasses import dataclass
from pathlib import Path

from configs import ROOT, load_config, setting
from experiments.catalogue import EXPERIMENTS
from experiments.drawing import draw_pictures
from experiments.results import section, table, with_section, with_table
from experiments.runs import finish, made_by_other_code, record_of
from support.files import replace_file
from support.text import counted

FIRST_SEED = 6198  # OLMo's own, the default of train.py


@dataclass(frozen=True)
class ExperimentsConfig:
    """What is run, and where the results go."""

    only: str = setting("", "Names of experiments, with commas between; empty: all.")
    seeds: int = setting(3, "Runs of each variant: with the seeds 6198, 6199, ...", least=1)
    out: str = setting("runs/experiments", "Folder for runs, data and results.md.")
    extra: str = setting("", "Options for every run, with spaces between, such as --compile=false.")
    list: bool = setting(False, "Print the experiments, and run nothing.")
    publish: bool = setting(False, "Write what is finished into docs/ and assets/; run nothing.")

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
    say_other_code(chosen, seeds, out, extra)
    if config.publish:
        publish(chosen, seeds, out, extra)
        return
    for experiment in chosen:
        run_experiment(experiment, seeds, out, extra)
    print(f"all tables: {out / 'results.md'}")


def say_other_code(experiments, seeds, out, extra):
    """A line if finished runs were made by other code: they are not run again by themselves."""
    names = made_by_other_code(experiments, seeds, out, extra)
    if names:
        runs = counted(len(names), "finished run")
        print(f"experiments: the code has changed since {runs}, such "
              f"as {names[0]}; they are kept as they are. --out=DIR with a new folder runs them "
              "with today's code")


def run_experiment(experiment, seeds, out, extra):
    """Run what is not finished of an experiment, and print its table."""
    for seed in seeds:
        for variant in experiment.variants:
            finish(variant, seed, out, extra)
            replace_file(out / "results.md", results_text(seeds, out, extra).encode())
    records = finished(experiment, seeds, out, extra)
    print(experiment.name)
    print("\n".join(table(experiment, records, len(seeds))))
    runs = [f"{out}/runs/{variant.name}-seed{FIRST_SEED}" for variant in experiment.variants]
    print(f"the pictures: python eval.py report {' '.join(runs)}\n")


def finished(experiment, seeds, out, extra):
    """{variant name: {seed: record}} of the runs of an experiment that are finished."""
    records = {}
    for variant in experiment.variants:
        of_variant = {}
        for seed in seeds:
            record = record_of(variant, seed, out, extra)
            if record["figures"]:
                of_variant[seed] = record
        records[variant.name] = of_variant
    return records


# ---- Tables and pictures -------------------------------------------------------------------------

def results_text(seeds, out, extra):
    """results.md: a section for each experiment."""
    text = ""
    for experiment in EXPERIMENTS:
        records = finished(experiment, seeds, out, extra)
        text = with_section(text, experiment, section(experiment, records, len(seeds)))
    return text


def publish(experiments, seeds, out, extra):
    """Write the tables and pictures of these experiments into docs/ and assets/.

    What is published of the others, and of those without a finished run, stays as it is.
    """
    records = {}
    for experiment in experiments:
        of_variants = finished(experiment, seeds, out, extra)
        if any(of_variants.values()):
            records[experiment.name] = of_variants
    if not records:
        raise UserError(f"{out}: has no finished run of these experiments; without --publish the "
                        "same command runs them")
    shown = [experiment for experiment in experiments if experiment.name in records]
    folder = ROOT / "assets" / "experiments"
    write_tables(shown, records, len(seeds), folder / "results.md")
    is_drawn = draw_pictures(shown, records, out, folder)
    print(f"wrote the tables and pictures of {', '.join(records)}")
    if not is_drawn:
        print("no pictures: pip install matplotlib draws them")


def write_tables(experiments, records, seeds, file):
    """Put the tables of these experiments into docs/experiments.md and into this results.md."""
    doc = ROOT / "docs" / "experiments.md"
    text = doc.read_text()
    results = file.read_text() if file.is_file() else ""
    for experiment in experiments:
        of_variants = records[experiment.name]
        text = with_table(text, experiment, table(experiment, of_variants, seeds))
        results = with_section(results, experiment, section(experiment, of_variants, seeds))
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, results.encode())
    replace_file(doc, text.encode())


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
