"""What a class changes first works in a copy of the code with a patch of a few lines.

Each test copies the code, patches it, and runs the copy in this process: 3 steps of training, the
last one again from a checkpoint, eval.py and export.
"""

import importlib
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, random_ids, random_model, small_config
from test_checkpoint import same_tensors, tensors_of
from torch.utils._python_dispatch import TorchDispatchMode

import train
from support.weights import save_hf

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
FOLDERS = ("configs", "corpus", "scaling", "support")
MODULES = ("model", "data", "train", "eval", "adapt")


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """fork(changes, new={}): the modules of a patched copy, in place of ours until the test ends.

    changes: {file: {text that is there once: new text}}; new: {file: content}.
    """
    folder = tmp_path / "fork"

    def make(changes, new=()):
        for name in FOLDERS:
            shutil.copytree(ROOT / name, folder / name)
        for name in MODULES:
            shutil.copy(ROOT / f"{name}.py", folder)
        for file, content in dict(new).items():
            (folder / file).write_text(content)
        for file, replacements in changes.items():
            text = (folder / file).read_text()
            for old, replacement in replacements.items():
                assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
                text = text.replace(old, replacement)
            (folder / file).write_text(text)
        return imported(folder, monkeypatch)
    yield make
    forget(folder)


def imported(folder, monkeypatch):
    """The modules of the code in a folder, in place of ours until the test ends; see forget."""
    for name in list(sys.modules):
        if name.split(".")[0] in (*FOLDERS, *MODULES):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder)
    modules = {name: importlib.import_module(name) for name in MODULES}
    assert Path(modules["train"].__file__).parent == folder
    return SimpleNamespace(**modules)


def forget(folder):
    """Take the modules below a folder out of sys.modules, so that ours can come back."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(folder)):
            del sys.modules[name]


def train_resume_and_evaluate(code, config, run):
    """Three steps; the last one again, from step 2, to the same bits; an evaluation."""
    code.train.main([str(config)])
    resume_again(code, run, "step000003")
    code.eval.main([str(run)])
    return tensors_of(run / "step000003")


def resume_again(code, run, last_step):
    """The last step is deleted, and a resumed run comes to the same bits."""
    tensors = tensors_of(run / last_step)
    shutil.rmtree(run / last_step)
    code.train.main([f"--resume={run}"])
    assert same_tensors(run / last_step, tensors)


def not_exported(code, run, *words):
    """Exporting the run is the user's error, which names `words`; nothing is written."""
    pytest.importorskip("safetensors")
    out = run.parent / "hf"
    with pytest.raises(ValueError) as caught:
        code.model.main(["export", str(run), str(out)])
    assert type(caught.value).__name__ == "UserError"
    assert all(word in str(caught.value) for word in words), caught.value
    assert not out.exists()


@pytest.fixture
def three_steps(tiny_config, tmp_path):
    """(config file, run directory) of a run of three steps that are all saved."""
    run = tmp_path / "run"
    return tiny_config(run, max_steps=3, warmup_steps=1, eval_every_steps=3, save_every_steps=1,
                       keep_last=3), run


NEW_KEY = {"model.py": {
    "    weight_tying: bool =": '    logit_scale: float = setting(1.0, "Factor of the logits.")\n'
                                "    weight_tying: bool =",
    "self.token_losses(x,": "self.config.logit_scale * self.token_losses(x,"}}


def test_a_new_key_with_a_default_reads_older_runs(fork, three_steps, copied, tmp_path):
    """In eval, export and resume; a value that is not the default stops the export."""
    pytest.importorskip("safetensors")
    code = fork(NEW_KEY)
    code.eval.main([str(copied)])
    code.model.main(["export", str(copied), str(tmp_path / "old")])
    assert (tmp_path / "old/model.safetensors").is_file()
    resume_again(code, copied, "step000020")
    config, run = three_steps
    config.write_text(config.read_text() + "logit_scale = 0.5\n")
    train_resume_and_evaluate(code, config, run)
    not_exported(code, run, "logit_scale=0.5")


LEARNED_GAIN = {"model.py": {
    "        self.mlp = SwiGLU(config)\n": "        self.mlp = SwiGLU(config)\n"
    "        self.gain = nn.Parameter(torch.empty(config.d_model))\n",
    "self.mlp(layer_norm(x))": "self.mlp(self.gain * layer_norm(x))"}}


def test_a_learned_gain_starts_at_one_trains_and_does_not_decay(fork, three_steps, tmp_path):
    pytest.importorskip("safetensors")
    config, run = three_steps
    save_hf(random_model(), tmp_path / "without")
    code = fork(LEARNED_GAIN)
    model = code.model.build_model(code.model.ModelConfig(), 0)
    gains = [block.gain for block in model.blocks]
    assert all(gain.eq(1).all() for gain in gains)
    optimizer = code.train.build_optimizer(model, code.train.TrainConfig(weight_decay=0.3))
    decays = {id(parameter): group["weight_decay"] for group in optimizer.param_groups
              for parameter in group["params"]}
    assert {decays[id(gain)] for gain in gains} == {0.0}
    tensors = train_resume_and_evaluate(code, config, run)
    gain = tensors["model.blocks.1.gain"]
    assert gain.ne(1).any() and (gain - 1).abs().max() < 0.1
    not_exported(code, run, "hf: not written", "unexpected blocks.0.gain", "blocks.1.gain")
    with pytest.raises(ValueError, match="missing blocks.0.gain"):
        importlib.import_module("support.weights").load_model(tmp_path / "without")


GROUPED_QUERIES = {  # one head of keys and values for two of queries
    "Linear(config.d_model, 3 * config.d_model)": "Linear(config.d_model, 2 * config.d_model)",
    "view(B, T, 3 * H, -1)": "view(B, T, 2 * H, -1)",
    "heads.split((2 * H, H), dim=1)": "heads.split((H + H // 2, H // 2), dim=1)",
    "cos, sin).chunk(2, dim=1)": "cos, sin).split((H, H // 2), dim=1)",
    "        if cache is not None:\n": "        k = k.repeat_interleave(2, dim=1)\n"
    "        v = v.repeat_interleave(2, dim=1)\n        if cache is not None:\n"}
QK_NORM = {"self.rotate(queries_and_keys, cos, sin)":
           "self.rotate(layer_norm(queries_and_keys), cos, sin)"}
NORM_BEHIND = {"x = x + self.attn(layer_norm(x), cos, sin, attn_mask, cache)":
               "x = x + layer_norm(self.attn(x, cos, sin, attn_mask, cache))"}


@pytest.mark.parametrize("changes, words", [
    (GROUPED_QUERIES, ["blocks.0.attn.att_proj.weight", "(64, 32)", "(96, 32)"]),
    # These have the tensors of OLMo 1.0: only the logits tell that transformers differs.
    (QK_NORM, ["logits"]), (NORM_BEHIND, ["logits"])],
    ids=["grouped queries", "QK-norm", "a norm behind the attention"])
def test_another_attention_trains_and_stops_at_the_export(fork, three_steps, transformers, changes,
                                                          words):
    code = fork({"model.py": changes})
    train_resume_and_evaluate(code, *three_steps)
    not_exported(code, three_steps[1], "hf: not written", *words)


class CountProducts(TorchDispatchMode):
    """Counts the matrix products that are computed."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, GROUPED_QUERIES], ids=["OLMo", "grouped queries"])
def test_fine_grained_keeps_the_large_projections_of_any_width(fork, changes):
    """A block recomputes q, k, v, the attention's output and the MLP's input; or the second alone.

    Nothing of the backward needs the MLP's output: it is not computed again.
    """
    code = fork({"model.py": changes})
    sharding = importlib.import_module("scaling.sharding")
    products = {}
    for policy in ("none", "fine_grained", "whole_layer"):
        model = code.model.build_model(code.model.ModelConfig(**vars(small_config())), 0)
        sharding.checkpoint_activations(model, policy)
        with CountProducts() as counter:
            model(random_ids(2, 9), random_ids(2, 9)).sum().backward()
        products[policy] = counter.count
    blocks = len(model.blocks)
    assert products["fine_grained"] - products["none"] == blocks
    assert products["whole_layer"] - products["none"] == 3 * blocks


DOCUMENT_MASK = {
    "data.py": {'return {"tokens": tokens, "targets": targets, "loss_mask": loss_mask}':
                'ends = (tokens == self.shards.eos_token_id).long()\n'
                '        documents = ends.cumsum(1) - ends\n'
                '        return {"tokens": tokens, "targets": targets, "loss_mask": loss_mask,\n'
                '                "documents": documents}'},
    "train.py": {'model(batch["tokens"], targets=batch["targets"])':
                 'model(batch["tokens"], targets=batch["targets"], attn_mask=(\n'
                 '        batch["documents"][:, :, None] == batch["documents"][:, None])'
                 '.tril()[:, None])'}}


def test_a_document_mask_is_a_change_in_one_place(fork, three_steps):
    """The batch numbers its documents; what a document's loss is does not depend on the others."""
    code = fork(DOCUMENT_MASK)
    config, run = three_steps
    train_resume_and_evaluate(code, config, run)
    model = code.model.build_model(code.model.ModelConfig(**vars(small_config())), 0)
    check_second_document(code, model, eos_token_id=49)


def check_second_document(code, model, eos_token_id):
    """The losses of a window's second document are those that it has alone."""
    tokens = random_ids(1, 12, high=49)
    tokens[0, 5] = eos_token_id  # EOS belongs to the document that it ends
    batches = object.__new__(code.data.Batches)
    batches.batch_size = 1
    shards = type("Shards", (list,), {"eos_token_id": eos_token_id})
    batches.shards = shards([tokens[0].numpy()])
    batches.instances = lambda step: [0]
    batch = batches(1)
    assert batch["documents"].tolist() == [[0] * 6 + [1] * 6]
    batch["loss_mask"][:, :6] = False
    summed, _ = code.train.pretraining_loss(model, batch)
    alone = model(tokens[:, 6:-1], targets=tokens[:, 7:]).sum()
    assert torch.allclose(summed, alone, rtol=1e-5)


LION = '''
import torch


class Lion(torch.optim.Optimizer):
    """Lion (arXiv 2302.06675): the sign of a mix of momentum and gradient."""

    def __init__(self, groups, lr, betas):
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                update = momentum.lerp(p.grad, 1 - beta1).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
                momentum.lerp_(p.grad, 1 - beta2)
'''


LION_CHANGE = {"train.py": {
    "torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2),\n"
    "                                  eps=config.eps, fused=fused)":
    "Lion(groups, lr=config.lr, betas=(config.beta1, config.beta2))",
    "import torch\n": "import torch\nfrom lion import Lion\n"}}


def test_another_optimizer_is_one_line(fork, three_steps, capsys):
    """Lion has one state a weight where AdamW has two: checkpoints and --plan say so."""
    code = fork(LION_CHANGE, {"lion.py": LION})
    plans = []
    for module in (train, code.train):
        capsys.readouterr()
        module.main([str(ROOT / "configs/olmo_1b.py"), "--plan"])
        plans.append(capsys.readouterr().out)
    assert plans[0] != plans[1]
    tensors = train_resume_and_evaluate(code, *three_steps)
    kinds = {name.rsplit(".", 1)[1] for name in tensors if name.startswith("optimizer.")}
    assert kinds == {"momentum"}
    assert tensors["optimizer.lm_head.weight.momentum"].ne(0).any()
