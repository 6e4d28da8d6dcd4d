"""fla's own `GatedDeltaNetForCausalLM` on a CPU, and this project's training model on the same tokens.

fla's kernels run in Triton's interpreter (TRITON_INTERPRET=1 before anything imports Triton), with three stand-ins: the
autotuner, which measures on a GPU, takes its first configuration; FlashAttention is PyTorch's attention with the same
window; and the gated delta rule goes token by token, since the chunked kernel fails in the interpreter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

PLAIN = dict(attn_mode="fused_recurrent", fuse_norm=False, fuse_swiglu=False, fuse_cross_entropy=False, use_cache=False)
"""Settings that do not change the model, with which it runs in the interpreter."""


@contextmanager
def on_cpu() -> Iterator[ModuleType]:
    """`fla.models`, able to run here."""
    import fla.layers.attn
    import fla.models
    from triton.runtime.autotuner import Autotuner

    first = mock.patch.object(Autotuner, "prune_configs", lambda self, kwargs: self.configs[:1])
    with first, mock.patch.object(fla.layers.attn, "flash_attn_func", _attention), torch.no_grad():
        yield fla.models


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    assert causal
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    t = torch.arange(q.shape[1])
    seen = t[None] <= t[:, None]
    if window_size[0] >= 0:
        seen &= t[:, None] - t[None] <= window_size[0]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


def randomized(models: ModuleType, settings: dict, seed: int = 0) -> torch.nn.Module:
    """A model of fla's whose weights all differ: norms of ones and small gates would hide mistakes."""
    torch.manual_seed(seed)
    model = models.GatedDeltaNetForCausalLM(models.GatedDeltaNetConfig(**PLAIN | settings)).float().eval()
    for param in model.parameters():
        param.copy_(torch.rand_like(param) + 0.5 if param.dim() == 1 else torch.randn_like(param) * 0.2)
    return model


def folder_logits(folder: Path, tokens: Tensor) -> Tensor:
    """`[b, s, vocabulary]` of a folder that fla's `from_pretrained` loads.

    Raises:
        AssertionError: a weight that the model has not, or that the folder has not.
    """
    with on_cpu() as models:
        model, found = models.GatedDeltaNetForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **PLAIN
        )
        assert not any(found.values()), found
        return model.eval()(tokens).logits.float()


def training_logits(path: Path, tokens: Tensor) -> Tensor:
    """`[b, s, vocabulary]` of the model that training builds, with the weights of a checkpoint; in one rank."""
    from megatron_gdn.training.inference import inference_config, load_model
    from tools.convert.checkpoint import MegatronCheckpoint

    found, length = MegatronCheckpoint(path), tokens.shape[1]
    config = inference_config(found.model, sequence_length=length, dtype=torch.float32, device="cpu")
    model = load_model(found.path, config, vocab_size=found.vocab_size, device=torch.device("cpu"))
    with torch.no_grad():
        return model(tokens, torch.arange(length).expand(len(tokens), -1), None)[..., : found.vocab_size]


def versions() -> dict[str, str]:
    """Of the packages that a comparison depends on."""
    names = ("flash-linear-attention", "fla-core", "torch", "triton", "transformers", "megatron-core")
    return {name: metadata.version(name) for name in names}
