"""The layer of `megatron_gdn/gated_delta_net.py` without Megatron: plain linear layers around the kernels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_gdn.kernels import (
    causal_conv1d,
    chunk_gated_delta_rule,
    gated_delta_gate,
    gated_delta_mixer,
    rms_norm_gated,
)


class Mixer(nn.Module):
    """Gated DeltaNet, `[B, T, hidden_size]` in and out.

    Args:
        hidden_size, H, HV, K, V: sizes.
        device: of the weights, which are the same on every device.
        backend: of the kernels.
        dtype: of weights and arithmetic; A_log and dt_bias are float32, or float64 with dtype float64. Weights are
            rounded to bfloat16 first, so that mixers of two dtypes have equal ones.
        joined: what lies between the projections is one operation, as in the layer; False: one by one.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        H: int,
        HV: int,
        K: int,
        V: int,
        device: torch.device,
        backend: str,
        dtype: torch.dtype = torch.bfloat16,
        joined: bool = True,
    ):
        super().__init__()
        self.widths, self.K, self.V, self.backend = (H * K, H * K, HV * V), K, V, backend
        self.heads, self.joined = (H, HV), joined
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int, std: float) -> nn.Parameter:
            drawn = torch.randn(shape, generator=generator) * std
            return nn.Parameter(drawn.bfloat16().to(device, dtype))

        wide = torch.promote_types(dtype, torch.float32)
        self.in_proj = weight(sum(self.widths) + HV * V, hidden_size, std=hidden_size**-0.5)
        self.in_proj_ba = weight(2 * HV, hidden_size, std=hidden_size**-0.5)
        self.conv1d = weight(sum(self.widths), 4, std=0.5)
        self.out_norm = weight(V, std=1.0)
        self.out_proj = weight(hidden_size, HV * V, std=(HV * V) ** -0.5)
        self.A_log = nn.Parameter(torch.linspace(-1, 2, HV).to(device, wide))
        self.dt_bias = nn.Parameter(torch.linspace(-3, 0, HV).to(device, wide))

    def forward(self, x: Tensor, documents=None) -> Tensor:
        """`documents`: the table of packed documents, B = 1."""
        mixed = F.linear(x, self.in_proj)
        if self.joined:
            y = gated_delta_mixer(
                mixed,
                F.linear(x, self.in_proj_ba),
                conv_weight=self.conv1d,
                norm_weight=self.out_norm,
                A_log=self.A_log,
                dt_bias=self.dt_bias,
                num_key_heads=self.heads[0],
                num_value_heads=self.heads[1],
                key_head_dim=self.K,
                cu_seqlens=documents,
                backend=self.backend,
            )
            return F.linear(y.flatten(2), self.out_proj)
        beta, alpha = F.linear(x, self.in_proj_ba).chunk(2, -1)
        options = dict(cu_seqlens=documents, backend=self.backend)
        qkv, _ = causal_conv1d(mixed[..., : sum(self.widths)], self.conv1d, **options)
        q, k, v = qkv.split(self.widths, -1)
        o, _ = chunk_gated_delta_rule(
            q.unflatten(-1, (-1, self.K)),
            k.unflatten(-1, (-1, self.K)),
            v.unflatten(-1, (-1, self.V)),
            g=gated_delta_gate(alpha, self.A_log, self.dt_bias, backend=self.backend),
            beta=beta.to(self.A_log.dtype).sigmoid(),
            use_qk_l2norm_in_kernel=True,
            **options,
        )
        z = mixed[..., sum(self.widths) :].unflatten(-1, (-1, self.V))
        return F.linear(rms_norm_gated(o, self.out_norm, z, backend=self.backend).flatten(2), self.out_proj)
