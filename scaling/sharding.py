"""One function puts FSDP2, recomputation and compiled blocks on a model, from outside."""

import functools
import os
import types
import warnings
from contextlib import contextmanager

import torch
import torch._functorch.config as functorch_config
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import (CheckpointPolicy, checkpoint,
                                    create_selective_checkpoint_contexts)

from model import Block, token_losses
from scaling.ranks import world_size
from support.cpu import PLAIN_AT_MOST, use_fast_attention


def shard_model(model, config, device, dtype, compiled):
    """Make an OLMo on the meta device ready for training on `device`: empty, and in this order.

    Recomputation goes inside of the compiled region, so that the compiler plans it; FSDP's hooks
    stay outside, where they can gather a block's weights just before it and free them after.
    Weights, gradients' sums and optimiser are float32 slices; a block gathered is `dtype`.
    """
    model.compute_dtype = dtype
    if device.type == "cpu":
        use_fast_attention(model)
    checkpoint_activations(model, config.activation_checkpointing)
    if compiled:
        compile_model(model, device)
    if dist.is_initialized():
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)  # RoPE's table stays float32
        mesh = build_mesh(config.shard, device)
        for module in (*model.blocks, model):  # the root, last, takes embedding and head
            fully_shard(module, mesh=mesh, mp_policy=policy)
        # It warns that nobody may write into the losses, a view, in place; nobody does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    return model.to_empty(device=device)


@contextmanager
def evaluating(model):
    """For forwards without a backward: eager, as their shapes vary, and the weights split again."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield
    if isinstance(model, FSDPModule):
        model.reshard()  # subtle: a forward without a backward leaves the root gathered


def build_mesh(shard, device):
    """All ranks in a row, or for hybrid sharding a row of ranks for each node."""
    if shard == "all":
        return init_device_mesh(device.type, (world_size(),))
    node = int(os.environ["LOCAL_WORLD_SIZE"])
    return init_device_mesh(device.type, (world_size() // node, node),
                            mesh_dim_names=("replicate", "shard"))


CHECKPOINTED_BLOCKS = {"none": 0, "one_in_four": 4, "one_in_three": 3, "one_in_two": 2,
                       "fine_grained": 1, "whole_layer": 1}  # one in so many


def checkpoint_activations(model, policy):
    """Let blocks keep their input alone, or with fine_grained the two big projections too."""
    every = CHECKPOINTED_BLOCKS[policy]
    options = dict(use_reentrant=False, preserve_rng_state=False)  # there is no dropout
    if policy == "fine_grained":
        widths = {3 * model.config.d_model, 2 * model.config.mlp_hidden_size}

        def keep_wide_products(context, op, *args, **kwargs):
            wide = op == torch.ops.aten.mm.default and args[1].shape[1] in widths
            return CheckpointPolicy.MUST_SAVE if wide else CheckpointPolicy.PREFER_RECOMPUTE
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts,
                                                  keep_wide_products)

    def forward(block, *args):  # one function for all blocks, so that it compiles once
        return checkpoint(lambda *inputs: Block.forward(block, *inputs), *args, **options)
    for block in model.blocks[::every] if every else ():
        block.forward = types.MethodType(forward, block)


def compile_model(model, device):
    """Compile each block, and the head with its loss.

    # subtle: the embedding stays outside: its compiled gradient adds up atomically, in any order,
    # and a resumed run could not be bit-exact. Nor could it with one kernel for all lengths, once a
    # second one has come.
    """
    if device.type == "cpu":
        # What takes no matrix product is computed anew in the backward, inside of its kernels: 0.7
        # to 0.8 times the memory in no more time (python -m tests.bench cpu). Not for long
        # sequences: SDPA would be computed anew as well. The setting is the whole process's.
        functorch_config.aggressive_recomputation = model.config.max_seq_len <= PLAIN_AT_MOST
    for block in model.blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
    model.token_losses = torch.compile(token_losses, dynamic=False)


def own_part(tensor, parameter):
    """Of a full tensor, what this rank holds of the parameter."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements,
                             src_data_rank=None)  # every rank has it: nothing is sent
