"""LoRA: small trained products beside the large frozen ones (Hu et al. 2021, arXiv 2106.09685).

    y = x W^T + b  +  (alpha / r) (x A^T) B^T           W [out, in], A [r, in], B [out, r], r much less than both

W and b stay as they are and A and B are trained: r (in + out) numbers instead of in * out. A begins random and B zero,
so that training begins at the model itself, to the bit. Gradients, the optimizer's moments and a saved state then take
a few thousandths of what they take for all weights. In LSP there is more to gain: with the adapters off the same
network is pi_Ref, and no second copy of the weights is needed (`Reference`).

The parts of a fused product (queries, keys, values; gate, up) have an adapter each, as in PEFT, whose files are written
and read here: adapter_model.safetensors and adapter_config.json. Phi's checkpoints are fused themselves, so there qkv
has one adapter, and gate_up has one.

Adapters are float32 whatever W is, so the optimizer updates them as they are; they multiply in the type of x. Merged,
W + (alpha / r) B A is rounded to W's type: in bfloat16 that loses what is below 1/256 of a weight, which an adapter
beside its base keeps.
"""

import contextlib
import dataclasses
import os
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoints
import files
import run


@dataclasses.dataclass
class Adapters:
    """What all adapters of a network have in common: its `lora`."""
    r: int
    alpha: float
    on: bool = True

    @property
    def scale(self):
        """What their products are multiplied by."""
        return self.alpha / self.r


class Adapted(nn.Module):
    """A frozen linear layer with adapters on some parts of its output.

    sizes: {part: its rows of the output}, all parts in order; chosen: those that have an adapter. Their A, [r, in]
    each, are stacked, and so are their B, [rows, r] each: all of A is one product. Weights have the linear's own names.
    """

    def __init__(self, linear, sizes, chosen, adapters, generator):
        super().__init__()
        self.weight, self.bias, self.adapters = linear.weight, linear.bias, adapters
        self.sizes, self.chosen = sizes, [part for part in sizes if part in chosen]
        bound, device = linear.in_features**-0.5, linear.weight.device              # PEFT's first A
        A = torch.empty(len(self.chosen) * adapters.r, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(A.to(device))                                         # drawn on the CPU: alike everywhere
        self.B = nn.Parameter(torch.zeros(sum(sizes[part] for part in self.chosen), adapters.r, device=device))

    def pairs(self, A, B):
        """[(A [r, in], B [rows, r])] of the chosen parts: views of A and B, or of what has their shapes."""
        return list(zip(A.split(self.adapters.r), B.split([self.sizes[part] for part in self.chosen])))

    def _placed(self, pieces):
        """The chosen parts' pieces [N, rows] where they stand in the output [N, out]; elsewhere 0."""
        found = dict(zip(self.chosen, pieces))
        return torch.cat([found[part] if part in found else pieces[0].new_zeros(len(pieces[0]), rows)
                          for part, rows in self.sizes.items()], -1)

    def forward(self, x):
        """x [N, in] -> [N, out], of x's dtype."""
        y = F.linear(x, self.weight, self.bias)
        if not self.adapters.on:
            return y
        low = (self.adapters.scale * (x @ self.A.to(x.dtype).T)).split(self.adapters.r, -1)       # a part: [N, r]
        return y + self._placed([each @ B.T for each, (_, B) in zip(low, self.pairs(self.A, self.B.to(x.dtype)))])

    def merged(self):
        """W + (alpha / r) B A [out, in], summed in float32 and rounded once."""
        added = self._placed([A.T @ B.T for A, B in self.pairs(self.A, self.B)]).T
        return (self.weight.float() + self.adapters.scale * added).to(self.weight.dtype)


def add(net, r, alpha, chosen, seed=0):
    """Freeze a model.Transformer and give it adapters of rank r on the chosen parts, a set of names as in
    checkpoints.products. Equal seeds draw equal A."""
    generator = torch.Generator().manual_seed(seed)
    net.requires_grad_(False).lora = Adapters(r, alpha)
    for layer in net.layers:
        for product, sizes in checkpoints.products(net.config).items():
            if chosen & sizes.keys():
                setattr(layer, product, Adapted(getattr(layer, product), sizes, chosen, net.lora, generator))


def adapted(net):
    """(number of the layer, name of the product, Adapted) for each product that has adapters."""
    return [(i, name, module) for i, layer in enumerate(net.layers) for name, module in layer.named_children()
            if isinstance(module, Adapted)]


# ---------------------------------------------------------------------------------------------------------------------
# the reference: the same network, its adapters off


@contextlib.contextmanager
def reference(net):
    """Inside, `net` is the model that it was before training. No gradients: a layer that activation checkpointing
    computes again in the backward pass would find its adapters on."""
    net.lora.on = False
    try:
        with torch.no_grad():
            yield net
    finally:
        net.lora.on = True


class Reference:
    """`net` with its adapters off, for all that asks a frozen model: forward pass, logits, sampling, log-probabilities.
    It holds no weights of its own."""

    def __init__(self, net):
        self.net = net
        self.config, self.device, self.dtype = net.config, net.device, net.dtype
        self.computes_in = net.computes_in
        self.head, self.logits = net.head, net.logits                   # the head has no adapter

    def __call__(self, tokens, view=None):
        """As model.Transformer.forward."""
        with reference(self.net):
            return self.net(tokens, view)


# ---------------------------------------------------------------------------------------------------------------------
# merged, saved


@torch.no_grad()
def merged(net):
    """Yields (Hugging Face's name, merged weight) of every adapted weight, one after another: no second copy of them
    all. The net stays as it is; without adapters there are none."""
    for i, _, each in adapted(net):
        for part, weight in zip(each.sizes, each.merged().split(list(each.sizes.values()))):
            yield f"model.layers.{i}.{part}.weight", weight


@torch.no_grad()
def merge(net):
    """Puts the merged weights in place of weights and adapters: a plain network again, and all of it can be trained.
    Returns it."""
    for i, name, each in adapted(net):
        rows, columns = each.weight.shape
        linear = nn.Linear(columns, rows, bias=each.bias is not None, device="meta")
        linear.weight, linear.bias = each.weight, each.bias
        linear.weight.copy_(each.merged())
        setattr(net.layers[i], name, linear)
    net.lora = None
    return net.requires_grad_(True)


def save_as(how, net, directory, tokenizer, base):
    """--save: a whole checkpoint, merged, with the files of `tokenizer`, a directory; or the adapters beside `base`."""
    if how == "adapter":
        save(net, directory, base)
    else:
        net.save_pretrained(directory, tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# PEFT's files


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "base_model.model.model.layers.{}.{}.lora_{}.weight"
KEYS = {"r": (int, 1, 4096), "lora_alpha": (float, 0, 1e6), "use_rslora": (bool,), "base_model_name_or_path": (str,)}
# What changes the base or the formula must have one of these values; None stands for a missing key.
PLAIN = {"peft_type": ["LORA"], "use_dora": [None, False], "rank_pattern": [None, {}], "alpha_pattern": [None, {}],
         "modules_to_save": [None, []], "bias": [None, "none"], "alora_invocation_tokens": [None],
         "layer_replication": [None],
         "init_lora_weights": [None, True, False, "gaussian", "eva", "orthogonal"]}


def tensors(net):
    """{PEFT's name of a weight: our adapter's part}, views into the stacked ones."""
    return {NAME.format(i, part, kind): tensor for i, _, each in adapted(net)
            for part, pair in zip(each.chosen, each.pairs(each.A.detach(), each.B.detach()))
            for kind, tensor in zip("AB", pair)}


def save(net, directory, base):
    """Write the adapters as PEFT, transformers and vLLM read them, atomically. base: the checkpoint that they belong
    to, a hub id or a directory, which is named by its absolute path."""
    from safetensors.torch import save_file

    parts = sorted({part.split(".")[1] for _, _, each in adapted(net) for part in each.chosen})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": net.lora.r, "lora_alpha": net.lora.alpha,
              "base_model_name_or_path": os.path.abspath(base) if os.path.isdir(base) else str(base),
              "target_modules": parts, "bias": "none", "lora_dropout": 0.0, "inference_mode": True}

    def write(path):
        os.makedirs(path)
        files.write_json(os.path.join(path, CONFIG), config)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors(net).items()},
                  os.path.join(path, WEIGHTS), metadata={"format": "pt"})
    files.write_atomically(directory, write)


def is_adapter(path):
    """Does this directory hold adapters, to be put on another checkpoint?"""
    return os.path.exists(os.path.join(path, CONFIG))


def read_config(path):
    """adapter_config.json of a directory, checked. Raises UserError for what is not plain LoRA."""
    where = os.path.join(path, CONFIG)
    c = files.read_json(where)
    for key, values in PLAIN.items():
        if c.get(key) not in values:
            raise run.UserError(f"{where} has {key} {str(c.get(key))[:40]!r}; only plain LoRA is supported: merge it "
                                "(PEFT: merge_and_unload) and give the merged checkpoint")
    checkpoints.check_keys(c, where, KEYS)
    for key in ("r", "lora_alpha", "base_model_name_or_path"):
        if c.get(key) is None:
            raise run.UserError(f"{where} lacks {key}; is it a complete PEFT adapter?")
    return c


def base_of(path):
    """The directory of the checkpoint that an adapter's directory belongs to; a relative path is looked for beside the
    adapter first. Raises UserError where it cannot be had, or is an adapter itself."""
    name, where = read_config(path)["base_model_name_or_path"], os.path.join(path, CONFIG)
    beside = os.path.join(path, name)
    try:
        base = checkpoints.fetch(beside if name and os.path.isdir(beside) else name)
    except run.UserError as error:
        raise run.UserError(f"{where} names its base {name!r}, which cannot be had ({error}); correct "
                            "base_model_name_or_path") from None
    if is_adapter(base):
        raise run.UserError(f"{where} names the base {name!r}, an adapter itself; merge that one, and name the merged "
                            "checkpoint")
    return base


def tokenizer_of(path):
    """The directory with the tokenizer of a checkpoint's directory: an adapter without one has its base's."""
    bare = is_adapter(path) and not os.path.exists(os.path.join(path, "tokenizer_config.json"))
    return base_of(path) if bare else path


@torch.no_grad()
def attach(net, path):
    """Give the base `net` the adapters of a directory. Raises UserError, naming the file, for what does not fit it."""
    c, file = read_config(path), os.path.join(path, WEIGHTS)
    if not os.path.exists(file):
        raise run.UserError(f"{file} is missing; only adapters in safetensors format are read")
    with checkpoints.opened(file) as weights:
        names = set(weights.keys())
        found = {match[1] for name in names if (match := re.fullmatch(NAME.format(r"\d+", "(.+)", "[AB]"), name))}
        add(net, c["r"], c["lora_alpha"] * (c["r"]**0.5 if c.get("use_rslora") else 1), found)
        ours = tensors(net)
        if names != ours.keys() or not names:
            odd = min(names ^ ours.keys(), default="no adapter")
            raise run.UserError(f"{file} {'lacks' if odd in ours else 'holds'} {odd}; give adapters on whole layers of "
                                "this base, every layer alike")
        for name, tensor in ours.items():
            shape = weights.get_slice(name).get_shape()
            if shape != list(tensor.shape):
                raise run.UserError(f"{file}: {name} has shape {shape}, its base and rank ask for "
                                    f"{list(tensor.shape)}; give the base that it was trained on")
            tensor.copy_(weights.get_tensor(name))
            if not tensor.isfinite().all():
                raise run.UserError(f"{file}: {name} holds NaN or infinite numbers; take an earlier one")


# ---------------------------------------------------------------------------------------------------------------------
# flags


LAYERS = ("q", "k", "v", "o", "gate", "up", "down")


def check_flags(args):
    """Raises UserError for flags of LoRA without --lora, and for layers that there are not."""
    for name, default in () if args.lora else (("lora_alpha", 0), ("lora_layers", "all"), ("save", "merged")):
        if getattr(args, name) != default:
            raise run.UserError(f"--{name.replace('_', '-')} {getattr(args, name)} is for --lora; give that too, or "
                                "leave it out")
    named = args.lora_layers.split(",")
    if named != ["all"] and not set(named) <= set(LAYERS):
        raise run.UserError(f"--lora-layers {args.lora_layers} must be all, or some of {','.join(LAYERS)} with commas "
                            "between")


def check_base(args, base, config):
    """Raises UserError where the flags do not fit the initial model, a checkpoint with this checkpoints.Config."""
    if args.save == "adapter" and is_adapter(checkpoints.fetch(base)):
        raise run.UserError(f"--save adapter needs a whole checkpoint for its base, and {base} is an adapter; leave "
                            "--save out, or merge that one first")
    parts_of(config, args.lora_layers)


def parts_of(config, layers):
    """--lora-layers as names of parts, a set. Raises UserError for some of what a checkpoint holds as one weight."""
    named, parts = set(LAYERS if layers == "all" else layers.split(",")), set()
    for sizes in checkpoints.products(config).values():
        for part in sizes:
            short = part.split(".")[1].removesuffix("_proj")
            of = {"qkv": {"q", "k", "v"}, "gate_up": {"gate", "up"}}.get(short, {short})
            if of & named and not of <= named:
                raise run.UserError(f"--lora-layers {layers}: this checkpoint holds {', '.join(sorted(of))} as one "
                                    "weight; name all of them or none")
            parts |= {part} if of <= named else set()
    return parts


def adapt(net, args, *names):
    """With --lora: gives a network that has none adapters for training, whose first A belongs to the seed and these
    names. Without --lora it does nothing."""
    if args.lora and net.lora is None:
        add(net, args.lora, args.lora_alpha or 2 * args.lora, parts_of(net.config, args.lora_layers),
            run.stream(args.seed, "lora", *names))
