"""What an evaluation leaves behind: tables, rows of eval.jsonl, the verdict on contamination."""

import json
import math

from corpus.dedup import searchable_lines
from corpus.lineage import manifests_behind
from support.files import UserError, log_rows, read_json
from support.tasks import METRICS


# ---- Bits per byte -------------------------------------------------------------------------------

def bits_per_byte(sums):
    """Total bits / total raw bytes, never a mean over documents; nan where there are no bytes."""
    if not sums["bytes"]:
        return math.nan
    return sums["nats"] / math.log(2) / sums["bytes"]


def pooled(results):
    """The sums of several domains, added up."""
    total = {"documents": 0, "tokens": 0, "bytes": 0, "nats": 0}
    for sums in results:
        for key in total:
            total[key] += sums[key]
    return total


def summed_up(results):
    """(pooled sums, mean bits per byte) of {domain or domain/part: sums}; None for fewer than two.

    Paloma reports both: the first weighs bytes equally, the second domains. If a domain has parts,
    only those are counted.
    """
    leaves = []
    for name, sums in results.items():
        has_parts = any(other.startswith(f"{name}/") for other in results)
        if not has_parts:
            leaves.append(sums)
    if len(leaves) < 2:
        return None
    mean = sum(map(bits_per_byte, leaves)) / len(leaves)
    return pooled(leaves), mean


# ---- Tables --------------------------------------------------------------------------------------

def domains_table(results):
    """A table of {domain or domain/part: sums}, with their pooled sums and mean below, as text."""
    if not results:
        return "there is no held-out text"
    longest = max(len(name) for name in results)
    wide = max(14, longest + 1)
    head = f"{'documents':>10}{'tokens':>12}{'KB':>10}{'nats/token':>12}{'bits/byte':>11}"
    lines = [f"{'domain':<{wide}}{head}"]
    for name, sums in results.items():
        lines.append(domain_line(name, sums, wide))
    both = summed_up(results)
    if both:
        pooled_sums, mean = both
        lines.append(domain_line("(pooled)", pooled_sums, wide))
        lines.append(f"{'(macro)':<{wide}}{mean:>55.4f}")
    return "\n".join(lines)


def domain_line(name, sums, wide):
    kilobytes = sums["bytes"] / 1e3
    nats_per_token = sums["nats"] / max(1, sums["tokens"])
    return (f"{name:<{wide}}"
            f"{sums['documents']:>10,}"
            f"{sums['tokens']:>12,}"
            f"{kilobytes:>10,.1f}"
            f"{nats_per_token:>12.4f}"
            f"{bits_per_byte(sums):>11.4f}")


def tasks_table(results):
    """Tables of {task: result}, as text: tasks with choices, then sets without, then notes.

    Accuracies are in percent; their average is over the tasks, as in the paper's table 3.
    """
    wide = 2 + max(map(len, results), default=0)
    ranked = {name: row for name, row in results.items() if "accuracy" in row}
    unranked = {name: row for name, row in results.items() if "accuracy" not in row}
    lines = []
    if ranked:
        head = f"{'questions':>9}{'accuracy':>10}{'+-':>6}{'chance':>8}{'centred':>9}  {'by':<13}"
        for metric in METRICS:
            head += f"{metric.removeprefix('acc_'):>10}"
        lines.append(f"{'task':<{wide}}{head}{'bits/byte':>11}")
    for name, row in ranked.items():
        lines.append(task_line(name, row, wide))
    if len(ranked) > 1:
        lines.append(average_line(ranked.values(), wide))
    if unranked:
        lines.append(f"{'set':<{wide}}{'answers':>9}{'bits/byte':>11}{'greedy %':>10}")
    for name, row in unranked.items():
        lines.append(f"{name:<{wide}}"
                     f"{row['questions']:>9,}"
                     f"{row['bits_per_byte']:>11.4f}"
                     f"{100 * row['greedy']:>10.1f}")
    # Nothing is dropped silently: what does not fit into the context is counted.
    for name, row in results.items():
        if row["cut"]:
            lines.append(f"{name}: {row['cut']:,} of {row['requests']:,} requests exceed the "
                         "model's context and lost their beginning")
    for name, row in results.items():
        if row.get("shortened"):
            lines.append(f"{name}: {row['shortened']:,} of {row['questions']:,} questions exceed "
                         "the model's context and lost their last examples")
    for name, row in results.items():
        if row["too_long"]:
            lines.append(f"{name}: {row['too_long']:,} of {row['questions']:,} right answers "
                         "exceed the context by themselves; bits/byte leaves them out")
    return "\n".join(lines)


def task_line(name, row, wide):
    columns = ""
    for metric in METRICS:
        cell = f"{100 * row[metric]:.1f}" if metric in row else "-"
        columns += f"{cell:>10}"  # "-": a metric needs unconditional requests
    return (f"{name:<{wide}}"
            f"{row['questions']:>9,}"
            f"{100 * row['accuracy']:>10.1f}"
            f"{100 * row['stderr']:>6.1f}"
            f"{100 * row['chance']:>8.1f}"
            f"{100 * row['centred']:>9.1f}  "
            f"{row['metric']:<13}"  # which of the next columns the accuracy is
            f"{columns}"
            f"{row['bits_per_byte']:>11.4f}")


def average_line(rows, wide):
    line = f"{'average':<{wide}}"
    for key, width in (("accuracy", 19), ("chance", 14), ("centred", 9)):  # under their columns
        mean = sum(row[key] for row in rows) / len(rows)
        line += f"{100 * mean:>{width}.1f}"
    return line


# ---- eval.jsonl ----------------------------------------------------------------------------------

def evaluation_key(suite, config, dtype):
    """What a suite's result depends on, the weights aside: equal keys have equal results."""
    key = {"suite": suite.name, "dtype": dtype}
    if suite.tasks:
        key["limit"] = config.limit
        key["metric"] = config.metric
        # how a chat's answer begins: a number of another prompt is another number
        key["chat"] = config.chat and [task.answer_begins for task in suite.tasks]
    else:  # documents know no questions
        key["subdomain"] = config.subdomain
    key["files"] = suite.digests  # their content, not their names: a file may change
    return key


def dtype_name(model):
    """The dtype in which the model multiplies, such as bfloat16."""
    dtype = model.compute_dtype or model.wte.weight.dtype
    return str(dtype).removeprefix("torch.")


def sample_key(config):
    """What a sample depends on, the weights aside."""
    names = ("prompt", "max_new_tokens", "temperature", "top_p", "sample_seed", "eval_dtype")
    return {name: getattr(config, name) for name in names}


def keys_recorded(run, step):
    """The keys of what eval.jsonl has of the weights in a step directory."""
    weights = read_json(step / "state.json").get("sha256")
    rows = log_rows(run, "eval.jsonl")
    return [row.get("of") for row in rows if row.get("weights") == weights]


def record(run, kind, state, **row):
    """Append a row to RUN/eval.jsonl; in one write, as several evaluations may run at once."""
    row = {"kind": kind, "step": state["step"], "tokens": state["tokens"],
           "weights": state["sha256"], **row}
    line = json.dumps(row) + "\n"
    with open(run / "eval.jsonl", "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        last = file.read()
        if last not in (b"", b"\n"):  # a crash tore the last row
            line = "\n" + line
        file.write(line.encode())


# ---- Contamination -------------------------------------------------------------------------------

def verdict_on(suite, key, run, state):
    """(decontaminated, sentence): whether a step's training data may be called free of a suite."""
    try:
        manifests = list(manifests_behind(run, state))
    except UserError as error:
        return False, f"not decontaminated: {error}"  # what is not known is not claimed
    verdict, why = decontaminated(manifests, suite.files(), set(key["files"]))
    said = f"decontaminated: {why}" if verdict else f"not decontaminated: {why}"
    one_data_set = len({manifest["sha256"] for manifest in manifests}) == 1
    if suite.name == "domains" and one_data_set:
        word = "and" if verdict else "but"
        said = f"held out of the training data as whole documents, {word} {said}"
    return verdict, said


def decontaminated(manifests, files, digests):
    """(verdict, why): whether the data of every manifest was searched for a suite's files.

    digests: the files' SHA-256. Sources of code are not searched (Paloma, section 3.1).
    """
    if not files:
        return False, "it holds no file"
    for manifest in manifests:
        sources = {name: source for name, source in manifest["sources"].items()
                   if "code_extension" not in source["rules"]}
        if not sources:
            return False, "a manifest names no source that was searched"
        for name, source in sources.items():
            searched = set()
            for evaluation_set in source["decontaminated"]:
                searched.update(manifest["evaluation_files"][evaluation_set])
            if not digests <= searched:  # digests: a copy of the file is the same text
                return False, (f"the source {name} was not searched for it (decontaminate in the "
                               "config)")
    # Short lines are not searched for: they would remove documents that quote a common phrase.
    found, lines = searchable_lines(tuple(files))
    if not found:
        return False, f"it has no line of 13 words; its {lines:,} shorter ones are not searched for"
    return True, (f"documents with one of its lines of 13 words or more, {found:,} of {lines:,}, "
                  "were left out, code aside")
