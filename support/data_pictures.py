"""What a report shows of a run's data: the funnel of each source, the mix, all counts."""

from corpus.funnel import funnel_rows, rules_that_acted
from support.files import read_json
from support.page import escaped, shares, table


def data_part(run):
    """HTML of what each curation rule kept and dropped of each source, and of the sources' tokens.
    """
    if not (run / "manifest.json").is_file():
        return ["<p class=note>The run has no manifest.json: its data is not known.</p>"]
    manifest = read_json(run / "manifest.json")
    try:
        sources = manifest["sources"]
        if not sources:
            return [f"<p>{len(manifest['shards'])} ready token files</p>"]
        (_, names), *rows = funnel_rows(sources)
        counts = table(["", *names], [[label, *cells] for label, cells in rows])
        funnels = []
        tokens = {}
        for name, source in sources.items():
            funnels.append(funnel(name, source))
            tokens[name] = source["mix_tokens"]
        return [
            f"<div class=grid>{''.join(funnels)}</div>",
            "<h3>Tokens of the mix</h3>",
            shares(tokens, "tokens"),
            f"<details><summary>All counts</summary>{counts}</details>"]
    except (KeyError, TypeError, AttributeError, ValueError):
        return ["<p class=note>manifest.json is not in the form of this version.</p>"]


def funnel(name, source):
    """A source's documents as a funnel: a bar for what is left after each rule that dropped any."""
    left = source["documents in"]
    widest = max(1, left)
    stages = [(f"{left:,} read", left)]
    for rule in rules_that_acted({name: source}):
        dropped = source["by_rule"][rule].get("dropped", 0)
        if dropped:
            left -= dropped
            stages.append((f"{left:,} left: {rule} dropped {dropped:,}", left))
    held_out = source.get("held-out documents", 0)
    if held_out:
        left = source.get("documents", left - held_out)  # of a single one, both parts count
        stages.append((f"{left:,} left: {held_out:,} are held out", left))
    lines = [f"<figure><h3>{escaped(name)}, documents</h3>"]
    for said, count in stages:
        width = f"{100 * count / widest:.2f}%"
        lines.append(f"<div class=stage>{escaped(said)}"
                     f"<i style='width:{width}' aria-hidden=true></i></div>")
    return "".join(lines) + "</figure>"
