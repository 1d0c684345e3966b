"""Sharding (FSDP2) and recomputation, put on a model from outside by one function.

model.py knows nothing of them. What they need while training (a slice, a sum over ranks) is below.
"""

import functools
import sys
import types
import warnings
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import (CheckpointPolicy, checkpoint,
                                    create_selective_checkpoint_contexts)

from scaling.compiler import compile_model
from scaling.ranks import launched, world_size
from support.bars import bar, stage
from support.cpu import only_of_targets, use_fast_attention
from support.files import UserError
from support.generation import fixed_weights
from support.gpu import use_flex_attention


# ---- Applied to a new model, in this order -------------------------------------------------------

@stage("preparing the model")
def shard_model(model, config, device, dtype, compiled):
    """Make an OLMo on the meta device ready for training on `device`; its weights are still empty.

    The order matters. Recomputation goes inside the compiled region, so that the compiler plans it.
    FSDP's hooks stay outside it: they gather a block's weights just before the block runs and free
    them after it. Each rank keeps float32 slices of weights, gradients and optimiser state, and a
    gathered block is cast to `dtype` (paper, section 3.1).
    """
    model.compute_dtype = dtype
    if device.type == "cpu":
        use_fast_attention(model)
    elif device.type == "cuda" and compiled:
        use_flex_attention(model)
    checkpoint_activations(model, config.activation_checkpointing)
    if compiled:
        compile_model(model, device, is_asked=config.compile == "true")
    if device.type == "cpu":
        model.token_losses = only_of_targets(model.token_losses)
    if dist.is_initialized():
        apply_fsdp(model, build_mesh(config.shard, device), dtype)
        model.reduce_every_micro_batch = config.reduce_every_micro_batch
    return model.to_empty(device=device)


def checkpoint_activations(model, policy):
    """Make some blocks recompute in the backward what they would otherwise keep in memory.

    A recomputing block keeps its input alone; with fine_grained also the results of its two large
    projections, which are the dearest to compute again.
    """
    interval = CHECKPOINTED_BLOCKS[policy]
    if not interval:
        return
    options = {"use_reentrant": False, "preserve_rng_state": False}  # no dropout, no random state
    if policy == "fine_grained":
        keep = functools.partial(keep_large_projections, large_projections(model.blocks[0]))
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep)

    def forward(block, *args):  # one function for all blocks, so that it compiles once
        return checkpoint(lambda *inputs: type(block).forward(block, *inputs), *args, **options)
    for block in model.blocks[::interval]:
        block.forward = types.MethodType(forward, block)


CHECKPOINTED_BLOCKS = {"none": 0, "one_in_four": 4, "one_in_three": 3, "one_in_two": 2,
                       "fine_grained": 1, "whole_layer": 1}  # every how many blocks one recomputes


def large_projections(block):
    """The shapes (D_in, D_out) of the weights whose products fine_grained keeps."""
    return {(module.in_features, module.out_features) for module
            in (block.attn.att_proj, block.mlp.ff_proj)}


def keep_large_projections(shapes, context, op, *args, **kwargs):
    """Recomputation's policy: keep the results of matrix products with weights of these shapes."""
    if op == torch.ops.aten.mm.default and tuple(args[1].shape) in shapes:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def apply_fsdp(model, mesh, dtype):
    """Split every parameter over the ranks (FSDP2): a unit per block, and one for the rest."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)  # RoPE's table stays float32
    for module in (*model.blocks, model):  # the root comes last: it takes embedding and head
        fully_shard(module, mesh=mesh, mp_policy=policy)
        # Gradients are summed over the ranks, because train_step divides by the global count.
        # (FSDP's default is the mean.) gloo knows no scaled sum, hence the second line.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # FSDP warns against writing in place into an output that is a view; nobody does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")


def build_mesh(shard, device):
    """The device mesh: all ranks in one row, or for shard="hybrid" one row of ranks per node."""
    if shard == "all":
        return init_device_mesh(device.type, (world_size(),))
    per_node = launched().ranks_per_node
    if not per_node or world_size() % per_node:
        raise UserError(f"shard=hybrid: {world_size()} ranks, LOCAL_WORLD_SIZE={per_node}: every "
                        "node must have as many ranks, as torchrun --nproc_per_node=N starts them")
    shape = (world_size() // per_node, per_node)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


# ---- Used while training -------------------------------------------------------------------------

def own_part(full, parameter):
    """The slice of tensor `full` that this rank stores of a sharded parameter; else all of it."""
    if not isinstance(parameter, DTensor):
        return full
    return distribute_tensor(full, parameter.device_mesh, parameter.placements,
                             src_data_rank=None)  # every rank has all of it: nothing is sent


def init_own_parts(init_weights, model, seed):
    """init_weights(model, seed, own_part), with a bar: those of a 7B are minutes of work."""
    with bar(None, "drawing the weights", len(list(model.parameters())), "tensors") as shown:
        def part(full, parameter):
            shown.update()
            return own_part(full, parameter)
        init_weights(model, seed, part)


def own_slice(tensor):
    """Returns (first, rows): the rows that this rank stores of a sharded tensor, and the number of
    the first of them; (0, all of it) of a tensor that is not sharded.
    """
    if not isinstance(tensor, DTensor):
        return 0, tensor.detach()
    numbers = own_part(torch.arange(len(tensor)), tensor).to_local()  # FSDP's rule, asked itself
    first = numbers[0].item() if len(numbers) else 0  # a rank may have none
    return first, tensor.detach().to_local()


def sync_gradients(model, is_last):
    """Let FSDP sum the gradients over the ranks in the backward of the last micro-batch alone.

    With reduce_every_micro_batch, as in OLMo's runs, in every backward: slower, with less memory.
    """
    if isinstance(model, FSDPModule):
        # subtle: it takes effect when the forward begins; set before backward() it is too late
        model.set_requires_gradient_sync(is_last or model.reduce_every_micro_batch)


def full_tensor(tensor):
    """The complete value, on every rank, of a result that FSDP may have split over them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def evaluating(model):
    """Around forwards without a backward: no gradient, and no compilation, as their shapes vary.

    The weights must not change within; they are cast once (support/generation.py).
    """
    # torch.compile imports torch._dynamo. If nobody has, nothing is compiled, and set_stance would
    # only import it, which takes a second or two.
    eager = nullcontext()
    if "torch._dynamo" in sys.modules:
        eager = torch.compiler.set_stance("force_eager")
    with torch.no_grad(), eager, fixed_weights(model):
        yield
    if isinstance(model, FSDPModule):
        model.reshard()  # subtle: a forward without a backward leaves the root's weights gathered
