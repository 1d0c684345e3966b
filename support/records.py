"""What an evaluation leaves behind: tables, rows of eval.jsonl, the verdict on contamination."""

import json
import math

from corpus.dedup import searchable_lines
from corpus.lineage import manifests_behind
from support.files import UserError
from support.tasks import METRICS


def bits_per_byte(sums):
    """Total bits over total raw bytes; nan where there are none."""
    return sums["nats"] / math.log(2) / sums["bytes"] if sums["bytes"] else math.nan


def pooled(results):
    """The sums of several domains as those of one."""
    return {key: sum(sums[key] for sums in results) for key in ("documents", "tokens", "bytes",
                                                                "nats")}


def summed_up(results):
    """(sums, mean bits per byte) of {domain or domain/part: sums}; Paloma reports both.

    Of a domain with parts the parts count. None where there is nothing to sum up.
    """
    leaves = [sums for name, sums in results.items()
              if not any(other.startswith(f"{name}/") for other in results)]
    if len(leaves) > 1:
        return pooled(leaves), sum(map(bits_per_byte, leaves)) / len(leaves)
    return None


def domains_table(results):
    """The lines of a table of {domain or domain/part: sums}, summed up below."""
    if not results:
        return "there is no held-out text"
    wide = max(14, *(len(name) + 1 for name in results))
    lines = [f"{'domain':<{wide}}{'documents':>10}{'tokens':>12}{'KB':>10}"
             f"{'nats/token':>12}{'bits/byte':>11}"]
    rows, both = dict(results), summed_up(results)
    if both:
        rows["(pooled)"] = both[0]
    for name, sums in rows.items():
        nats = sums["nats"] / max(1, sums["tokens"])
        lines.append(f"{name:<{wide}}{sums['documents']:>10,}{sums['tokens']:>12,}"
                     f"{sums['bytes'] / 1e3:>10,.1f}{nats:>12.4f}{bits_per_byte(sums):>11.4f}")
    if both:
        lines.append(f"{'(macro)':<{wide}}{both[1]:>55.4f}")
    return "\n".join(lines)


def tasks_table(results):
    """The lines of a table of {task: result}, accuracies in percent; then of sets without choices.

    The average is over the tasks, as in the paper's table 3.
    """
    ranked = {name: result for name, result in results.items() if "accuracy" in result}
    others = {name: result for name, result in results.items() if name not in ranked}
    wide = 2 + max(map(len, results), default=0)
    lines = []
    if ranked:
        lines.append(f"{'task':<{wide}}{'questions':>9}{'accuracy':>10}{'+-':>6}{'chance':>8}"
                     f"{'centred':>9}  {'by':<13}" + "".join(
                         f"{name.removeprefix('acc_'):>10}" for name in METRICS)
                     + f"{'bits/byte':>11}")
    for name, row in ranked.items():
        beside = "".join(f"{100 * row[metric]:>10.1f}" if metric in row else f"{'-':>10}"
                         for metric in METRICS)
        lines.append(f"{name:<{wide}}{row['questions']:>9,}{100 * row['accuracy']:>10.1f}"
                     f"{100 * row['stderr']:>6.1f}{100 * row['chance']:>8.1f}"
                     f"{100 * row['centred']:>9.1f}  {row['metric']:<13}{beside}"
                     f"{row['bits_per_byte']:>11.4f}")
    if len(ranked) > 1:
        means = [100 * sum(row[key] for row in ranked.values()) / len(ranked)
                 for key in ("accuracy", "chance", "centred")]
        lines.append(f"{'average':<{wide}}{means[0]:>19.1f}{means[1]:>14.1f}{means[2]:>9.1f}")
    if others:
        lines.append(f"{'set':<{wide}}{'answers':>9}{'bits/byte':>11}{'greedy %':>10}")
    lines += [f"{name:<{wide}}{row['questions']:>9,}{row['bits_per_byte']:>11.4f}"
              f"{100 * row['greedy']:>10.1f}" for name, row in others.items()]
    lines += [f"{name}: {row['cut']:,} of {row['requests']:,} requests exceed the model's context "
              "and lost their beginning" for name, row in results.items() if row["cut"]]
    lines += [f"{name}: {row['too_long']:,} of {row['questions']:,} right answers exceed it by "
              "themselves; bits/byte leaves them out"
              for name, row in results.items() if row["too_long"]]
    return "\n".join(lines)


def evaluation_key(suite, config, dtype):
    """What, besides the weights, a result of a suite depends on: equal keys, equal results."""
    own = ({"limit": config.limit, "metric": config.metric, "chat": config.chat} if suite.tasks
           else {"subdomain": config.subdomain})
    return {"suite": suite.name, "dtype": dtype, **own,
            "files": list(suite.digests)}


def decontaminated(manifests, files, digests):
    """(whether the data of all manifests was searched for files of these SHA-256, why or not).

    Of code sources it is not asked (Paloma, sec. 3.1).
    """
    if not files:
        return False, "it holds no file"
    for manifest in manifests:
        sources = [(name, source) for name, source in manifest["sources"].items()
                   if "code_extension" not in source["rules"]]
        if not sources:
            return False, "a manifest names no source that was searched"
        for name, source in sources:
            searched = {digest for searched_for in source["decontaminated"]
                        for digest in manifest["evaluation_files"][searched_for]}
            if not digests <= searched:
                return False, (f"the source {name} was not searched for it (decontaminate in the "
                               "config)")
    found, lines = searchable_lines(tuple(files))
    if not found:
        return False, f"it has no line of 13 words; its {lines:,} shorter ones are not searched for"
    return True, (f"documents with one of its lines of 13 words or more, {found:,} of {lines:,}, "
                  "were left out, code aside")


def verdict_on(suite, of, run, state):
    """(whether a suite may be called decontaminated of a step, a sentence on it)."""
    try:
        manifests = list(manifests_behind(run, state))
    except UserError as error:
        return False, f"not decontaminated: {error}"
    verdict, why = decontaminated(manifests, suite.files(), set(of["files"]))
    said = f"{'' if verdict else 'not '}decontaminated: {why}"
    if suite.name == "domains" and len({manifest["sha256"] for manifest in manifests}) == 1:
        said = (f"held out of the training data as whole documents, {'and' if verdict else 'but'} "
                + said)
    return verdict, said


def record(run, kind, state, **row):
    """Append a row to RUN/eval.jsonl; in one write, as several evaluations may run at once."""
    row = {"kind": kind, "step": state["step"], "tokens": state["tokens"],
           "weights": state["sha256"], **row}
    with open(run / "eval.jsonl", "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        torn = file.read() not in (b"", b"\n")  # by a crash
        file.write(("\n" * torn + json.dumps(row) + "\n").encode())
