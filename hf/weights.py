"""Reads and writes a Hugging Face folder: config.json, model.safetensors and tokenizer.json.

It reads GPT-2, Llama 2 and 3, SmolLM2, Mistral, Qwen2 and 2.5, and Qwen3. Other models are refused
by name, and so are pickled and quantised weights. The package transformers is not imported:
`theirs` translates the names of weights. The three matrices q, k and v of a folder are one matrix
here, in which they follow one below the other.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from data import TEMPLATE, UserError, refuse_pointer
from gpt import GPT, GPTConfig, ScalarGPT
from hf import hub, remedies

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
UNREAD = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # buffers of old files
NAMES = {  # ours -> theirs, inside a block and outside
    "attention.q_norm": ["self_attn.q_norm"],
    "attention.k_norm": ["self_attn.k_norm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.proj": ["self_attn.o_proj"],
    "norm_1": ["input_layernorm"],
    "norm_2": ["post_attention_layernorm"],
    "up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
    "wte": ["embed_tokens"],
    "norm": ["norm"],
}
GPT2_NAMES = {
    "attention.qkv": ["attn.c_attn"],
    "attention.proj": ["attn.c_proj"],
    "norm_1": ["ln_1"],
    "norm_2": ["ln_2"],
    "up": ["mlp.c_fc"],
    "down": ["mlp.c_proj"],
    "wte": ["wte"],
    "wpe": ["wpe"],
    "norm": ["ln_f"],
}


def theirs(name, config):
    """The name of a weight here -> the names of the tensors of the folder that it joins"""
    module, _, kind = name.removeprefix("trunk.").rpartition(".")
    if module in ("lm_head", "head"):
        return [f"score.{kind}" if module == "head" else name]
    trunk, names = ("model.", NAMES) if config.llama else ("transformer.", GPT2_NAMES)
    if module.startswith("blocks."):
        _, layer, module = module.split(".", 2)
        trunk += f"layers.{layer}." if config.llama else f"h.{layer}."
    return [f"{trunk}{part}.{kind}" for part in names[module]]


def transposed(name, config):
    """Whether the folder stores a weight transposed, as GPT-2 does: (in, out)"""
    inner = name.endswith(("qkv.weight", "proj.weight", "up.weight", "down.weight"))
    return inner and not config.llama


def cuts(name, config):
    """-> the number of rows of each tensor that a weight joins"""
    H, K, D = config.heads()
    if ".qkv." in name:
        return [H * D, K * D, K * D]
    return [config.n_inner or 4 * config.n_embd] * 2


# ---- in


def load(folder, mapped=False):
    """-> (GPT or ScalarGPT, meta). The model takes over the tensors of the files: no weights are
    drawn before, and only tensors that are joined are copied. Raises UserError. mapped: the model
    stays on "meta", and each parameter has `read`, a function that gives its tensor."""
    config = read_config(folder)
    facts = read_json(folder, "config.json")
    scalar = str(facts.get("architectures")).count("ForSequenceClassification")
    labels = facts.get("id2label")
    if scalar and isinstance(labels, dict) and len(labels) != 1:
        raise refused(folder, "is a classifier of several labels; a reward model has one")
    tensors = Tensors(folder)
    if config.n_layer > len(tensors.files):
        raise refused(folder, f"names {config.n_layer} layers, more than its files have weights")
    said_tied, config = config.tied, replace(config, tied=config.tied and tensors.tied(config))
    with torch.device("meta"):
        model = (ScalarGPT if scalar else GPT)(config)
    state = {}
    for name, x in model.state_dict().items():
        if name == "head.bias":
            bias = facts.get("score_bias", 0.0)
            bias = torch.tensor([float(bias) if type(bias) in (int, float) else 0.0])
            state[name] = partial(joined, [bias])
            continue
        parts = [tensors.take(part) for part in theirs(name, config)]
        if any(part.dim() != x.dim() for part in parts):
            raise refused(folder, f"has {name} with another number of axes")
        if transposed(name, config):
            parts = [part.T for part in parts]
        fits = all(part.shape[1:] == x.shape[1:] for part in parts)
        if not fits or sum(len(part) for part in parts) != len(x):
            found = ", ".join(str(tuple(part.shape)) for part in parts)
            raise refused(folder, f"has {name} of shape {found}, but config.json says otherwise")
        if len(parts) > 1 and [len(part) for part in parts] != cuts(name, config):
            raise refused(folder, f"has parts of {name} whose sizes are not those of config.json")
        state[name] = partial(joined, parts)
    if scalar:
        tensors.left.discard("lm_head.weight")
    if left := sorted(x for x in tensors.left if not x.endswith(UNREAD)):
        raise refused(folder, f"has weights that no part of this model reads: {left[0]}")
    if mapped:
        for name, p in model.named_parameters():
            p.read, (first, *_) = state[name], state[name].args[0]
            p.data = p.to(first.dtype)  # on "meta"
    else:
        model.load_state_dict({name: f() for name, f in state.items()}, assign=True)
    name = hub.name_of(folder)
    tokenizer = {"name": name, "files": read_texts(folder), "chat": True, "args": {}}
    size = sum(p.numel() for p in model.parameters()) / 1e6
    kept = "; lm_head.weight is kept, although config.json says that it is the embedding"
    return model, {
        "method": f"{facts['model_type']}, {size:,.1f} M parameters"
        + kept * (said_tied and not config.tied and not scalar),
        "task": name,
        "tokenizer": tokenizer,
        "template": TEMPLATE,
        "options": {},
        "reference": "",
        "max_new_tokens": 0,
        "folder": "",
    }


def joined(parts):
    """Tensors, which may be mapped from a file -> one contiguous tensor of all their rows"""
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


def refused(folder, why):
    return UserError(f"{folder} {why}")


class Tensors:
    """The weights of a folder, by their names without that of the trunk. `left`: those that no
    `take` has taken yet"""

    def __init__(self, folder):
        try:
            from safetensors import safe_open
        except ImportError:
            raise UserError(f"{folder} needs the package safetensors: {hub.INSTALL}") from None
        self.folder, self.files = folder, {}
        for path in weight_files(folder):
            refuse_pointer(path)
            try:
                file = safe_open(path, framework="pt")
                names = list(file.keys())
            except Exception as e:  # a SafetensorError, whatever is wrong with the file
                why = str(e).partition("\n")[0] or type(e).__name__
                raise UserError(f"{path} is not a complete safetensors file ({why})") from None
            if found := remedies.wrapped(names):
                raise refused(folder, found)
            for name in names:
                if bare(name) in self.files:
                    raise refused(folder, f"has the weights {bare(name)} twice; save it again")
                self.files[bare(name)] = file, name
        self.left = set(self.files)

    def tied(self, config):
        """Whether the head is the embedding, because no file has another head"""
        if "lm_head.weight" not in self.files:
            return True
        head, wte = self.take("lm_head.weight"), self.take(theirs("wte.weight", config)[0])
        return head.dtype == wte.dtype and torch.equal(head, wte)

    def take(self, name):
        name = bare(name)
        if name not in self.files:
            tied = "; if it is the embedding, set tie_word_embeddings to true in config.json"
            tied *= name == "lm_head.weight"
            raise refused(self.folder, f"lacks the weights {name}{tied}")
        self.left.discard(name)
        file, full = self.files[name]
        try:
            x = file.get_tensor(full)
        except Exception as e:
            why = str(e).partition("\n")[0]
            raise refused(self.folder, f"has {name} that cannot be read ({why})") from None
        if x.dtype not in DTYPES:
            kind = str(x.dtype).removeprefix("torch.")
            raise refused(self.folder, f"has weights of {kind}: quantised ones are not supported")
        return x


def bare(name):
    return name.removeprefix("transformer.").removeprefix("model.")


def weight_files(folder):
    """-> the paths of model.safetensors, or of the shards that its index names"""
    single, index = Path(folder, "model.safetensors"), Path(folder, "model.safetensors.index.json")
    if single.is_file():
        return [single]
    if not index.is_file():
        raise refused(folder, f"has no model.safetensors; {remedies.no_weights(folder)}")
    named = read_json(folder, index.name).get("weight_map")
    names = sorted(set(map(str, named.values()))) if isinstance(named, dict) else []
    if not names or any(name != os.path.basename(name) for name in names):
        raise UserError(f"{index} does not name the files of the weights")
    for name in names:
        if not Path(folder, name).is_file():
            raise refused(folder, f"lacks {name}, which its index names; fetch it again")
    return [Path(folder, name) for name in names]


def read_json(folder, name):
    """-> the JSON object in a file of the folder"""
    path = os.path.join(folder, name)
    refuse_pointer(path)
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError:
        needed = "config.json, model.safetensors and tokenizer.json"
        give = f"give {remedies.inner(folder)}the .pt file in it, or a folder with {needed}"
        words = f"is a directory without {name}; {give}"
        raise refused(folder, words) from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read ({str(e).splitlines()[0]})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is no JSON object")
    return found


def read_texts(folder):
    """-> {name: text} of the small files, so that a checkpoint does not need the folder"""
    texts = {}
    for name in hub.TEXTS:
        path = Path(folder, name)
        if path.is_file():
            refuse_pointer(path)
            try:
                texts[name] = path.read_text("utf-8")
            except (OSError, ValueError) as e:
                raise UserError(f"{path} cannot be read ({e})") from None
            if path.suffix == ".json" and name != "tokenizer.json":
                read_json(folder, name)
    if "tokenizer.json" not in texts:
        raise refused(folder, "has no tokenizer.json; save it with a fast tokenizer")
    return texts


def read_config(folder):
    """config.json -> GPTConfig. Raises UserError if it names something that gpt.py lacks."""
    facts = read_json(folder, "config.json")
    kind, known = facts.get("model_type"), "GPT-2, Llama, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3"
    if kind not in FAMILIES:
        raise refused(folder, f"is of the type {str(kind)[:40]!r}; known are {known}")

    def fact(name, kind=int, default=None):
        x = facts.get(name)
        x = default if x is None else x
        good = type(x) in ((int, float) if kind is float else (kind,))
        if not good or kind is not bool and not 0 < x < 1e9:
            words = f"has a config.json whose {name} is {str(x)[:40]}, not a {kind.__name__}"
            raise refused(folder, words if name in facts else f"has a config.json without {name}")
        return x

    def only(name, *values):
        if facts.get(name, values[0]) not in values:
            what = f"{name} {str(facts[name])[:40]!r}"
            raise refused(folder, f"has {what}, which is not supported")

    only("quantization_config", None)
    if kind == "gpt2":
        only("activation_function", "gelu_new", "gelu_pytorch_tanh")
        only("scale_attn_weights", True)
        only("scale_attn_by_inverse_layer_idx", False)
        only("add_cross_attention", False, None)
        sizes = (fact(x) for x in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd"))
        inner = fact("n_inner", default=4 * fact("n_embd"))
        small = fact("layer_norm_epsilon", float, 1e-5)
        tied = fact("tie_word_embeddings", bool, True)
        config = GPTConfig(*sizes, n_inner=inner, norm_eps=small, tied=tied)
    else:
        only("hidden_act", "silu")
        only("attention_bias", False, *([True] if kind == "qwen2" else []))
        only("mlp_bias", False)
        only("partial_rotary_factor", 1.0, None)
        heads = fact("num_attention_heads")
        config = GPTConfig(
            vocab_size=fact("vocab_size"),
            block_size=context(facts, fact),
            n_layer=fact("num_hidden_layers"),
            n_head=heads,
            n_embd=fact("hidden_size"),
            llama=True,
            n_kv_head=fact("num_key_value_heads", default=heads if kind == "llama" else None),
            head_dim=fact(
                "head_dim", default=128 if kind == "qwen3" else fact("hidden_size") // heads
            ),
            n_inner=fact("intermediate_size"),
            norm_eps=fact("rms_norm_eps", float, 1e-6),
            tied=fact("tie_word_embeddings", bool, False),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            **rope(folder, facts),
        )
    H, K, D = config.heads()
    if H % K or D % 2 and config.llama or config.head_dim == 0 and config.n_embd % H:
        raise refused(folder, f"has {H} heads, {K} of keys, width {config.n_embd}: they do not fit")
    return config


def context(facts, fact):
    """-> the longest sequence. A sliding window limits it, because full attention is the same only
    within that window."""
    longest, mistral = fact("max_position_embeddings"), facts["model_type"] == "mistral"
    slides = facts.get("use_sliding_window", mistral)
    if not slides or facts.get("sliding_window", 4096) is None:
        return longest
    return min(longest, fact("sliding_window", default=4096))


def rope(folder, facts):
    """-> the fields of rotary positions; transformers 5 calls them rope_parameters"""
    found = facts.get("rope_parameters") or facts.get("rope_scaling") or {}
    found = found if isinstance(found, dict) else {"type": found}
    kind = found.get("rope_type", found.get("type", "default"))
    theta = found.get("rope_theta", facts.get("rope_theta", 10000.0))
    keys = "factor low_freq_factor high_freq_factor original_max_position_embeddings".split()
    scaling = tuple(found.get(key) for key in keys) if kind == "llama3" else ()
    if any(type(x) not in (int, float) or not 0 < x < 1e15 for x in (theta, *scaling)):
        raise refused(folder, "has rotary positions whose numbers are missing or wrong")
    if kind not in ("default", "llama3") or found.get("partial_rotary_factor", 1) != 1:
        raise refused(folder, f"has rotary positions {str(kind)[:40]!r}, which are not supported")
    return {"rope_theta": float(theta), "rope_scaling": tuple(map(float, scaling))}


def digest(folder, of):
    """-> the digest of the texts and weights that `load` reads, and of no other files. of: a
    function that gives the digest of a path"""
    paths = [path for name in hub.TEXTS if (path := Path(folder, name)).is_file()]
    with contextlib.suppress(UserError):  # `load` says what is wrong
        paths += weight_files(folder)
    text = "".join(f"{path.name} {of(path)}\n" for path in paths)
    return hashlib.sha256(text.encode()).hexdigest()


# ---- out


def write_config(model, facts, dtype):
    """-> config.json of a model. facts: that of the folder it comes from, {} for a toy model"""
    c, scalar = model.config, isinstance(model, ScalarGPT)
    kind = facts.get("model_type")
    if not facts and not c.llama:
        kind = "gpt2"
        facts = {
            **dict(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd),
            **dict(n_layer=c.n_layer, n_head=c.n_head, activation_function="gelu_new"),
            **dict(layer_norm_epsilon=c.norm_eps),
            **dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        }
    name = "GPT2" if kind == "gpt2" else kind.title()
    model_class = "GPT2LMHeadModel" if kind == "gpt2" else f"{name}ForCausalLM"
    if scalar:
        model_class = f"{name}ForSequenceClassification"
    dtype = str(dtype).removeprefix("torch.")
    facts = facts | {"model_type": kind, "architectures": [model_class]}
    facts |= {"dtype": dtype, "torch_dtype": dtype, "tie_word_embeddings": c.tied}
    if scalar:
        labels = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        facts |= labels | {"score_bias": model.head.bias.item()}
    else:
        for name in ("num_labels", "id2label", "label2id", "score_bias"):
            facts.pop(name, None)
    return facts


def tensors_of(model, dtype):
    """-> {their name: tensor} of a model's weights"""
    config, out = model.config, {}
    for name, x in model.state_dict().items():
        if name == "head.bias":
            continue
        x = x.detach().to("cpu")
        x = x.T if transposed(name, config) else x
        names = theirs(name, config)
        parts = x.split(cuts(name, config)) if len(names) > 1 else [x]
        out |= {part: cast(part, y, dtype) for part, y in zip(names, parts)}
    return out


def cast(name, x, dtype):
    """-> a tensor in another precision. Raises UserError if a number of it overflows there."""
    y = x.to(dtype).contiguous()
    over = x[y.isinf() & x.isfinite()]
    if len(over):
        most, kind = torch.finfo(dtype).max, str(dtype).removeprefix("torch.")
        words = f"{name} holds {over[0]:.6g}, but {kind} ends at {most:.6g}"
        raise UserError(f"{words}; give a --dtype with more room, such as bfloat16 or float32")
    return y


def save_tensors(tensors, path):
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
