"""What a run needs of a GPU's memory, before hours are spent: `python sppo.py --preset llama-3-8b --plan`.

By arithmetic from the shapes of the model and the flags: weights, gradients, float32 masters, the optimizer's moments,
activations, the KV cache while sampling, a frozen reference, the judge. What it leaves out is small beside these or
hard to tell: attention masks, what the allocator keeps in reserve, CUDA's own few hundred MB. So leave a tenth free.

A run on a GPU compares the table with the memory that is there and says where it does not fit, and an allocation that
fails ends with the same remedies (run.REMEDIES).
"""

import contextlib
import glob
import os

import torch

import checkpoints
import files
import lora
import model
import parallel
from run import REMEDIES, UserError

GB = 2**30

LLAMA_3B = dict(vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_layers=28, num_heads=24,
                num_kv_heads=8, head_dim=128, max_positions=131072, tied=True)
LLAMA_8B = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
                num_kv_heads=8, head_dim=128, max_positions=8192)
# Shapes of the models that the presets name, from their config.json: a plan needs no download
SHAPES = {
    "mistralai/Mistral-7B-Instruct-v0.2": LLAMA_8B | dict(vocab_size=32000),
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA_8B,
    "google/gemma-2-9b-it": dict(vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_layers=42,
                                 num_heads=16, num_kv_heads=8, head_dim=256, max_positions=8192, tied=True,
                                 norm_out=True, gemma=True),
    "meta-llama/Llama-3.2-3B-Instruct": LLAMA_3B,
    "Skywork/Skywork-Reward-V2-Llama-3.2-3B": LLAMA_3B,
}
PAIRRM = 435_000_000            # parameters of DeBERTa-v3-large, which PairRM is
PREFILL = 16384                 # tokens whose keys and values a prefill of rollout.generate keeps


def config_of(path_or_hub_id):
    """The Config of a checkpoint, or of an adapter's base; of a hub id that SHAPES lacks only config.json is fetched.
    Raises UserError."""
    if path_or_hub_id in SHAPES:
        return checkpoints.Config(**SHAPES[path_or_hub_id])
    if lora.is_adapter(path_or_hub_id):
        return config_of(lora.base_of(path_or_hub_id))
    where = os.path.join(checkpoints.fetch(path_or_hub_id, patterns=("config.json",)), "config.json")
    return checkpoints.Config.from_hf(files.read_json(where), where)


def parameters(config):
    """How many numbers a model's weights are, a tied head counted once. Takes no memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in model.Transformer(config).parameters())


def judge_bytes(judge, dtype):
    """Bytes of a judge's weights, by its flag's kind; 0 for what is no network. A language model that judges counts
    without its cache, a classifier of a family that model.py does not know by the size of its files."""
    kind, _, path = judge.partition(":")
    if kind == "pairrm":
        return PAIRRM * dtype.itemsize
    if kind not in ("reward", "model"):
        return 0
    try:
        return parameters(config_of(path)) * dtype.itemsize
    except UserError:
        return sum(map(os.path.getsize, glob.glob(os.path.join(glob.escape(path), "*.safetensors"))))


def cache_bytes(c, rows, width, dtype):
    """Bytes of the keys and values of so many rows of `width` tokens."""
    return rows * width * 2 * c.num_layers * c.num_kv_heads * c.head_dim * dtype.itemsize


def activation_bytes(c, tokens, dtype, checkpointed):
    """Bytes that a forward pass over so many packed tokens keeps for its backward pass.

    A layer keeps what its products and its attention read: about 4 H for the residual stream and the norms, queries,
    keys and values four times (the product, turned by RoPE, copied into rectangles), attention's output, and 4 times
    the MLP's width. With checkpointing one layer at a time does, and of the others their input, H.
    """
    H, heads = c.hidden_size, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    layer = 4 * H + 4 * heads + c.num_heads * c.head_dim + 4 * c.intermediate_size
    kept = layer + c.num_layers * H if checkpointed else c.num_layers * layer
    return tokens * kept * dtype.itemsize


def plan(c, args, dtype, ranks, *, answers, prompt, answer, width, moments, judges, reference=False, between=False,
         validates=False):
    """{phase: {what: bytes}} of one of `ranks` processes, for "sample", "train" and, where the run `validates` in the
    middle of training, "validate".

    c: the model's Config. answers: to a prompt, in one pass. prompt, answer: the longest, tokens; width: of the longest
    row that is sampled. moments: the optimizer's bytes a trained parameter. judges: as their flags name them, held all
    the time. reference: is a second, frozen model held? between: is sampled between two steps, the optimizer held?
    """
    P, b = parameters(c), dtype.itemsize
    trained = adapter_parameters(c, args) if args.lora else P
    # Sharded, the only weights are the float32 masters; in training one layer and the next are whole beside the
    # embedding and the head, while sampling all are. A rank holds adapters, and the model beside them, whole.
    sharded = ranks > 1 and not args.lora
    share, ends = (ranks, P - _layers(c)) if sharded else (1, P)
    own_master = dtype == torch.float32 and not sharded and not args.lora               # the weight is its own master
    optimizer = {"float32 masters": 0 if own_master else 4 * trained // share, "moments": moments * trained // share}
    held = {"frozen reference": b * P} if reference and not args.lora else {}
    held["judge"] = sum(judge_bytes(judge, dtype) for judge in judges)
    rows = {"KV cache": cache_bytes(c, args.max_rows, width, dtype) + cache_bytes(c, 1, PREFILL, dtype),
            "logits": 3 * 4 * args.max_rows * c.vocab_size}             # in float32, their exponentials, a copy
    # Of the head's gradient there is a float32 sum of its own; sharded, of embedding and head what is to be averaged.
    head = 0 if args.lora else (b + 4) * ends if sharded else 4 * c.vocab_size * c.hidden_size
    tokens = args.micro_batch * (prompt + answers * answer)
    phases = {"sample": {"weights": b * P, **(optimizer if between else {}), **held, **rows},
              "train": {"weights": b * (ends + 2 * _layers(c) // c.num_layers if sharded else P), **optimizer, **held,
                        "gradients": 4 * trained // share + head,
                        "activations": activation_bytes(c, tokens, dtype, args.activation_checkpointing)}}
    if validates:
        phases["validate"] = {"weights": b * P, **optimizer, **held, **rows}
    return phases


def _layers(c):
    """Parameters of all layers."""
    with torch.device("meta"):
        return sum(p.numel() for p in model.Transformer(c).layers.parameters())


def adapter_parameters(c, args):
    """How many numbers LoRA's adapters are."""
    with torch.device("meta"):
        net = model.Transformer(c)
        lora.adapt(net, args)
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def table(plans):
    """Text: a row for what is held, a column for each (number of processes, plan), a part for each phase. In GB."""
    heads = [f"{ranks} GPU" + ("s, each" if ranks > 1 else "") for ranks, _ in plans]
    lines = [f"{'GB, by arithmetic':24s}" + "".join(f"{head:>16s}" for head in heads)]
    for phase, first in plans[0][1].items():
        lines += [f"{phase}:", *(f"  {what:22s}" + "".join(f"{each[phase][what] / GB:16.1f}" for _, each in plans)
                                 for what in first)]
        lines += [f"  {'together':22s}" + "".join(f"{sum(each[phase].values()) / GB:16.1f}" for _, each in plans)]
    return "\n".join(lines)


def warning(plan, free):
    """A line where a phase of the plan needs more than `free` bytes, else ""."""
    phase, need = max(((phase, sum(parts.values())) for phase, parts in plan.items()), key=lambda each: each[1])
    if need <= free:
        return ""
    return (f"by arithmetic (--plan) the phase `{phase}` needs {need / GB:.0f} GB, and {free / GB:.0f} GB are free; if "
            f"it fails: {REMEDIES}\n")


def before(args, device, dtype, ranks, **shape):
    """Called before anything is loaded; shape: the last arguments of `plan`. With --plan print the table, for a GPU,
    and end the program. On a GPU print a warning where the run may not fit. Raises UserError with --plan for a model
    whose shape is not to be had."""
    if args.plan and not args.model:
        raise UserError("--plan is for a --model or a --preset; an embedded world needs less than a GB")
    first = parallel.number_and_count()[0] == 0
    if args.plan:
        dtype = torch.float32 if args.dtype == "float32" else torch.bfloat16
        c = config_of(args.model)
        text = table([(n, plan(c, args, dtype, n, **shape)) for n in (1, 2, 4, 8)])
        if first:
            print(f"{text}\n{args.model}, {parameters(c) / 1e9:.2f} billion parameters, {str(dtype)[6:]}; leave a "
                  f"tenth free. Where it does not fit: {REMEDIES}")
        raise SystemExit(0)
    if device.type == "cuda" and args.model and first:
        with contextlib.suppress(UserError):            # what cannot be planned is not refused for that
            free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
            print(warning(plan(config_of(args.model), args, dtype, ranks, **shape), free), end="", flush=True)
