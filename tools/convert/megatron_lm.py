"""Checkpoints of Megatron-LM: names that differ from this project's, and the model from its arguments."""

import argparse
import io
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from megatron_gdn.config import ModelConfig
from megatron_gdn.config.load import explain
from megatron_gdn.training.restricted import UnsafeCheckpointError
from tools.convert.architecture import MOST_EXPERTS, MOST_LAYERS, Architecture, Experts
from tools.convert.errors import ConvertError

# Norms that Transformer Engine's linear layers hold; Megatron's own specs store theirs under the same names.
_ALIASES = {
    ".self_attention.in_proj.layer_norm_weight": ".input_layernorm.weight",
    ".self_attention.linear_qkv.layer_norm_weight": ".input_layernorm.weight",
    ".mlp.linear_fc1.layer_norm_weight": ".pre_mlp_layernorm.weight",
}

_VALUES = {
    "argparse": {"Namespace": SimpleNamespace},
    "collections": {"OrderedDict": dict},
    "builtins": {"set": set, "list": list, "dict": dict, "tuple": tuple},
    "torch": {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "Size")},
}
# Packages whose classes arguments hold, such as enumerations; none of them is read here, and none imported.
_STOOD_IN = ("megatron", "signal", "transformer_engine", "torch", "nemo", "numpy", "pathlib")


class _Unread:
    """Stands for a value of a class that is not imported."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state) -> None:
        pass

    def __setitem__(self, key, value) -> None:
        pass

    def append(self, value) -> None:
        """Values of a list's subclass."""

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other) -> bool:
        return self is other


class _Unpickler(pickle.Unpickler):
    """Builds plain values; every other class becomes `_Unread`, and no function is called."""

    def __init__(self, content: bytes, path: Path):
        super().__init__(io.BytesIO(content))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # its name in torch's protocol of pickles
        if name in _VALUES.get(module, ()):
            return _VALUES[module][name]
        if module.partition(".")[0] in _STOOD_IN or (module, name) == ("builtins", "getattr"):
            return _Unread  # getattr: members of enumerations, as Python 3.11.0 to 3.11.3 write them
        raise UnsafeCheckpointError(f"{self._path} names {module}.{name}, which no checkpoint needs: do not load it.")

    def persistent_load(self, pid) -> _Unread:
        """Storages of tensors, which are not read."""
        return _Unread()


def read_args(content: bytes, path: Path) -> dict[str, Any]:
    """Megatron-LM's arguments by name, those of plain values; empty where there are none.

    Args:
        content: what torch wrote, of a `common.pt` or of the object that has its place since Megatron-Core 0.19.
        path: the file that it is from.

    Raises:
        ConvertError: not a file that torch wrote.
        UnsafeCheckpointError: it names anything but values.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
            found = _Unpickler(archive.read(name), path).load()
    except UnsafeCheckpointError:
        raise
    except (zipfile.BadZipFile, ValueError, EOFError, pickle.UnpicklingError, LookupError, TypeError) as error:
        raise ConvertError(f"{path} cannot be read ({error!r}): copy the checkpoint whole.") from error
    if isinstance(found, list) and found:  # the object is a list of one
        found = found[0]
    args = found.get("args") if isinstance(found, dict) else None
    if not isinstance(args, SimpleNamespace):
        return {}
    return {name: value for name, value in vars(args).items() if not isinstance(value, _Unread)}


# Argument -> the values that this project has an equal of; absent or None is fine.
_ONLY = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "rotary_interleaved": (False,),
    "use_rope_scaling": (False,),
    "rotary_seq_len_interpolation_factor": (None,),
    "multi_latent_attention": (False,),
    "mtp_num_layers": (None, 0),
    "no_rope_freq": (None,),
    "qk_l2_norm": (False,),
    "softmax_type": ("vanilla",),
    "moe_router_pre_softmax": (False,),
    "moe_router_score_function": ("softmax",),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_shared_expert_gate": (True,),
    "residual_in_fp32": (False,),
    "apply_residual_connection_post_layernorm": (False,),
}
_VARIANTS = ("gated_delta_net", "gdn")
_SPEC_MODULE = "megatron_gdn.hybrid.layer_specs"
SPECS = {"gdn": "G", "gdn_h1": "GS", "gdn_h2": "MGS"}
"""Layers of this project's specs, by the name that Megatron-LM's --spec gives; they repeat."""
_MAMBA = ("mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups")


def vocabulary_of_args(args: dict[str, Any]) -> tuple[int | None, int | None]:
    """Tokens of the vocabulary without padding, and the id of the end of a document; None where nothing says it.

    Megatron-LM's tokenizers without a file have --vocab-size tokens, and up to Megatron-Core 0.17 the end of a document
    behind them; from 0.18 on that is NullTokenizer's last token, or the one that an argument of that release names.
    """
    size, tokenizer = args.get("vocab_size"), args.get("tokenizer_type")
    if size is None or tokenizer not in ("NullTokenizer", "NullMultimodalTokenizer"):
        return size, None
    if tokenizer == "NullTokenizer" and "null_tokenizer_eod_id" in args:
        named = args["null_tokenizer_eod_id"]
        return size, size - 1 if named is None else named
    return size + 1, size


def architecture_of_args(args: dict[str, Any]) -> Architecture:
    """The model of Megatron-LM's arguments.

    Raises:
        ConvertError: an argument that this project has no equal of, or one that is missing.
    """
    without_experts = not args.get("num_experts")
    for name, possible in _ONLY.items():
        if name.startswith("moe_") and without_experts:
            continue
        if args.get(name) is not None and args[name] not in possible:
            raise ConvertError(f"{name} ({args[name]}) must be {possible[0]}: this project has no equal of it.")
    variant = args.get("experimental_attention_variant") or args.get("linear_attention_type")
    if spec := args.get("spec"):
        module, name = [*spec, ""][:2] if isinstance(spec, list | tuple) else (spec, "")
        if module != _SPEC_MODULE or name not in tuple(SPECS):
            raise ConvertError(f"spec ({module} {name}) must be {_SPEC_MODULE} with one of {', '.join(SPECS)}.")
    elif variant not in _VARIANTS:
        raise ConvertError(f"experimental_attention_variant ({variant}) must be gated_delta_net.")
    for name, most in (("num_layers", MOST_LAYERS), ("num_experts", MOST_EXPERTS)):
        number = args.get(name)
        if number and not (type(number) is int and 0 < number <= most):
            raise ConvertError(f"{name} ({number}) must be a whole number from 1 to {most}.")
    try:
        return _architecture(args)
    except ConvertError:
        raise
    except KeyError as error:
        raise ConvertError(f"Megatron-LM's arguments lack {error}: nothing says what the weights mean.") from error
    except ValidationError as error:
        problems = explain(error, ModelConfig)
        raise ConvertError(f"Megatron-LM's arguments describe a model that cannot be built: {problems}") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConvertError(f"Megatron-LM's arguments describe a model that cannot be built: {error}") from error


def _architecture(args: dict[str, Any]) -> Architecture:
    number, zero_centered = args["num_layers"], bool(args.get("apply_layernorm_1p"))
    size = args.get("window_size")
    if own := args.get("spec"):
        symbols, size = [SPECS[own[1]][i % len(SPECS[own[1]])] for i in range(number)], size or (2047, 0)
    else:
        symbols = _symbols(args, number)
    options = dict(
        rope=args.get("position_embedding_type", "rope") == "rope",
        rotary_percent=args.get("rotary_percent", 1.0),
        qk_norm=bool(args.get("qk_layernorm")),
        output_gate=bool(args.get("attention_output_gate")),
    )
    if args.get("position_embedding_type", "rope") not in ("rope", "none"):
        raise ConvertError(f"position_embedding_type ({args['position_embedding_type']}) must be rope or none.")
    heads = args["num_attention_heads"]
    fields = dict(
        pattern="".join(f"{symbol}-" for symbol in symbols),
        hidden_size=args["hidden_size"],
        ffn_hidden_size=args["ffn_hidden_size"],
        linear_num_key_heads=args["linear_num_key_heads"],
        linear_num_value_heads=args["linear_num_value_heads"],
        linear_key_head_dim=args["linear_key_head_dim"],
        linear_value_head_dim=args["linear_value_head_dim"],
        linear_conv_kernel_dim=args["linear_conv_kernel_dim"],
        num_attention_heads=heads,
        num_query_groups=args["num_query_groups"] if args.get("group_query_attention") else heads,
        kv_channels=args.get("kv_channels"),
        rotary_base=args.get("rotary_base", 10000),
        full_attention=options,
        zero_centered_norm=zero_centered,
        **({name: args[name] for name in _MAMBA} if "M" in symbols else {}),
        norm_epsilon=args["norm_epsilon"] if "norm_epsilon" in args else args["layernorm_epsilon"],
        tie_embeddings=not args.get("untie_embeddings_and_output_weights"),
    )
    if "S" in symbols:
        left, right = size
        if right != 0:
            raise ConvertError(f"window_size ({tuple(size)}) must be (window - 1, 0).")
        fields["sliding_attention"] = options | dict(window=left + 1)
    model = TypeAdapter(ModelConfig).validate_python(fields)
    # This project's layers, which --spec names, store the norm of their output as it is.
    return Architecture(model=model, experts=_experts(args), zero_centered_out_norm=zero_centered and not own)


def _symbols(args: dict[str, Any], number: int) -> list[str]:
    """Of the layers of Megatron's own Gated DeltaNet."""
    linear = _frequency(args["linear_attention_freq"], number)
    # is_layer_window_attention: every layer, every one but each n-th, or by a list.
    size, skip = args.get("window_size"), args.get("window_attn_skip_freq")
    windowed = [size is not None] * number
    if size is not None and isinstance(skip, int):
        windowed = [(i + 1) % skip != 0 for i in range(number)]
    elif size is not None and skip is not None:
        windowed = [bool(found) for found in skip]
    return ["G" if linear[i] else "S" if windowed[i] else "*" for i in range(number)]


def _experts(args: dict[str, Any]) -> Experts | None:
    if not args.get("num_experts"):
        return None
    sparse = _frequency(args.get("moe_layer_freq", 1), args["num_layers"], sparse_at_start=True)
    return Experts(
        num_experts=args["num_experts"],
        top_k=args["moe_router_topk"],
        ffn_hidden_size=args.get("moe_ffn_hidden_size") or args["ffn_hidden_size"],
        shared_ffn_hidden_size=args["moe_shared_expert_intermediate_size"],
        layers=tuple(i for i, found in enumerate(sparse) if found),
    )


def _frequency(value: int | list[int], number: int, *, sparse_at_start: bool = False) -> list[bool]:
    """Layers of a kind: a list of 0 and 1, or for a number n all but each n-th (linear attention), or each n-th from
    the first (experts)."""
    if isinstance(value, int):
        return [i % value == 0 if sparse_at_start else (i + 1) % value != 0 for i in range(number)]
    if len(value) != number:
        raise ConvertError(f"a list of layers ({value}) must have {number} entries.")
    return [bool(found) for found in value]


def our_key(key: str) -> str:
    """Our key of a weight that may have Megatron-LM's."""
    for theirs, ours in _ALIASES.items():
        if key.endswith(theirs):
            return key.removesuffix(theirs) + ours
    return key


def name_in_megatron_lm(key: str, architecture: Architecture) -> str:
    """Megatron-LM's name of one of our keys: its layers fuse the norms before them."""
    parts = key.split(".")
    if parts[:2] != ["decoder", "layers"]:
        return key
    i = int(parts[2])
    prefix = ".".join(parts[:3])
    if parts[3] == "input_layernorm":
        linear = "in_proj" if architecture.symbols[i] == "G" else "linear_qkv"
        return f"{prefix}.self_attention.{linear}.layer_norm_weight"
    if parts[3] == "pre_mlp_layernorm" and not architecture.has_experts(i):
        return f"{prefix}.mlp.linear_fc1.layer_norm_weight"
    return key


def args_of_architecture(architecture: Architecture, sequence_length: int) -> argparse.Namespace:
    """Megatron-LM's arguments of a model, for its --use-checkpoint-args; `architecture_of_args` reads them.

    Raises:
        ConvertError: Megatron-LM has no argument for something in the model.
    """
    model, symbols, experts = architecture.model, architecture.symbols, architecture.experts
    attention = architecture.attention_layers
    kinds = list({str(options): options for options in attention.values()}.values())
    refused = {
        "allow_neg_eigval": model.allow_neg_eigval,
        "use_output_gate (false)": not model.use_output_gate,
        "use_decay (false)": not model.use_decay,
        "use_qk_l2norm (false)": not model.use_qk_l2norm,
        "a layer without MLP": not all(layer.mlp for layer in architecture.layers),
        "Mamba2 layers": "M" in symbols,
        "attention of two kinds": any(replace(kind, window=None) != replace(kinds[0], window=None) for kind in kinds),
        "windows of two sizes": len({kind.window for kind in kinds} - {None}) > 1,
    }
    if found := [name for name, value in refused.items() if value]:
        raise ConvertError(f"Megatron-LM's Gated DeltaNet has no {', '.join(found)}: use --for megatron_gdn.")
    options = kinds[0] if kinds else model.full_attention
    heads, groups, channels = architecture.attention_heads(min(attention)) if kinds else (1, 1, model.hidden_size)
    args = dict(
        num_layers=len(symbols),
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=heads,
        group_query_attention=True,
        num_query_groups=groups,
        kv_channels=channels,
        experimental_attention_variant="gated_delta_net",
        linear_attention_freq=[int(symbol == "G") for symbol in symbols],
        linear_num_key_heads=model.linear_num_key_heads,
        linear_num_value_heads=model.linear_num_value_heads,
        linear_key_head_dim=model.linear_key_head_dim,
        linear_value_head_dim=model.linear_value_head_dim,
        linear_conv_kernel_dim=model.linear_conv_kernel_dim,
        attention_output_gate=options.output_gate,
        qk_layernorm=options.qk_norm,
        position_embedding_type="rope" if options.rope else "none",
        rotary_percent=options.rotary_percent,
        rotary_base=model.rotary_base,
        window_size=None,
        window_attn_skip_freq=None,
        normalization="RMSNorm",
        apply_layernorm_1p=model.zero_centered_norm,
        norm_epsilon=model.norm_epsilon,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        untie_embeddings_and_output_weights=not model.tie_embeddings,
        vocab_size=model.vocab_size,
        padded_vocab_size=model.vocab_size,
        max_position_embeddings=sequence_length,
        seq_length=sequence_length,
        num_experts=None,
    )
    if "S" in symbols:
        (window,) = {kind.window for kind in kinds} - {None}
        args["window_size"] = (window - 1, 0)
        args["window_attn_skip_freq"] = [int(symbol == "S") for symbol in symbols]
    if experts is not None:
        args |= dict(
            num_experts=experts.num_experts,
            moe_router_topk=experts.top_k,
            moe_ffn_hidden_size=experts.ffn_hidden_size,
            moe_shared_expert_intermediate_size=experts.shared_ffn_hidden_size,
            moe_shared_expert_gate=True,
            moe_router_pre_softmax=False,
            moe_router_score_function="softmax",
            moe_layer_freq=[int(i in experts.layers) for i in range(len(symbols))],
        )
    return argparse.Namespace(**args)
