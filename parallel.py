"""Several processes that train one network: PyTorch's own engine, FSDP2, and what a training loop needs around it.

    net = parallel.shard(net)                   each process keeps a share of every weight, in float32
    for numbers, weight in parallel.passes(...) forward and backward, as many of them on every process
    with parallel.gathered(net): ...            the whole network on every process: to sample, to save

Started by torchrun; with one process all of this leaves the network as it is. A sharded layer's weights are gathered
just before it computes, in the model's dtype, and let go right after; gradients are averaged over the processes in
float32, each process getting its share. So weights, gradients and the optimizer's moments are divided by the number of
processes, and none of the three is anywhere whole. (Zhao et al. 2023, arXiv 2304.11277; Rajbhandari et al. 2020,
arXiv 1910.02054, stage 3.)

Only the network that is trained is sharded. Those that judge, or stand still as references, are whole on each process.
"""

import contextlib
import datetime
import gc
import math
import os
import re
import warnings

import torch
import torch.distributed as dist

import files
from flags import UserError


# ---------------------------------------------------------------------------------------------------------------------
# who is who, and what they tell each other


def set_by_torchrun(name, default=None):
    """The number in one of the environment variables by which torchrun tells each process who it is. Raises UserError
    where it holds something else."""
    text = os.environ.get(name, default)
    if not str(text).isdecimal():
        raise UserError(f"the environment variable {name} is {text}, no number; start with torchrun, or unset RANK and "
                        "WORLD_SIZE")
    return int(text)


class Ranks:
    """What the processes of a run share beside torch's default group, which sums gradients."""
    store = None        # torchrun's key-value store
    patient = None      # a group for objects and barriers: some may still be sampling when others arrive


def init_ranks(device, minutes=30.0):
    """(rank, number of ranks, this rank's device). One process unless torchrun started us.
    minutes: how long a rank waits in a training step for another one, which may have died or hang."""
    if "RANK" not in os.environ:
        return 0, 1, device
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):      # torch reads them itself, and would end in a traceback
        set_by_torchrun(name)
    if not os.environ.get("MASTER_ADDR"):
        raise UserError("the environment variable MASTER_ADDR is not set; start with torchrun, or unset RANK and "
                        "WORLD_SIZE")
    if not dist.is_initialized():
        Ranks.store, rank, size = next(dist.rendezvous("env://"))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=size,
                                store=dist.PrefixStore("ranks", Ranks.store),
                                timeout=datetime.timedelta(minutes=minutes))
        Ranks.patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=12))
    return *number_and_count(), device


def leave():
    """The end of a run: let go of the groups while Python still runs. A thread of gloo's that frees its last tensor
    later than that may abort the process (pytorch pull request 179291). The default group's threads
    outlive this: something else still holds it."""
    if dist.is_initialized():
        dist.destroy_process_group()
        Ranks.patient = Ranks.store = None
        gc.collect()


def number_and_count():
    """(this process's number, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(mine, count):
    """Lists sharded as rank::ranks, put back in order: every rank gets the whole list of `count` items."""
    if not dist.is_initialized():
        return mine
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine, group=Ranks.patient)
    return [parts[i % len(parts)][i // len(parts)] for i in range(count)]


def barrier():
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier(group=Ranks.patient)


def lost(error):
    """Does this error mean that another process is gone, or did not answer in time?"""
    return isinstance(error, dist.DistError) or bool(re.search("gloo|nccl", str(error), re.I))


def sum_over_ranks(values, device):
    """A tensor's sum over all ranks, on the CPU. NCCL adds on the GPU `device`."""
    if not dist.is_initialized():
        return values
    values = values.to(device) if device.type == "cuda" else values
    dist.all_reduce(values)
    return values.cpu()


def on_rank_0_first(rank, function):
    """Call `function` on rank 0, then on the others, which find its result on disk. Returns this rank's result."""
    if rank == 0:
        result = function()
    barrier()
    return result if rank == 0 else function()


# ---------------------------------------------------------------------------------------------------------------------
# one network, shared out


def shard(net):
    """Divide a network's weights among the processes, in place, each a float32 share. Returns the network.

    The weights are then DTensors, which the optimizer updates as they are. Layers are units: one is gathered while the
    one before it computes. What is left (embedding, head, last norm) is gathered once a pass, since log-probabilities
    read the head after the network's own forward has ended. A network with adapters stays whole: what is trained of it
    is small.
    """
    if not dist.is_initialized() or net.lora is not None:
        return net
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    net.computes_in = net.dtype
    policy = MixedPrecisionPolicy(param_dtype=net.dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(net.device.type, (dist.get_world_size(),))
    for part in (*net.layers, net):
        for p in part.parameters():
            if not _is_share(p):
                p.data = p.data.float()         # a layer at a time: there is never a whole float32 network
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return net


def _is_share(tensor):
    """Is it this process's share of a larger one?"""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor
    return isinstance(tensor, DTensor)


@contextlib.contextmanager
def gathered(net):
    """Inside, a sharded network is whole on every process, in its own dtype, and may compute without the others. All
    processes must enter and leave. Costs a whole copy of the weights."""
    parts = _parts(net)
    for part in parts:
        part.set_reshard_after_forward(False)
        part.unshard()
    try:
        yield net
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not net)
            part.reshard()


def _parts(net):
    """What `shard` made units of; nothing for a network that is not sharded."""
    if not dist.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule
    return [part for part in net.modules() if isinstance(part, FSDPModule)]


def passes(count, shard, size):
    """[(numbers, weight)], one for each forward and backward pass of this process: which of `count` items it takes, at
    most `size`, and what their loss is multiplied by. shard: (this process's number, how many there are).

    The loss is a mean over all items and the engine averages over the processes: so a process's sum of losses times
    their number over `count` is its share. Every process makes as many passes, because all must gather a layer at the
    same time. One that has run out of items takes the first once more, with weight 0.

    >>> passes(5, (0, 2), 2), passes(5, (1, 2), 2)
    ([([0, 2], 0.4), ([4], 0.4)], [([1, 3], 0.4), ([0], 0.0)])
    """
    rank, ranks = shard
    mine, most = list(range(rank, count, ranks)), math.ceil(count / ranks)
    parts = [mine[first:first + size] for first in range(0, most, size)]
    return [(part, ranks / count) if part else ([0], 0.0) for part in parts]


# ---------------------------------------------------------------------------------------------------------------------
# what --resume needs


def save(tensors, path):
    """Write {name: tensor} to `path`: with one process a file of torch.save; with several a directory, in which each
    writes its shares (torch.distributed.checkpoint). Such a directory's index is a pickle, which `load` runs: resume no
    run directory that somebody else sent."""
    if not dist.is_initialized():
        return files.save_tensors(path, tensors)
    import torch.distributed.checkpoint as dcp

    if dist.get_rank() == 0:
        files.remove(path)                      # what a kill left under this name
    barrier()
    try:
        dcp.save(tensors, checkpoint_id=path, process_group=Ranks.patient)
    except dcp.api.CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise UserError(f"{path} cannot be written ({first}); mend that, and go on with --resume") from None
    if dist.get_rank() == 0:
        with files.writing(path):
            files.sync(path)                    # the names of what the processes wrote, before the state names `path`


@torch.no_grad()
def load(tensors, path):
    """Fill {name: tensor} in place with what `save` wrote, with as many processes or another number of them. A file is
    mapped, not read whole. Raises UserError where `path` is gone or damaged."""
    try:
        if os.path.isdir(path):
            import torch.distributed.checkpoint as dcp
            with warnings.catch_warnings():     # that one process reads alone is meant
                warnings.simplefilter("ignore")
                dcp.load(tensors, checkpoint_id=path, process_group=Ranks.patient, no_dist=not dist.is_initialized())
            return
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for name, tensor in tensors.items():
            if found[name].shape != tensor.shape:
                raise ValueError(name)
            tensor.copy_(_share_of(found[name], tensor))
    except Exception as error:                  # torch raises many kinds for a damaged file
        if isinstance(error, torch.OutOfMemoryError) or lost(error):
            raise                               # no fault of the file
        raise UserError(f"--resume: {path} cannot be read ({type(error).__name__}); "
                            "start again with --overwrite") from None


def _share_of(whole, tensor):
    """`whole`, cut like `tensor` where that is a share."""
    if not _is_share(tensor):
        return whole
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)
