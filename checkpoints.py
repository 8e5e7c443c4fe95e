"""Hugging Face checkpoints: what config.json says of a network, its safetensors files, its tokenizer's files.

A checkpoint may come from anybody, so all of it is looked at before anything is built: every key of config.json that is
read has a type and bounds (KEYS), and the headers of the weights' files, which hold names, shapes and types, must be
those of that network. No pickled file is ever opened.
"""

import contextlib
import dataclasses
import glob
import json
import os
import shutil

import torch

import files
import kernels
import run


# ---------------------------------------------------------------------------------------------------------------------
# configuration


@dataclasses.dataclass
class Config:
    """What distinguishes the families. `raw` is the config.json it came from, kept so that it can be written back."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float = 1e-6
    rope: dict = dataclasses.field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    tied: bool = False               # the head is the transposed embedding
    qkv_bias: bool = False           # Qwen2: biases on queries, keys and values only
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = None              # RMSNorm of queries and keys: "head" by head (Qwen3), or "all" at once (OLMo 2)
    norm_in: bool = True             # a norm on what each sublayer reads: all but OLMo 2
    norm_out: bool = False           # a norm on what each sublayer adds: OLMo 2, Gemma 2
    windows: tuple = ()              # per layer: None, or how many latest tokens (itself included) a token sees
    rotated: tuple = ()              # per layer: does RoPE tell positions there? () = everywhere, as in all but SmolLM3
    fused: bool = False              # Phi: queries, keys and values are one weight in the file, gate and up another
    gemma: bool = False              # norms times 1 + weight; embeddings times sqrt(H); GELU
    attention_scale: float = None    # factor on the scores, None = head_dim ** -0.5
    attention_cap: float = None      # scores become cap * tanh(score / cap)
    logit_cap: float = None          # so do the logits
    raw: dict = dataclasses.field(default_factory=dict)

    @classmethod
    def from_hf(cls, raw, where="config.json"):
        """Read a config.json in the spelling of transformers 5 or older. Raises UserError for what is not supported."""
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise run.UserError(f"{where} has model_type {str(family)[:40]!r}, which is not supported; "
                                f"give a {', '.join(FAMILIES[:-1])} or {FAMILIES[-1]} checkpoint")
        c = {**MISSING.get(family, {}), **raw}
        check_keys(c, where)
        c = {key: value for key, value in c.items() if value is not None}
        key, act = ("hidden_activation", "gelu_pytorch_tanh") if family == "gemma2" else ("hidden_act", "silu")
        if c.get(key, act) != act:
            raise run.UserError(f"{where} has {key} {json.dumps(c[key])[:40]}; only {act} is supported")
        try:
            heads, layers = c["num_attention_heads"], c["num_hidden_layers"]
            attention_bias = c.get("attention_bias", False)     # Qwen2 has no such key: its biases are always the same
            rope, rotated = _read_rope(c, family, where), _read_rotated(c, family, layers, where)
            max_positions = c.get("max_position_embeddings", 2048)
            if rope["rope_type"] == "yarn":     # Qwen's cards switch it on and leave max_position_embeddings as it was
                max_positions = max(max_positions, int(rope["factor"] * rope["original_max_position_embeddings"]))
            kv_heads, head_dim = c.get("num_key_value_heads") or heads, c.get("head_dim") or c["hidden_size"] // heads
            if heads % kv_heads or head_dim < 2 or head_dim % 2:
                raise run.UserError(f"{where} has {heads} attention heads of {head_dim} dimensions and {kv_heads} "
                                    "key-value heads; the last must divide the first, and the dimensions be even")
            return cls(
                vocab_size=c["vocab_size"],
                hidden_size=c["hidden_size"], intermediate_size=c["intermediate_size"],
                num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
                max_positions=max_positions, norm_eps=c.get("rms_norm_eps", 1e-6),
                rope=rope, tied=c.get("tie_word_embeddings", False),
                qkv_bias=family == "qwen2" or attention_bias, out_bias=family != "qwen2" and attention_bias,
                mlp_bias=c.get("mlp_bias", False), qk_norm={"qwen3": "head", "olmo2": "all"}.get(family),
                norm_in=family != "olmo2", norm_out=family in ("olmo2", "gemma2"), fused=family == "phi3",
                windows=_read_windows(c, family, rotated, layers, where), rotated=rotated,
                **_read_gemma(c, family, where), raw=raw)
        except KeyError as error:
            raise run.UserError(f"{where} lacks {error}; is it a complete Hugging Face checkpoint?") from None


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "phi3", "gemma2")     # phi-4's is phi3 too

# What transformers fills in for a key that config.json leaves out, where that is not what it fills in for Llama
MISSING = {
    "mistral": dict(sliding_window=4096),
    "smollm3": dict(num_key_value_heads=4, max_position_embeddings=32768, rope_theta=2000000.0,
                    no_rope_layer_interval=4, tie_word_embeddings=True),
    "olmo2": dict(rms_norm_eps=1e-5),
    "phi3": dict(rms_norm_eps=1e-5, max_position_embeddings=4096),
    "gemma2": dict(num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256, attn_logit_softcapping=50.0,
                   final_logit_softcapping=30.0, sliding_window=4096, max_position_embeddings=8192,
                   tie_word_embeddings=True)}

# Every key of config.json that is read, those inside rope_parameters too: its type, least and greatest value.
KEYS = {
    "vocab_size": (int, 1, 2**24), "hidden_size": (int, 1, 2**20), "intermediate_size": (int, 1, 2**22),
    "num_hidden_layers": (int, 1, 1000), "num_attention_heads": (int, 1, 2**14),
    "num_key_value_heads": (int, 1, 2**14), "head_dim": (int, 2, 2**14),
    "max_position_embeddings": (int, 1, 2**31), "rms_norm_eps": (float, 0, 1),
    "tie_word_embeddings": (bool,), "attention_bias": (bool,), "mlp_bias": (bool,), "use_sliding_window": (bool,),
    "sliding_window": (int, 1, 2**31), "max_window_layers": (int, 0, 2**31), "layer_types": (list,),
    "no_rope_layers": (list,), "no_rope_layer_interval": (int, 1, 1000), "query_pre_attn_scalar": (float, 1e-6, 1e6),
    "attn_logit_softcapping": (float, 1e-6, 1e9), "final_logit_softcapping": (float, 1e-6, 1e9),
    "rope_parameters": (dict,), "rope_scaling": (dict,), "rope_theta": (float, 2, 1e12), "rope_type": (str,),
    "type": (str,), "partial_rotary_factor": (float, 0, 1), "factor": (float, 1e-6, 1e6),
    "low_freq_factor": (float, 0, 1e6), "high_freq_factor": (float, 1e-6, 1e6), "beta_fast": (float, 1e-6, 1e6),
    "beta_slow": (float, 1e-6, 1e6), "attention_factor": (float, 0, 1e6), "mscale": (float, 0, 1e6),
    "mscale_all_dim": (float, 0, 1e6), "truncate": (bool,), "original_max_position_embeddings": (int, 1, 2**31)}
# Null is as good as no key at all, but for these, which a network cannot do without.
NEEDED = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "max_position_embeddings", "rms_norm_eps", "query_pre_attn_scalar"}
NAMES = {int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "an object",
         str: "a text"}


def check_keys(c, where, keys=KEYS):
    """Raises UserError, naming the key, where a value has another type than in `keys` or lies outside its bounds."""
    for key in keys.keys() & c.keys():
        (kind, *bounds), value = keys[key], c[key]
        if value is None and key not in NEEDED:
            continue
        right = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or value is not True
                                                                                and value is not False)
        if not right or bounds and not bounds[0] <= value <= bounds[1]:         # NaN too lies outside
            raise run.UserError(f"{where} has {key} {json.dumps(value)[:40]}; it must be {NAMES[kind]}"
                                + (" from {:g} to {:g}".format(*bounds) if bounds else "") + "; download it again")


def check_end_tokens(values, where):
    """Raises UserError where eos_token_id is neither a token id, nor a list of such, nor null."""
    ids = values.get("eos_token_id")
    for token in ids if isinstance(ids, list) else [] if ids is None else [ids]:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise run.UserError(f"{where} has eos_token_id {json.dumps(ids)[:40]}; it must be a token's number or a "
                                "list of such; download it again")


def _read_gemma(c, family, where):
    """The fields of Config that only Gemma 2 sets; {} for the other families."""
    if family != "gemma2":
        return {}
    if c.get("use_bidirectional_attention"):
        raise run.UserError(f"{where} has use_bidirectional_attention; only causal attention is supported")
    return dict(gemma=True, attention_scale=c["query_pre_attn_scalar"] ** -0.5,                 # null caps: no cap
                attention_cap=c.get("attn_logit_softcapping"), logit_cap=c.get("final_logit_softcapping"))


def _read_rope(c, family, where):
    """Config.rope: a dictionary with rope_type, rope_theta, and the numbers that rope_type needs. transformers 5 writes
    it as rope_parameters; older versions as rope_scaling, null for the default, with rope_theta beside it."""
    rope = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    check_keys(rope, where)
    rope = {key: value for key, value in rope.items() if value is not None}
    rope.setdefault("rope_theta", c.get("rope_theta", 10000.0))
    rope["rope_type"] = kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in kernels.ROPE_NUMBERS or (family == "phi3" and kind != "default"):
        raise run.UserError(f"{where} has rope_type {kind[:40]!r}; default, linear, llama3 and yarn are supported, and "
                            "of phi3 checkpoints those with the default, such as the 4k models and phi-4")
    if (rope.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1) != 1:
        raise run.UserError(f"{where} has a partial_rotary_factor; only rotations of the whole head are supported")
    if kind == "yarn":
        rope.setdefault("original_max_position_embeddings", c.get("max_position_embeddings", 2048))
    for key in kernels.ROPE_NUMBERS[kind]:
        if not isinstance(rope.get(key), (int, float)):
            raise run.UserError(f"{where} has rope_type {kind!r} without the number {key!r}; download it again")
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise run.UserError(f"{where} has a low_freq_factor that is not below its high_freq_factor; download it again")
    return rope


def _read_rotated(c, family, layers, where):
    """Config.rotated. SmolLM3's no_rope_layers holds, against its name, a 1 for each layer WITH RoPE."""
    if family != "smollm3":
        return ()
    flags = c.get("no_rope_layers") or [(i + 1) % c["no_rope_layer_interval"] for i in range(layers)]
    if len(flags) < layers:
        raise run.UserError(f"{where} has no_rope_layers for {len(flags)} of its {layers} layers; download it again")
    return tuple(flag != 0 for flag in flags[:layers])


def _read_windows(c, family, rotated, layers, where):
    """Config.windows, one entry a layer. Which layers have a window follows from the family, or from layer_types."""
    window, kinds = c.get("sliding_window"), c.get("layer_types")
    if window is None or family in ("llama", "olmo2"):
        return (None,) * layers
    if family in ("mistral", "phi3"):
        return (window,) * layers
    if kinds:
        if len(kinds) != layers or not all(kind in ("sliding_attention", "full_attention") for kind in kinds):
            raise run.UserError(f"{where} has layer_types that are not {layers} times sliding_attention "
                                "or full_attention; download it again")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if family == "gemma2":
        return tuple(None if i % 2 else window for i in range(layers))      # the even layers
    if not c.get("use_sliding_window"):
        return (None,) * layers
    if family == "smollm3":
        return tuple(None if turns else window for turns in rotated)        # the layers without RoPE
    first = c.get("max_window_layers", layers)                              # Qwen: the layers from this one on
    return tuple(window if i >= first else None for i in range(layers))


# ---------------------------------------------------------------------------------------------------------------------
# the directory


TOKENIZER_FILES = ("tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
                   "tekken.json", "chat_template.*", "additional_chat_templates/*")


def fetch(path_or_hub_id, patterns=("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")):
    """The directory of a checkpoint: a local one as it is, or a hub repository's files that match `patterns`,
    downloaded (and cached) by huggingface_hub. Raises UserError where neither is to be had."""
    if os.path.isdir(path_or_hub_id):
        if os.path.isdir(os.path.join(path_or_hub_id, "state")):
            raise run.UserError(f"{path_or_hub_id} is a run's directory; give a checkpoint in it, such as its iter-1")
        return str(path_or_hub_id)
    if (os.path.exists(path_or_hub_id) or str(path_or_hub_id).startswith((".", "/", "~"))
            or str(path_or_hub_id).count("/") > 1):
        raise run.UserError(f"{path_or_hub_id} is not a directory; "
                            "give a Hugging Face checkpoint's directory or a hub id")
    import huggingface_hub

    try:
        return huggingface_hub.snapshot_download(str(path_or_hub_id), allow_patterns=list(patterns),
                                                 ignore_patterns=["original/*", "consolidated*"])
    except Exception as error:  # the hub's client has a dozen kinds; each means that the checkpoint is not to be had
        raise run.UserError(f"{path_or_hub_id} is no directory here, and the hub did not give it "
                            f"({type(error).__name__}); check the name, the connection and, "
                            "for gated models, `hf auth login`") from None


def copy_tokenizer(directory, path):
    """Copy the tokenizer's files of a checkpoint's directory as they are. Written anew by transformers 5 they can be
    unreadable to transformers 4, and lack the tokenizer.model that conversion to GGUF needs."""
    found = [file for pattern in TOKENIZER_FILES for file in glob.glob(pattern, root_dir=directory)
             if os.path.isfile(os.path.join(directory, file))]
    if not found:
        raise run.UserError(f"{directory} has no tokenizer to copy; put its files (tokenizer.json and so on) there")
    for file in found:
        target = os.path.join(path, file)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copyfile(os.path.join(directory, file), target)


# ---------------------------------------------------------------------------------------------------------------------
# weights


def products(c):
    """{name of a linear in model.Layer: {Hugging Face's name of a part: how many of its output rows that part has}}."""
    q, kv, mlp = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
    qkv = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
    gate_up = {"mlp.gate_proj": mlp, "mlp.up_proj": mlp}
    if c.fused:
        qkv, gate_up = {"self_attn.qkv_proj": q + 2 * kv}, {"mlp.gate_up_proj": 2 * mlp}
    return {"qkv": qkv, "o": {"self_attn.o_proj": c.hidden_size}, "down": {"mlp.down_proj": c.hidden_size},
            "gate_up": gate_up}


def names_in(net):
    """{Hugging Face's name of a weight: the tensor that holds it}, where ours are fused a slice of the fused one."""
    c = net.config
    names = {"model.embed_tokens.weight": net.embed.weight, "model.norm.weight": net.norm}
    if not c.tied:
        names["lm_head.weight"] = net.head.weight
    for i, layer in enumerate(net.layers):
        prefix = f"model.layers.{i}."
        norms = {"input": layer.norm1, "post_attention": layer.norm2}           # this "post" stands before the MLP
        if c.norm_out:
            norms = {"input": layer.norm1, "post_attention": layer.norm1_out,
                     "pre_feedforward": layer.norm2, "post_feedforward": layer.norm2_out}
        for name, weight in norms.items():
            if weight is not None:
                names[f"{prefix}{name}_layernorm.weight"] = weight
        if c.qk_norm:
            names[prefix + "self_attn.q_norm.weight"] = layer.q_norm
            names[prefix + "self_attn.k_norm.weight"] = layer.k_norm
        for kind in ("weight", "bias"):
            for product, sizes in products(c).items():
                tensor = getattr(getattr(layer, product), kind)
                if tensor is not None:
                    for name, part in zip(sizes, tensor.detach().split(list(sizes.values()))):
                        names[f"{prefix}{name}.{kind}"] = part
    return names


def shards(path):
    """The files that hold a checkpoint's weights: model.safetensors, or those that its index names."""
    index, found = os.path.join(path, "model.safetensors.index.json"), ["model.safetensors"]
    if os.path.exists(index):
        weight_map = files.read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise run.UserError(f"{index} has no weight_map; download it again")
        found = sorted({str(name) for name in weight_map.values()})
    for name in found:
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise run.UserError(f"{index} names {name[:60]!r}; only .safetensors files beside it are read, so download "
                                "it again")
        if not os.path.exists(os.path.join(path, name)):
            raise run.UserError(f"{os.path.join(path, name)} is missing; the checkpoint is incomplete or not in "
                                "safetensors format (download or convert it again)")
    return [os.path.join(path, name) for name in found]


@contextlib.contextmanager
def opened(file):
    """A safetensors file, to read from. Raises UserError where it is damaged."""
    import safetensors

    try:
        with safetensors.safe_open(file, framework="pt") as weights:
            yield weights
    except safetensors.SafetensorError as error:
        raise run.UserError(f"{file} is damaged or truncated ({error}); download it again") from None


def check_weights(net, path):
    """Raises UserError unless the checkpoint has every weight of the net, of its shape and a floating type, and no
    other. Reads the files' headers alone; the net may be on the meta device. Returns [(file, its weights' names)]."""
    shapes = {name: list(tensor.shape) for name, tensor in names_in(net).items()}
    missing, found = set(shapes), []
    for file in shards(path):
        with opened(file) as weights:
            kept = [name for name in weights.keys() if name in shapes
                    or name != "lm_head.weight"                     # tied to the embedding
                    and not name.endswith("rotary_emb.inv_freq")]   # a constant that old checkpoints stored
            for name in kept:
                if name not in shapes:
                    raise run.UserError(f"{file} holds {name[:80]}, which a {net.config.raw['model_type']} model does "
                                        "not have; is config.json of another model?")
                header = weights.get_slice(name)
                if header.get_shape() != shapes[name]:
                    raise run.UserError(f"{file}: {name} has shape {header.get_shape()}, config.json wants "
                                        f"{shapes[name]}; they do not belong together")
                if header.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise run.UserError(f"{file}: {name} is of type {header.get_dtype()}; only F64, F32, F16 and BF16 "
                                        "weights can be trained: give the checkpoint that this one was made from")
        found.append((file, kept))
        missing.difference_update(kept)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise run.UserError(f"{path} lacks the weight {sorted(missing)[0]}{more}; the checkpoint is incomplete, "
                            "download it again")
    return found


@torch.no_grad()
def fill(net, found):
    """Copy weights into the net, one at a time. found: what `check_weights` returned. Raises UserError for one that is
    not finite."""
    ours = names_in(net)
    for file, kept in found:
        with opened(file) as weights:
            for name in kept:
                ours[name].copy_(weights.get_tensor(name))              # in place: it may be a slice of a fused weight
                if not all(bound.isfinite() for bound in ours[name].aminmax()):     # one reading, which passes NaN on
                    raise run.UserError(f"{file}: {name} holds NaN or infinite numbers; download the checkpoint again "
                                        "or, if a run of yours wrote it, take an earlier one")


def write_weights(tensors, path, max_shard_bytes):
    """Write model.safetensors, or shards with an index where it would exceed max_shard_bytes."""
    from safetensors.torch import save_file

    shards, sizes = [{}], [0]                   # sizes: bytes in each shard
    for name, tensor in tensors.items():
        if sizes[-1] and sizes[-1] + tensor.nbytes > max_shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = tensor
        sizes[-1] += tensor.nbytes
    weight_map = {}                             # {name of a weight: its file}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, os.path.join(path, file), metadata={"format": "pt"})
        weight_map |= {name: file for name in shard}
    if len(shards) > 1:
        files.write_json(os.path.join(path, "model.safetensors.index.json"),
                         {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})
