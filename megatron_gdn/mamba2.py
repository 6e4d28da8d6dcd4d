"""The Mamba2 mixer (arXiv 2405.21060) as Megatron's `self_attention`.

    z, x, B, C = in_proj(h)          dt = in_proj_dt(h)
    x, B, C    = silu(conv1d(x, B, C) + bias)
    dt         = softplus(dt + dt_bias)                  (float32)
    A          = -exp(A_log)                             (float32)
    y          = ssd(x, dt, A, B, C) + D x
    out        = out_proj(rms_norm(y * silu(z)))         over the channels of each group

Heads are sharded over tensor-parallel ranks, evenly or not (`megatron_gdn.sections`), and so are groups. With fewer
groups than ranks, the ranks of a group compute a part of its B and C each, exchange them after the convolution, and sum
the squares of their channels for the norm. No weight lies on two ranks, so gradients, their norm and checkpoints need
no special care. dt has a projection of its own: it stays in the parameter dtype when the large projection runs in FP8.
On disk the keys are those of Megatron's MambaMixer (`in_proj.weight.z`, ...).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megatron_gdn import initialization as init
from megatron_gdn.documents import chunk_table_of
from megatron_gdn.kernels import causal_conv1d, ssd
from megatron_gdn.parallel.context import context_causal_conv1d, context_ssd, start_conv_halo
from megatron_gdn.parallel.host import fragments_of
from megatron_gdn.sections import check_mamba2, local_sizes, mamba2_sections
from megatron_gdn.sharded_sections import split_on_disk

_FLOAT32_PARAMETERS = ("A_log", "dt_bias", "D")
"""In float32, whatever dtype the layer has."""


@dataclass
class Mamba2Submodules:
    """Linear layers of the mixer.

    in_proj: column-parallel, hidden -> z, x, B, C.
    in_proj_dt: column-parallel, hidden -> dt.
    out_proj: row-parallel, heads -> hidden.
    """

    in_proj: ModuleSpec | type = IdentityOp
    in_proj_dt: ModuleSpec | type = IdentityOp
    out_proj: ModuleSpec | type = IdentityOp


class ShortConv1dWithBias(torch.nn.Module):
    """Weight `[local channels, 1, width]` and bias `[local channels]` of the depthwise convolution over x, B and C."""

    def __init__(self, channels: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(channels, 1, width, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.empty(channels, dtype=dtype))


class LocalGroups:
    """The groups whose heads a tensor-parallel rank holds, and what its ranks exchange where they share a group.

    Args:
        num_groups: of the layer; a multiple of the ranks, or a divisor.
        tp_group: tensor-parallel process group.
    """

    def __init__(self, num_groups: int, tp_group):
        self.tp_group, self.num_groups, size = tp_group, num_groups, tp_group.size()
        self.count = max(1, num_groups // size)
        """Groups of this rank."""
        self.ranks_per_group = max(1, size // num_groups)
        """Ranks that share a group; with more than one, `count` is 1."""
        self.own = tp_group.rank() // self.ranks_per_group
        """The shared group of this rank."""

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of the rank's groups, `[..., rows of all its ranks]`, from its own rows; backward sums over ranks.

        All tensor-parallel ranks take part in one collective: groups of their own would have to be made on every rank
        of the world, also on those whose pipeline stage has no such layer.
        """
        if self.ranks_per_group == 1:
            return rows
        everyone = gather_from_sequence_parallel_region(rows.unsqueeze(0), group=self.tp_group)
        mine = everyone[self.own * self.ranks_per_group : (self.own + 1) * self.ranks_per_group]
        return mine.movedim(0, -2).flatten(-2)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks that share this rank's group; not differentiable."""
        if self.ranks_per_group == 1:
            return x
        slots = x.new_zeros(self.num_groups, *x.shape)
        slots[self.own] = x
        dist.all_reduce(slots, group=self.tp_group)
        return slots[self.own]


class _GateThenNorm(torch.autograd.Function):
    """u = y silu(z), out = u r w, r = (mean u^2 + eps)^-1/2 over a group; saves the inputs and r.

    dh = dout w, h = u r        du = r (dh - h mean(h dh))        dw = sum dout h
    dy = du silu(z)        dz = du y silu'(z)
    """

    @staticmethod
    def forward(ctx, y, z, weight, eps, num_channels, groups: LocalGroups):
        """y, z `[..., local channels]`, weight `[local channels]`; num_channels: of a group over all its ranks."""
        dtype = torch.promote_types(y.dtype, torch.float32)
        u = F.silu(z.to(dtype)).mul_(y).unflatten(-1, (groups.count, -1))
        r = groups.sum(u.square().sum(-1, keepdim=True)).div_(num_channels).add_(eps).rsqrt_()
        ctx.save_for_backward(y, z, weight, r)
        ctx.num_channels, ctx.groups = num_channels, groups
        return u.mul_(r).flatten(-2).mul_(weight).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        y, z, weight, r = ctx.saved_tensors
        wide, dout, groups = z.to(r.dtype), dout.to(r.dtype), ctx.groups
        s = wide.sigmoid()
        gate = wide * s
        h = (gate * y).unflatten(-1, (groups.count, -1)) * r
        dweight = (dout * h.flatten(-2)).sum_to_size(weight.shape)
        dh = (dout * weight).unflatten(-1, (groups.count, -1))
        mean = groups.sum((dh * h).sum(-1, keepdim=True)).div_(ctx.num_channels)
        du = dh.sub_(h.mul_(mean)).mul_(r).flatten(-2)
        # silu'(z) = s + silu(z) (1 - s)
        dz = s.add_(gate * (1 - s)).mul_(du).mul_(y)
        return du.mul_(gate).to(y.dtype), dz.to(z.dtype), dweight.to(weight.dtype), None, None, None


class GatedGroupRMSNorm(torch.nn.Module):
    """out = rms_norm(y * silu(z)) * weight over the channels of each group: Mamba2's order, first the gate.

    Float32 inside. Where ranks share a group, their sums of squares are added, so the result does not depend on the
    number of ranks; the weight is sharded as the channels are.

    Args:
        channels: of this rank, ghosts included.
        group_channels: of one group over all its ranks.
        eps: added to the mean square.
        groups: of this rank.
        dtype: of the weight.
    """

    def __init__(self, channels: int, *, group_channels: int, eps: float, groups: LocalGroups, dtype: torch.dtype):
        super().__init__()
        self.eps, self.group_channels, self.groups = eps, group_channels, groups
        self.weight = torch.nn.Parameter(torch.ones(channels, dtype=dtype))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """`y`, `z` and the result are `[..., channels]`."""
        return _GateThenNorm.apply(y, z, self.weight, self.eps, self.group_channels, self.groups)


def _no_init(weight: Tensor) -> None:
    """The mixer fills the weights of its linear layers itself, section by section."""


class Mamba2(MegatronModule):
    """Mamba2 layer, `[s, b, h]` in and out.

    Args:
        config: Megatron's TransformerConfig; reads hidden_size, mamba_num_heads, mamba_head_dim, mamba_num_groups,
            mamba_state_dim, linear_conv_kernel_dim, layernorm_epsilon.
        submodules: the linear layers.
        layer_number: global number of the layer, from 1; part of the names that seed the initial weights.
        pg_collection: process groups; reads `tp` and `cp`.
        scale_out_proj: draw out_proj with the host's `output_layer_init_method`; False: with `init_method`.
        A_init_range: range of A at the start; Mamba2 draws A ~ U(1, 16).
        state_exchange: between context-parallel ranks, "all_gather" or "scan", see `megatron_gdn.parallel.state`.
        backend: kernel backend: "auto", "torch" or "triton".

    Raises:
        ValueError: heads or groups that do not fit together or the number of ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Mamba2Submodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        scale_out_proj: bool = True,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        state_exchange: str = "all_gather",
        backend: str = "auto",
        **host_kwargs,
    ):
        # Hosts differ in what they pass (cp_comm_type, pp_layer_offset, name, ...); none of it applies here.
        super().__init__(config)
        self.pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.tp_group = self.pg_collection.tp
        self.tp_rank, self.tp_size = self.tp_group.rank(), self.tp_group.size()
        self.cp_group, self.state_exchange = self.pg_collection.cp, state_exchange
        check_mamba2(config, self.tp_size)
        self.layer_number = layer_number
        self.observer = None
        """Called with tensors of the next forward pass, see megatron_gdn/training/health.py."""
        self.scale_out_proj, self.A_init_range, self.backend = scale_out_proj, A_init_range, backend
        self.head_dim = config.mamba_head_dim
        self.groups = LocalGroups(config.mamba_num_groups, self.tp_group)
        self.sections = mamba2_sections(
            num_heads=config.mamba_num_heads,
            head_dim=config.mamba_head_dim,
            num_groups=config.mamba_num_groups,
            state_dim=config.mamba_state_dim,
        )
        self._build(submodules)
        if config.perform_initialization:
            self.reset_parameters(torch.initial_seed())

    def _build(self, submodules: Mamba2Submodules) -> None:
        config = self.config
        common = dict(config=config, bias=False, is_expert=False, tp_group=self.tp_group)
        for name in ("in_proj", "in_proj_dt"):
            linear = build_module(
                getattr(submodules, name),
                config.hidden_size,
                self._local_rows(name) * self.tp_size,
                init_method=_no_init,
                gather_output=False,
                skip_bias_add=False,
                tp_comm_buffer_name=name,
                **common,
            )
            setattr(self, name, linear)
        self.out_proj = build_module(
            submodules.out_proj,
            self._local_rows("out_proj") * self.tp_size,
            config.hidden_size,
            init_method=_no_init,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="out_proj",
            **common,
        )
        device, dtype = self.out_proj.weight.device, config.params_dtype
        width = config.linear_conv_kernel_dim
        self.conv1d = ShortConv1dWithBias(self._local_rows("conv1d"), width, dtype).to(device)
        for name in _FLOAT32_PARAMETERS:
            data = torch.empty(self._local_rows(name), dtype=torch.float32, device=device)
            self.register_parameter(name, torch.nn.Parameter(data))
        self.norm = GatedGroupRMSNorm(
            self._local_rows("norm"),
            group_channels=config.mamba_num_heads * self.head_dim // config.mamba_num_groups,
            eps=config.layernorm_epsilon,
            groups=self.groups,
            dtype=dtype,
        ).to(device)
        for name, module in self._modules_of_parameters.items():
            init.mark_sharded(self.get_parameter(name), _sharded_dim(module))

    def _local_rows(self, module: str) -> int:
        return sum(local_sizes(self.sections[module], self.tp_size))

    @property
    def _modules_of_parameters(self) -> dict[str, str]:
        """Every parameter, and the key of its sections."""
        weights = {f"{module}.weight": module for module in self.sections if module not in _FLOAT32_PARAMETERS}
        return weights | {"conv1d.bias": "conv1d"} | {name: name for name in _FLOAT32_PARAMETERS}

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draw the initial weights; the global weights are the same at every tensor-parallel size.

        Linear layers use the host's `init_method` and `output_layer_init_method`; the convolution and its bias are
        uniform in +-1/sqrt(width), as torch's Conv1d; A ~ U(A_init_range); softplus(dt_bias) is log-uniform in
        [1e-3, 0.1]; D and the norm are ones.

        Args:
            seed: seed of the model.
        """
        config = self.config
        bound = config.linear_conv_kernel_dim**-0.5
        low, high = self.A_init_range
        methods = {
            "in_proj.weight": config.init_method,
            "in_proj_dt.weight": config.init_method,
            "conv1d.weight": lambda weight: weight.uniform_(-bound, bound),
            "conv1d.bias": lambda bias: bias.uniform_(-bound, bound),
            "A_log": lambda A_log: init.log_uniform_decay(A_log, low=low, high=high),
            "dt_bias": init.log_uniform_dt_bias,
            "D": torch.nn.init.ones_,
            "norm.weight": torch.nn.init.ones_,
            "out_proj.weight": config.output_layer_init_method if self.scale_out_proj else config.init_method,
        }
        for name, module in self._modules_of_parameters.items():
            init.fill_sections(
                self.get_parameter(name),
                self.sections[module],
                seed=seed,
                name=f"layers.{self.layer_number}.{_key_on_disk(name)}",
                init_method=methods[name],
                rank=self.tp_rank,
                size=self.tp_size,
                dim=_sharded_dim(module),
            )

    def _apply(self, fn, recurse=True):
        """`A_log`, `dt_bias` and `D` follow a move to another device, never a change of dtype such as `.bfloat16()`."""
        kept = {name: self._parameters[name].data for name in _FLOAT32_PARAMETERS}
        super()._apply(fn, recurse)
        for name, data in kept.items():
            param = self._parameters[name]
            if param.dtype != torch.float32:
                param.data = data.to(param.device)
        return self

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inference_context=None,
        packed_seq_params: PackedSeqParams | None = None,
        **host_kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix tokens.

        Args:
            hidden_states: `[s, b, h]`, with sequence parallelism `[s / tp, b, h]`.
            attention_mask: ignored, the mixer is causal.
            inference_context: must be None.
            packed_seq_params: documents packed along s with b = 1, see `chunk_table_of`. State and convolution restart
                at each document. Under context parallelism `FragmentParams`, or None for Megatron's zigzag batches.
            host_kwargs: rotary embeddings and the like, which the mixer has no use for.

        Returns:
            `[s, b, h]` as it came in, and the bias of `out_proj`, None.

        Raises:
            ValueError: an inference context; see `megatron_gdn.parallel.host.fragments_of`.
        """
        if inference_context is not None:
            raise ValueError(
                f"inference_context ({type(inference_context).__name__}) must be None: "
                "Mamba2 has no cached decoding under Megatron; run the whole sequence."
            )
        mixed, _ = self.in_proj(hidden_states)  # [s, b, z + x + B + C] of this rank
        z, xBC = mixed.transpose(0, 1).split([self._local_rows("norm"), self._local_rows("conv1d")], dim=-1)
        fragments = fragments_of(packed_seq_params, xBC.shape[1], self.cp_group, device=xBC.device)
        documents = halo = None
        if fragments is not None:
            halo = start_conv_halo(xBC, self.config.linear_conv_kernel_dim, fragments)
        else:
            documents = chunk_table_of(packed_seq_params, device=hidden_states.device)
        steps, _ = self.in_proj_dt(hidden_states)  # [s, b, H], while rows of other ranks arrive
        dt, A = F.softplus(steps.transpose(0, 1).float() + self.dt_bias), -self.A_log.exp()
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if fragments is not None:
            xBC = context_causal_conv1d(xBC, weight, bias, fragments=fragments, halo=halo, backend=self.backend)
        else:
            xBC, _ = causal_conv1d(xBC, weight, bias, activation="silu", cu_seqlens=documents, backend=self.backend)
        x, B, C = self._split(xBC)
        model = dict(dt=dt, A=A, B=B, C=C, D=self.D, backend=self.backend)
        if fragments is not None:
            y, state = context_ssd(x, fragments=fragments, state_exchange=self.state_exchange, **model)
        else:
            y, state = ssd(x, output_final_state=self.observer is not None, cu_seqlens=documents, **model)
        if self.observer is not None:
            own = self.sections["in_proj_dt"][0].local_heads(self.tp_rank, self.tp_size)
            gate = z[..., : own * self.head_dim]
            self.observer({"alpha": (dt * A).exp()[..., :own], "state": state[:, :own], "gate": gate})
        y = self.norm(y.flatten(2), z)
        return self.out_proj(y.transpose(0, 1).contiguous())

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[b, s, local rows]` to x `[b, s, H, P]` and B, C `[b, s, G, N]` of this rank's heads and groups."""
        channels = self._local_rows("norm")
        BC = self.groups.gather(xBC[..., channels:].unflatten(-1, (2, -1)))  # [b, s, 2, G N]
        B, C = BC.unflatten(-1, (self.groups.count, -1)).unbind(2)
        return xBC[..., :channels].unflatten(-1, (-1, self.head_dim)), B, C

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None, **_):
        """Sharded tensors under the keys of Megatron's MambaMixer, one per section of a fused weight.

        Args:
            prefix: prefix of the keys.
            sharded_offsets: offsets that the block adds, for stacked layers.
            metadata: Megatron's; a missing `dp_cp_group` is filled in.

        Returns:
            Megatron's sharded state dict.
        """
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        groups = dict(tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"])
        names = (*_FLOAT32_PARAMETERS, "conv1d.weight", "conv1d.bias", "norm.weight")
        own = {name: self.get_parameter(name) for name in names}
        state = make_sharded_tensors_for_checkpoint(own, prefix, dict.fromkeys(own, 0), sharded_offsets, **groups)
        for name in ("in_proj", "in_proj_dt", "out_proj"):
            module = getattr(self, name)
            state |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        for name, module in self._modules_of_parameters.items():
            state[prefix + name] = split_on_disk(
                state[prefix + name],
                prefix + _key_on_disk(name),
                self.sections[module],
                rank=self.tp_rank,
                size=self.tp_size,
                dim=_sharded_dim(module),
            )
        return state


def _sharded_dim(module: str) -> int:
    """The dimension of a module's parameters along which its sections lie."""
    return 1 if module == "out_proj" else 0


def _key_on_disk(name: str) -> str:
    """Megatron has dt in in_proj; on disk ours is there too."""
    return name.replace("in_proj_dt", "in_proj")
