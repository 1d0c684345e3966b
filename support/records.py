"""What an evaluation leaves behind: tables, rows of eval.jsonl, the verdict on contamination."""

import math

from corpus.dedup import searchable_lines
from corpus.lineage import manifests_behind
from support.files import UserError, log_rows, named_in_errors, read_json, to_json
from support.tasks import METRICS


# ---- Bits per byte -------------------------------------------------------------------------------

SUMS = ("documents", "tokens", "bytes", "nats")  # of a domain


def bits_per_byte(sums):
    """Total bits / total raw bytes, never a mean over documents; nan where there are no bytes."""
    return sums["nats"] / math.log(2) / sums["bytes"] if sums["bytes"] else math.nan


def pooled(results):
    """The sums of several domains, added up."""
    results = list(results)
    return {key: sum(sums[key] for sums in results) for key in SUMS}


def summed_up(results):
    """(pooled sums, mean bits per byte) of {domain or domain/part: sums}; None for fewer than two.

    Paloma reports both: the first weighs bytes equally, the second domains. If a domain has parts,
    only those are counted. The mean leaves out a domain whose documents are all empty.
    """
    leaves = []
    for name, sums in results.items():
        has_parts = any(other.startswith(f"{name}/") for other in results)
        if not has_parts:
            leaves.append(sums)
    if len(leaves) < 2:
        return None
    bits = [bits_per_byte(sums) for sums in leaves if sums["bytes"]]
    return pooled(leaves), sum(bits) / max(1, len(bits))


# ---- Tables --------------------------------------------------------------------------------------

def cell(value, form, scale=1):
    """A number as text, times `scale`; "-" for None, which a row of another version has, and NaN.
    """
    return "-" if value is None or math.isnan(value) else format(scale * value, form)


def aligned(rows, left):
    """Lines of rows of cells; columns are two spaces apart, and those of numbers `left` flush left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        line = ""
        for i, text in enumerate(row):
            line += text.ljust(widths[i] + 2) if i in left else text.rjust(widths[i]) + "  "
        lines.append(line.rstrip())
    return lines


def domains_table(results):
    """A table of {domain or domain/part: sums}, with their pooled sums and mean below, as text."""
    if not results:
        return "there is no held-out text"
    rows = [["domain", "documents", "tokens", "KB", "nats/token", "bits/byte"]]
    for name, sums in results.items():
        rows.append(domain_row(name, sums))
    both = summed_up(results)
    if both:
        pooled_sums, mean = both
        rows.append(domain_row("(pooled)", pooled_sums))
        rows.append(["(macro)", "", "", "", "", cell(mean, ".4f")])
    lines = aligned(rows, left=[0])
    for name, sums in results.items():
        if sums["bytes"] == 0:
            lines.append(f"{name}: its documents are all empty; (macro) leaves it out")
    return "\n".join(lines)


def domain_row(name, sums):
    nats_per_token = sums["nats"] / sums["tokens"] if sums["tokens"] else None
    return [name, f"{sums['documents']:,}", f"{sums['tokens']:,}", f"{sums['bytes'] / 1e3:,.1f}",
            cell(nats_per_token, ".4f"), cell(bits_per_byte(sums), ".4f")]


def tasks_table(results):
    """Tables of {task: result}, as text: tasks with choices, then sets without, then notes.

    Accuracies are in percent; their average is over the tasks, as in the paper's table 3.
    """
    ranked = {name: row for name, row in results.items() if "accuracy" in row}
    unranked = {name: row for name, row in results.items() if "accuracy" not in row}
    lines = []
    if ranked:
        rows = [["task", "questions", "accuracy", "+-", "chance", "centred", "by",
                 *[metric.removeprefix("acc_") for metric in METRICS], "bits/byte"]]
        rows += [task_row(name, row) for name, row in ranked.items()]
        if len(ranked) > 1:
            rows.append(average_row(ranked.values(), len(rows[0])))
        lines += aligned(rows, left=[0, 6])
    if unranked:
        rows = [["set", "answers", "bits/byte", "greedy %"]]
        for name, row in unranked.items():
            rows.append([name,
                         cell(row.get("questions"), ","),
                         cell(row.get("bits_per_byte"), ".4f"),
                         cell(row.get("greedy"), ".1f", 100)])
        lines += aligned(rows, left=[0])
    # Nothing is dropped silently: what does not fit into the context is counted.
    for key, of, said in LEFT_OUT:
        for name, row in results.items():
            if row.get(key):
                lines.append(f"{name}: {row[key]:,} of {cell(row.get(of), ',')} {said}")
    return "\n".join(lines)


LEFT_OUT = (  # key of a result, what it counts, what is said of it
    ("cut", "requests", "requests exceed the model's context and lost their beginning"),
    ("shortened", "questions", "questions exceed the model's context and lost their last examples"),
    ("too_long", "questions", "right answers exceed the context by themselves; bits/byte leaves "
                              "them out"))


def task_row(name, row):
    return [name,
            cell(row.get("questions"), ","),
            cell(row.get("accuracy"), ".1f", 100),
            cell(row.get("stderr"), ".1f", 100),
            cell(row.get("chance"), ".1f", 100),
            cell(row.get("centred"), ".1f", 100),
            row.get("metric", "-"),  # which of the next columns it is
            *[cell(row.get(metric), ".1f", 100) for metric in METRICS],
            cell(row.get("bits_per_byte"), ".4f")]


def average_row(rows, columns):
    """The mean over the tasks; "-" if one of them lacks the number."""
    line = ["average"] + [""] * (columns - 1)
    for column, key in ((2, "accuracy"), (4, "chance"), (5, "centred")):
        values = [row.get(key) for row in rows]
        mean = None if None in values else sum(values) / len(values)
        line[column] = cell(mean, ".1f", 100)
    return line


# ---- eval.jsonl ----------------------------------------------------------------------------------

def evaluation_key(suite, config, dtype):
    """What a suite's result depends on, the weights aside: equal keys have equal results."""
    key = {"suite": suite.name, "dtype": dtype}
    if suite.tasks:
        key["limit"] = config.limit
        key["metric"] = config.metric
        # how a chat's answers begin: a number of another prompt is another number
        begins = sorted({task.answer_begins for task in suite.tasks} - {""})
        key["chat"] = config.chat and (begins or True)
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
    line = to_json(row) + "\n"
    log = run / "eval.jsonl"
    with named_in_errors(log), open(log, "ab+") as file:
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
    try:
        verdict, why = decontaminated(manifests, suite.files(), set(key["files"]))
    except (KeyError, TypeError, AttributeError):
        verdict, why = False, "a manifest is not in the form of this version"
    said = f"decontaminated: {why}" if verdict else f"not decontaminated: {why}"
    one_data_set = len({manifest.get("sha256") for manifest in manifests}) == 1
    if suite.name == "domains" and one_data_set:
        said = f"held out of the training data; {said}"
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
                return False, (f"the text of {name} was not searched for copies of this text's "
                               "lines (decontaminate in the config does so); for comparing runs "
                               "on the same data this does not matter")
    # Short lines are not searched for: they would remove documents that quote a common phrase.
    found, lines = searchable_lines(tuple(files))
    if not found:
        return False, f"it has no line of 13 words; its {lines:,} shorter ones are not searched for"
    return True, (f"documents with one of its lines of 13 words or more, {found:,} of {lines:,}, "
                  "were left out, code aside")
