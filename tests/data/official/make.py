"""Train a small model with official OLMo on the CPU; save it unsharded at step 10 and go on to 20.

    python -m venv ENV && ENV/bin/pip install torch==2.13.0 numpy omegaconf rich requests packaging
    ENV/bin/pip install --no-deps ai2-olmo==0.2.5 safetensors tokenizers pyyaml \
        antlr4-python3-runtime==4.9.3
    ENV/bin/python tests/data/official/make.py OUT [--tied] [--tokens | --cosine] [--restore]

The loop, the optimiser, the scheduler, the batches and the checkpointer are official OLMo's own;
the lines that put them together are those of its scripts/train.py. What OLMo imports and never
calls here is stubbed, and torch.cuda's calls are taken by the CPU. OUT/ holds:

    tokens-0.npy tokens-1.npy   token files without a header, uint16
    step10-unsharded/           model.pt, optim.pt, train.pt, config.yaml
    train_data/                 the order of the last epoch's instances, which OLMo keeps there
    run.json                    losses, learning rates and batches of steps 1 to 20
    step20.pt                   the weights after step 20
"""

import json
import os
import shutil
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # before the stubs: it looks for sklearn
import torch.distributed as dist

STUBBED = ("wandb", "torchmetrics", "boto3", "botocore", "botocore.config", "botocore.exceptions",
           "datasets", "sklearn", "sklearn.metrics", "google", "google.cloud", "google.api_core",
           "google.api_core.exceptions", "cached_path")


class Empty(Exception):
    """Stands for any class: a client of S3, a metric, an error."""

    def __init__(self, *arguments, **options):
        pass

    def __getattr__(self, name):
        return lambda *arguments, **options: None


class Stub(types.ModuleType):
    """A module in which any name is the class Empty; wandb.run is None: no run is logged there."""

    __path__ = ()
    run = None

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Empty


def stub():
    for name in STUBBED:
        sys.modules[name] = Stub(name)
    sys.modules["cached_path"].cached_path = Path  # a local file is where it is
    torch.cuda.get_rng_state = torch.get_rng_state
    torch.cuda.set_rng_state = lambda state: None
    torch.load = partial(torch.load, weights_only=False)  # the default of torch 2.1


def main(out, options):
    out = Path(out).resolve()
    shutil.rmtree(out / "run", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)  # so that no path of this machine is saved
    out = Path()
    stub()
    write_tokens(out)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517", RANK="0", WORLD_SIZE="1",
                      LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", NODE_RANK="0", FS_LOCAL_RANK="0")
    dist.init_process_group("gloo")
    trainer, record = make_trainer(config(options))
    restore = "--restore" in options
    if restore:  # what official OLMo itself makes of the checkpoint
        trainer.restore_checkpoint(out / "step10-unsharded")
    trainer.fit()
    if restore:
        print(json.dumps(record))
        return
    (out / "run.json").write_text(json.dumps(record))
    saved = out / "run"
    shutil.copyfile(saved / "step20-unsharded" / "model.pt", out / "step20.pt")
    shutil.rmtree(out / "step10-unsharded", ignore_errors=True)
    (saved / "step10-unsharded").rename(out / "step10-unsharded")
    shutil.copytree(saved / "train_data", out / "train_data", dirs_exist_ok=True)
    shutil.rmtree(saved)


def write_tokens(out):
    """Two files: 41 and 17 instances of 16 tokens, and some tokens that fill none."""
    dice = np.random.Generator(np.random.PCG64(7))
    for number, count in enumerate((41 * 16 + 5, 17 * 16 + 2)):
        ids = dice.zipf(1.5, count) % 290
        ids.astype(np.uint16).tofile(out / f"tokens-{number}.npy")


def config(options):
    """14 steps an epoch (56 of 58 instances): step 15 begins the second one."""
    from olmo.config import TrainConfig
    scheduler = dict(name="linear_with_warmup", units="steps", t_warmup=12, alpha_f=0.1)
    if "--tokens" in options:  # a schedule that counts tokens, 64 a step
        scheduler.update(units="tokens", t_warmup=12 * 64)
    if "--cosine" in options:
        scheduler.update(name="cosine_with_warmup", t_warmup=5, t_max=18, alpha_f=0.2,
                         grad_clip_warmup_steps=12, grad_clip_warmup_factor=0.4)
    return TrainConfig.new(
        run_name="small", seed=6198, epoch=None, save_folder="run", save_overwrite=True,
        model=dict(d_model=8, n_heads=2, n_layers=1, mlp_hidden_size=32,
                   weight_tying="--tied" in options, alibi=False, rope=True,
                   flash_attention=False, attention_dropout=0.0,
                   residual_dropout=0.0, embedding_dropout=0.0, attention_layer_norm=False,
                   multi_query_attention=False, include_bias=False, block_type="sequential",
                   layer_norm_type="default", layer_norm_with_affine=False,
                   bias_for_layer_norm=False, attention_layer_norm_with_affine=False,
                   activation_type="swiglu", max_sequence_length=16, vocab_size=300,
                   embedding_size=304, eos_token_id=299, pad_token_id=298, init_device="cpu",
                   init_fn="mitchell"),
        optimizer=dict(name="adamw", learning_rate=0.02, weight_decay=0.1, betas=[0.9, 0.95]),
        scheduler=scheduler,
        data=dict(paths=["tokens-0.npy", "tokens-1.npy"], drop_last=True),
        tokenizer=dict(identifier="small.json"), max_duration="2ep", stop_at=20,
        global_train_batch_size=4, device_train_microbatch_size=2, precision="fp32",
        max_grad_norm=1.0, save_interval=1000, save_num_checkpoints_to_keep=0,
        save_interval_unsharded=10, save_num_unsharded_checkpoints_to_keep=-1, time_limit=None,
        fsdp=dict(precision="mixed"), save_data_indices=False, console_log_interval=1)


def make_trainer(cfg):
    """What scripts/train.py puts together, and a record that grows with each step."""
    from olmo.data import build_train_dataloader
    from olmo.model import Olmo
    from olmo.optim import build_optimizer, build_scheduler
    from olmo.torch_util import seed_all
    from olmo.train import Trainer
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    device = torch.device("cpu")
    cfg.model.precision = cfg.precision
    cfg.device_train_batch_size = cfg.global_train_batch_size
    cfg.device_train_grad_accum = cfg.global_train_batch_size // cfg.device_train_microbatch_size
    seed_all(cfg.seed)
    loader = build_train_dataloader(cfg)
    model = Olmo(cfg.model)
    fsdp_model = FSDP(model, sharding_strategy=cfg.fsdp.sharding_strategy,
                      mixed_precision=cfg.fsdp_precision, use_orig_params=True,
                      limit_all_gathers=True, device_id=device)
    optim = build_optimizer(cfg, fsdp_model)
    record = dict(loss=[], lr=[], batch=[])

    class Recorded(Trainer):
        def train_step(self, batch, reduce_global_loss=True):
            metrics = super().train_step(batch, reduce_global_loss)
            record["loss"].append(metrics["train/CrossEntropyLoss"])
            record["lr"].append(self.optim.param_groups[0]["lr"])
            record["batch"].append([int(index) for index in batch["index"]])
            return metrics

    return Recorded(cfg=cfg, epoch=cfg.epoch, model=model, fsdp_model=fsdp_model, optim=optim,
                    scheduler=build_scheduler(cfg), train_loader=loader, device=device,
                    evaluators=[]), record


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
