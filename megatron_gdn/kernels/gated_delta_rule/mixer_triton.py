"""All of a Gated DeltaNet layer between its projections, in Triton: convolution, gates, rule, gated norm.

The same kernels as one by one, and `inputs_triton` in front. What is won is traffic around them: the gradients of q, k
and v go where the convolution reads them, and those of its input and of z side by side into the gradient of the
projection. One by one, autograd joins dq, dk, dv, fills two zero tensors as wide as the projection, copies a part into
each and adds them. Per token in 16 bits, for 16 and 32 heads of 128 (P = 12288 columns, D = 8192 of them convolved):

    join dq, dk, dv             4 D B                         32.8 kB
    two zero tensors            2 * 2 P B                     49.2 kB
    copy a part into each       4 P B                         49.2 kB
    their sum                   3 * 2 P B                     73.7 kB
    q, no longer read           2 H K B                        4.1 kB

At 3.0 TB/s, 209 kB are 70 ns; the kernels of the rule's backward pass move 202 kB.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gdn.kernels import causal_conv1d_triton, gated_rms_norm_triton
from megatron_gdn.kernels.gated_delta_rule import gate_triton
from megatron_gdn.kernels.gated_delta_rule.inputs_triton import inputs
from megatron_gdn.kernels.gated_delta_rule.prepare import Prepared
from megatron_gdn.kernels.gated_delta_rule.triton_chunk import TritonSetting, run_backward, run_forward
from megatron_gdn.kernels.triton_support.tiles import with_unit_stride
from megatron_gdn.kernels.varlen import ChunkTable


@dataclass(frozen=True, kw_only=True, slots=True)
class MixerSetting:
    """What forward and backward share besides tensors.

    heads: H, HV.
    sizes: K, V.
    eps: of the gated norm.
    rule: of the rule; its scale and its table.
    documents: the table of packed documents; None: every row of the batch is a sequence.
    """

    heads: tuple[int, int]
    sizes: tuple[int, int]
    eps: float
    rule: TritonSetting
    documents: ChunkTable | None

    @property
    def widths(self) -> list[int]:
        """Channels of q, k, v."""
        (H, HV), (K, V) = self.heads, self.sizes
        return [H * K, H * K, HV * V]

    @property
    def beta_max(self) -> float:
        return 2.0 if self.rule.negative_eigenvalues else 1.0

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of q, k `[B, T, H, K]` and v `[B, T, HV, V]`."""
        sizes = (self.sizes[0], self.sizes[0], self.sizes[1])
        return tuple(x.unflatten(-1, (-1, D)) for x, D in zip(qkv.split(self.widths, -1), sizes, strict=True))

    def gate_of(self, mixed: Tensor) -> Tensor | None:
        """The view of z `[B, T, HV, V]`, the columns after those of q, k and v; None where there are none."""
        width = sum(self.widths)
        return mixed[..., width:].unflatten(-1, (-1, self.sizes[1])) if mixed.shape[-1] > width else None


class TritonMixer(torch.autograd.Function):
    """apply(mixed, gates, conv_weight, norm_weight, A_log, dt_bias, setting) -> y `[B, T, HV, V]`.

    Saves its inputs, q, k, v after the convolution, o, and what the rule saves.
    """

    @staticmethod
    def forward(ctx, mixed, gates, conv_weight, norm_weight, A_log, dt_bias, setting: MixerSetting):
        mixed, gates, HV = with_unit_stride(mixed), with_unit_stride(gates), setting.heads[1]
        alpha = None if A_log is None else gates[..., HV:]
        qkv, g, beta, norms = inputs(
            mixed,
            alpha,
            gates[..., :HV],
            conv_weight,
            A_log,
            dt_bias,
            heads=setting.heads,
            sizes=setting.sizes,
            table=setting.rule.table,
            l2norm_eps=setting.rule.l2norm_eps,
            beta_max=setting.beta_max,
        )
        q, k, v = setting.split(qkv)
        o, _, prepared, S, U = run_forward(q, k, v, g, beta, None, setting.rule, norms=norms)
        y, r = gated_rms_norm_triton.forward(o, norm_weight, setting.gate_of(mixed), setting.eps, "silu")
        kept = (None, None) if setting.rule.recompute_states else (S, U)
        of_rule = (prepared.G, prepared.T, prepared.rq, prepared.rk, *kept)
        ctx.save_for_backward(mixed, gates, conv_weight, norm_weight, A_log, dt_bias, qkv, beta, o, r, *of_rule)
        ctx.setting = setting
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        mixed, gates, conv_weight, norm_weight, A_log, dt_bias, qkv, beta, o, r, *of_rule = ctx.saved_tensors
        setting, (G, T, rq, rk, S, U) = ctx.setting, of_rule
        HV, width = setting.heads[1], sum(setting.widths)
        dmixed, dgates, dqkv = torch.empty_like(mixed), torch.empty_like(gates), torch.empty_like(qkv)
        do, dnorm_weight, _ = gated_rms_norm_triton.backward(
            dy, o, norm_weight, setting.gate_of(mixed), r, "silu", dz=setting.gate_of(dmixed)
        )
        prepared = Prepared(G=G, T=T, rq=rq, rk=rk)
        into = setting.split(dqkv)
        (*_, dg, dbeta), _ = run_backward(
            do, None, *setting.split(qkv), beta, None, prepared, S, U, setting.rule, into=into
        )
        dA_log = ddt_bias = None
        if A_log is None:
            dgates.copy_(dbeta * beta * (1 - beta / setting.beta_max))
        else:
            b, alpha = gates.split(HV, -1)
            db, dalpha = dgates.split(HV, -1)
            *_, dA_log, ddt_bias = gate_triton.backward(
                dg, dbeta, alpha, b, A_log, dt_bias, setting.beta_max, dalpha=dalpha, db=db
            )
        _, dconv_weight, *_ = causal_conv1d_triton.backward(
            dqkv, None, mixed[..., :width], conv_weight, None, None, setting.documents, "silu", dx=dmixed[..., :width]
        )
        return dmixed, dgates, dconv_weight, dnorm_weight, dA_log, ddt_bias, None
