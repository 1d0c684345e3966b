"""A warning above the funnel's table: rules that took out more than half of a source."""

from corpus.funnel import print_table
from support.files import read_json

MOST_LOST = 0.5  # of a source's bytes
NAMED_RULES = 3


def print_funnel(folder):
    """Print the warnings about built data, then its table."""
    print_large_drops(folder)
    print_table(folder)


def print_large_drops(folder):
    """Print a line for each source of which the rules took out more than half."""
    for name, source in read_json(folder / "manifest.json")["sources"].items():
        megabytes = {rule: counts.get("bytes", 0) / 1e6
                     for rule, counts in source["by_rule"].items()}
        whole = source.get("bytes in", 0) / 1e6
        lost = sum(megabytes.values())
        if lost > MOST_LOST * whole:
            rules = sorted(megabytes, key=megabytes.get, reverse=True)[:NAMED_RULES]
            listed = ", ".join(f"{rule} {megabytes[rule]:,.2f}" for rule in rules
                               if megabytes[rule] > 0)
            print(f"warning: {name}: rules took out {lost:,.2f} of {whole:,.2f} MB ({listed}); to "
                  f"see what: python data.py CONFIG --show={rules[0]}")
