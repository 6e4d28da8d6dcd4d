"""Files of lit_gpt as NVlabs/GatedDeltaNet saves them: one torch file with a model that fabric gathered."""

import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_gdn.training.restricted import UnsafeCheckpointError, named_global
from tools.convert.errors import ConvertError
from tools.convert.mapping import Row, Table

TABLE = Table(
    norm_center=0,
    prefix="transformer.h.{}.",
    model=(
        Row("embedding.word_embeddings.weight", "transformer.wte.weight"),
        Row("decoder.final_layernorm.weight", "transformer.ln_f.weight", "norm"),
    ),
    output=(Row("output_layer.weight", "lm_head.weight"),),
    layer=(Row("input_layernorm.weight", "norm_1.weight", "norm"),),
    mlp=(
        Row("pre_mlp_layernorm.weight", "norm_2.weight", "norm"),
        Row("mlp.linear_fc1.weight", "mlp.swiglu.{w1,w2}.weight", "halves"),
        Row("mlp.linear_fc2.weight", "mlp.swiglu.w3.weight"),
    ),
    mixers={
        "G": (
            Row("self_attention.in_proj.weight.query", "attn.q_proj.weight"),
            Row("self_attention.in_proj.weight.key", "attn.k_proj.weight"),
            Row("self_attention.in_proj.weight.value", "attn.v_proj.weight"),
            Row("self_attention.in_proj.weight.z", "attn.g_proj.weight"),
            Row("self_attention.in_proj.weight.beta", "attn.b_proj.weight"),
            Row("self_attention.in_proj.weight.alpha", "attn.gk_proj.weight"),
            Row("self_attention.conv1d.weight.query", "attn.q_conv1d.weight"),
            Row("self_attention.conv1d.weight.key", "attn.k_conv1d.weight"),
            Row("self_attention.conv1d.weight.value", "attn.v_conv1d.weight"),
            Row("self_attention.A_log", "attn.A_log", "float32"),
            Row("self_attention.dt_bias", "attn.dt_bias", "float32"),
            Row("self_attention.out_norm.weight", "attn.g_norm_swish_gate.weight", "out norm"),
            Row("self_attention.out_proj.weight", "attn.o_proj.weight"),
        ),
        # For each key head its queries, its key, its value: Megatron's rows.
        "S": (
            Row("self_attention.linear_qkv.weight", "attn.attn.weight"),
            Row("self_attention.linear_proj.weight", "attn.proj.weight"),
        ),
    },
    ignored={"transformer.h.*.attn.D": "the layer does not read it"},
)


class LitGptFile:
    """The tensors of a lit_gpt file, mapped and not read before they are asked for.

    A bias of beta's projection is refused unless it is zero: no other format and no layer here has one.

    Args:
        path: the file.
        dropped: tells by its name whether a weight may be left out.

    Raises:
        ConvertError: not such a file, or a bias that is not zero.
        UnsafeCheckpointError: a pickle that names anything but tensors and plain values.
    """

    def __init__(self, path: Path, dropped: Callable[[str], bool] = lambda name: False):
        self._path = path
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise UnsafeCheckpointError(f"{path} is refused: {named_global(error)}") from error
        except (RuntimeError, EOFError, ValueError) as error:
            raise ConvertError(f"{path} cannot be read as a file of torch.save ({error}): copy it whole.") from error
        model = found.get("model") if isinstance(found, dict) else None
        if not isinstance(model, dict) or not all(isinstance(value, Tensor) for value in model.values()):
            raise ConvertError(f"{path} must hold 'model' with tensors by name: it is no file of lit_gpt.")
        self._tensors: dict[str, Tensor] = {}
        for name, tensor in model.items():
            if name.endswith(".attn.b_proj.bias"):
                if tensor.any() and not dropped(name):
                    raise ConvertError(
                        f"{name} is not zero (up to {tensor.abs().max():.3g}), and no layer here has a bias of beta: "
                        "--drop '*.b_proj.bias' leaves it out and changes the model."
                    )
                continue
            self._tensors[name] = tensor

    @property
    def fingerprint(self) -> list:
        """Tells this file from another."""
        found = self._path.stat()
        return [self._path.name, found.st_size, found.st_mtime_ns]

    def keys(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored."""
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """A tensor, as it is stored."""
        return self._tensors[name]
