"""The Gated DeltaNet mixer (arXiv 2412.06464) as Megatron's `self_attention`.

    q, k, v, z = in_proj(x)          beta, alpha = in_proj_ba(x)
    q, k, v    = silu(conv1d(q, k, v))
    g          = -exp(A_log) * softplus(alpha + dt_bias)         (float32)
    beta       = sigmoid(beta), doubled with allow_neg_eigval    (float32)
    o          = gated_delta_rule(q / |q|, k / |k|, v, g, beta)
    y          = out_proj(rms_norm(o) * silu(z))

Heads are sharded over tensor-parallel ranks, evenly or not (`megatron_gdn.sections`). beta and alpha have a projection
of their own: they stay in the parameter dtype when the large projection runs in FP8. On disk the keys are Megatron's
(`in_proj.weight.query`, ...).
"""

import math
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
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

from megatron_gdn import initialization as init
from megatron_gdn.documents import chunk_table_of
from megatron_gdn.kernels import (
    ChunkTable,
    causal_conv1d,
    chunk_gated_delta_rule,
    gated_delta_gate,
    gated_delta_mixer,
)
from megatron_gdn.kernels.backend import resolve_backend
from megatron_gdn.norms import GatedRMSNorm
from megatron_gdn.parallel.context import context_causal_conv1d, context_gated_delta_rule, start_conv_halo
from megatron_gdn.parallel.exchange import PendingRows
from megatron_gdn.parallel.fragments import Fragments
from megatron_gdn.parallel.host import fragments_of
from megatron_gdn.sections import gated_delta_net_sections, local_sizes, pad_ghosts
from megatron_gdn.sharded_sections import split_on_disk


@dataclass
class GatedDeltaNetSubmodules:
    """Linear layers of the mixer.

    in_proj: column-parallel, hidden -> q, k, v, z.
    in_proj_ba: column-parallel, hidden -> beta, alpha.
    out_proj: row-parallel, value heads -> hidden.
    """

    in_proj: ModuleSpec | type = IdentityOp
    in_proj_ba: ModuleSpec | type = IdentityOp
    out_proj: ModuleSpec | type = IdentityOp


class ShortConv1d(torch.nn.Module):
    """The weight of the depthwise convolution over q, k and v: `[local channels, 1, width]`."""

    def __init__(self, channels: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(channels, 1, width, dtype=dtype))


def _no_init(weight: Tensor) -> None:
    """The mixer fills the weights of its linear layers itself, section by section."""


class GatedDeltaNet(MegatronModule):
    """Gated DeltaNet layer, `[s, b, h]` in and out.

    Args:
        config: Megatron's TransformerConfig; reads hidden_size, linear_num_key_heads, linear_num_value_heads,
            linear_key_head_dim, linear_value_head_dim, linear_conv_kernel_dim, layernorm_epsilon.
        submodules: the linear layers.
        layer_number: global number of the layer, from 1; part of the names that seed the initial weights.
        pg_collection: process groups; reads `tp` and `cp`.
        allow_neg_eigval: beta in (0, 2) instead of (0, 1), which lets the state transition have negative eigenvalues.
        use_output_gate: multiply the normalised output by silu(z).
        use_qk_l2norm: L2-normalise q and k in the kernel.
        use_decay: project alpha and let the state decay; False is DeltaNet (arXiv 2406.06484).
        scale_out_proj: draw out_proj with the host's `output_layer_init_method`; False: with `init_method`.
        A_init_range: range of A at the start; the paper's code draws A ~ U(0, 16).
        row_multiple: fill the rows of in_proj and the columns of out_proj on each rank up to a multiple of this, with
            zeros that change no result and are in no checkpoint; FP8 wants 16 or 32.
        state_exchange: between context-parallel ranks, "all_gather" or "scan", see `megatron_gdn.parallel.state`.
        backend: kernel backend: "auto", "torch" or "triton". With triton, what lies between the projections is one
            operation (kernels/gated_delta_rule/mixer.py), unless an observer looks inside or ranks share a sequence.

    Raises:
        ValueError: value heads that are no multiple of key heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        allow_neg_eigval: bool = False,
        use_output_gate: bool = True,
        use_qk_l2norm: bool = True,
        use_decay: bool = True,
        scale_out_proj: bool = True,
        A_init_range: tuple[float, float] = (0.0, 16.0),
        row_multiple: int = 1,
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
        check_heads(config)
        self.layer_number = layer_number
        self.observer = None
        """Called with tensors of the next forward pass, see megatron_gdn/training/health.py."""
        self.allow_neg_eigval, self.use_qk_l2norm = allow_neg_eigval, use_qk_l2norm
        self.use_decay, self.scale_out_proj = use_decay, scale_out_proj
        self.A_init_range, self.row_multiple, self.backend = A_init_range, row_multiple, backend
        self.key_head_dim, self.value_head_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.sections = gated_delta_net_sections(
            num_key_heads=config.linear_num_key_heads,
            num_value_heads=config.linear_num_value_heads,
            key_head_dim=self.key_head_dim,
            value_head_dim=self.value_head_dim,
            output_gate=use_output_gate,
            decay=use_decay,
        )
        self._build(submodules)
        if config.perform_initialization:
            self.reset_parameters(torch.initial_seed())

    def _build(self, submodules: GatedDeltaNetSubmodules) -> None:
        config = self.config
        common = dict(config=config, bias=False, is_expert=False, tp_group=self.tp_group)
        for name in ("in_proj", "in_proj_ba"):
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
        device = self.out_proj.weight.device
        channels = sum(local_sizes(self.sections["conv1d"], self.tp_size))
        self.conv1d = ShortConv1d(channels, config.linear_conv_kernel_dim, config.params_dtype).to(device)
        for name in self._gate_parameters:
            (heads,) = local_sizes(self.sections[name], self.tp_size)
            self.register_parameter(name, torch.nn.Parameter(torch.empty(heads, dtype=torch.float32, device=device)))
            init.mark_sharded(self.get_parameter(name), 0)
        for param in (self.in_proj.weight, self.in_proj_ba.weight, self.conv1d.weight):
            init.mark_sharded(param, 0)
        init.mark_sharded(self.out_proj.weight, 1)
        self.out_norm = GatedRMSNorm(
            self.value_head_dim,
            eps=config.layernorm_epsilon,
            tp_group=self.tp_group,
            dtype=config.params_dtype,
            backend=self.backend,
        ).to(device)

    def _local_rows(self, name: str) -> int:
        """Rows (`out_proj`: columns) of a linear layer on each rank, ghosts and filling included."""
        rows = sum(local_sizes(self.sections[name], self.tp_size))
        return rows if name == "in_proj_ba" else math.ceil(rows / self.row_multiple) * self.row_multiple

    @property
    def _gate_parameters(self) -> tuple[str, ...]:
        """Parameters in float32, whatever dtype the layer has."""
        return ("A_log", "dt_bias") if self.use_decay else ()

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draw the initial weights; the global weights are the same at every tensor-parallel size.

        Linear layers use the host's `init_method` and `output_layer_init_method`; the convolution is uniform in
        +-1/sqrt(width), as torch's Conv1d; A ~ U(A_init_range); softplus(dt_bias) is log-uniform in [1e-3, 0.1].

        Args:
            seed: seed of the model.
        """
        prefix = f"layers.{self.layer_number}"
        bound = self.config.linear_conv_kernel_dim**-0.5
        low, high = self.A_init_range
        config = self.config
        methods = {
            "in_proj.weight": config.init_method,
            "in_proj_ba.weight": config.init_method,
            "conv1d.weight": lambda weight: weight.uniform_(-bound, bound),
            "A_log": lambda A_log: init.log_uniform_decay(A_log, low=low, high=high),
            "dt_bias": init.log_uniform_dt_bias,
            "out_proj.weight": config.output_layer_init_method if self.scale_out_proj else config.init_method,
        }
        for module, sections in self.sections.items():
            name = module if module in self._gate_parameters else f"{module}.weight"
            init.fill_sections(
                self.get_parameter(name),
                sections,
                seed=seed,
                name=f"{prefix}.{_key_on_disk(name)}",
                init_method=methods[name],
                rank=self.tp_rank,
                size=self.tp_size,
                dim=1 if module == "out_proj" else 0,
            )

    def _apply(self, fn, recurse=True):
        """`A_log` and `dt_bias` follow a move to another device, never a change of dtype such as `.bfloat16()`."""
        kept = {name: self._parameters[name].data for name in self._gate_parameters}
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
                "Gated DeltaNet has no cached decoding under Megatron; run the whole sequence."
            )
        mixed, _ = self.in_proj(hidden_states)  # [s, b, q + k + v + z] of this rank's heads
        mixed = mixed.transpose(0, 1)
        fragments = fragments_of(packed_seq_params, mixed.shape[1], self.cp_group, device=mixed.device)
        documents = halo = None
        if fragments is not None:
            width = sum(local_sizes(self.sections["conv1d"], self.tp_size))
            halo = start_conv_halo(mixed[..., :width], self.config.linear_conv_kernel_dim, fragments)
        else:
            documents = chunk_table_of(packed_seq_params, device=hidden_states.device)
        gates, _ = self.in_proj_ba(hidden_states)  # while rows of other ranks arrive
        gates = gates.transpose(0, 1)
        joined = fragments is None and self.observer is None
        if joined and resolve_backend(self.backend, mixed.device) == "triton":
            return self._project_out(self._mix(mixed, gates, documents))
        beta, g = self._gates(gates)
        q, k, v, z = self._conv_and_split(mixed, documents, fragments, halo)
        rule = dict(
            g=g,
            beta=beta,
            use_qk_l2norm_in_kernel=self.use_qk_l2norm,
            allow_neg_eigval=self.allow_neg_eigval,
            backend=self.backend,
        )
        if fragments is not None:
            o, state = context_gated_delta_rule(
                q, k, v, fragments=fragments, state_exchange=self.state_exchange, **rule
            )
        else:
            o, state = chunk_gated_delta_rule(
                q, k, v, output_final_state=self.observer is not None, cu_seqlens=documents, **rule
            )
        if self.observer is not None:
            own = self.sections["in_proj_ba"][0].local_heads(self.tp_rank, self.tp_size)
            seen = {"alpha": g.exp()[..., :own], "beta": beta[..., :own], "state": state[:, :own]}
            self.observer(seen if z is None else seen | {"gate": z[:, :, :own]})
        return self._project_out(self.out_norm(o, z))

    def _project_out(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """The layer's result from `[b, s, HV, V]`."""
        y = pad_ghosts(y.flatten(2), self._local_rows("out_proj"), dim=2)
        return self.out_proj(y.transpose(0, 1).contiguous())

    def _mix(self, mixed: Tensor, gates: Tensor, documents: ChunkTable | None) -> Tensor:
        """Convolution, gates, rule and norm as one operation: `[b, s, HV, V]` of this rank's heads."""
        used = sum(local_sizes(self.sections["in_proj"], self.tp_size))
        key_rows = local_sizes(self.sections["conv1d"], self.tp_size)[0]
        return gated_delta_mixer(
            mixed if mixed.shape[-1] == used else mixed[..., :used],
            gates,
            conv_weight=self.conv1d.weight.squeeze(1),
            norm_weight=self.out_norm.shared_weight(),
            A_log=self.A_log if self.use_decay else None,
            dt_bias=self.dt_bias if self.use_decay else None,
            num_key_heads=key_rows // self.key_head_dim,
            num_value_heads=local_sizes(self.sections["in_proj_ba"], self.tp_size)[0],
            key_head_dim=self.key_head_dim,
            eps=self.out_norm.eps,
            allow_neg_eigval=self.allow_neg_eigval,
            use_qk_l2norm=self.use_qk_l2norm,
            cu_seqlens=documents,
            backend="triton",
        )

    def _gates(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """beta and g, `[b, s, HV]` float32, from the local rows of in_proj_ba."""
        beta, *alpha = gates.split(local_sizes(self.sections["in_proj_ba"], self.tp_size), dim=-1)
        beta = beta.float().sigmoid()
        if self.allow_neg_eigval:
            beta = beta * 2.0
        if not self.use_decay:
            return beta, torch.zeros_like(beta)
        return beta, gated_delta_gate(alpha[0], self.A_log, self.dt_bias, backend=self.backend)

    def _conv_and_split(
        self, mixed: Tensor, documents: ChunkTable | None, fragments: Fragments | None, halo: PendingRows | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """`[b, s, local rows]` to q, k `[b, s, H, K]` and v, z `[b, s, HV, V]` of this rank's heads; z may be None."""
        sizes = local_sizes(self.sections["conv1d"], self.tp_size)
        width, used = sum(sizes), sum(local_sizes(self.sections["in_proj"], self.tp_size))
        x, weight = mixed[..., :width], self.conv1d.weight.squeeze(1)
        if fragments is not None:
            qkv = context_causal_conv1d(x, weight, fragments=fragments, halo=halo, backend=self.backend)
        else:
            qkv, _ = causal_conv1d(x, weight, activation="silu", cu_seqlens=documents, backend=self.backend)
        q, k, v = qkv.split(sizes, dim=-1)
        q, k = (x.unflatten(-1, (-1, self.key_head_dim)) for x in (q, k))
        z = mixed[..., width:used].unflatten(-1, (-1, self.value_head_dim)) if used > width else None
        return q, k, v.unflatten(-1, (-1, self.value_head_dim)), z

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None, **_):
        """Sharded tensors under Megatron's keys, one per section of a fused weight.

        Args:
            prefix: prefix of the keys.
            sharded_offsets: offsets that the block adds, for stacked layers.
            metadata: Megatron's; a missing `dp_cp_group` is filled in.

        Returns:
            Megatron's sharded state dict.
        """
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        groups = dict(tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"])
        own = {name: self.get_parameter(name) for name in (*self._gate_parameters, "conv1d.weight")}
        state = make_sharded_tensors_for_checkpoint(own, prefix, dict.fromkeys(own, 0), sharded_offsets, **groups)
        for name in ("in_proj", "in_proj_ba", "out_norm", "out_proj"):
            module = getattr(self, name)
            state |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        for module, sections in self.sections.items():
            name = module if module in self._gate_parameters else f"{module}.weight"
            state[prefix + name] = split_on_disk(
                state[prefix + name],
                prefix + _key_on_disk(name),
                sections,
                rank=self.tp_rank,
                size=self.tp_size,
                dim=1 if module == "out_proj" else 0,
            )
        return state


def _key_on_disk(name: str) -> str:
    """Megatron has beta and alpha in in_proj; on disk ours are there too."""
    return name.replace("in_proj_ba", "in_proj")


def check_heads(config: TransformerConfig) -> None:
    """Raise ValueError when value heads are not a multiple of key heads.

    Args:
        config: anything with linear_num_key_heads and linear_num_value_heads.
    """
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    if values % keys:
        raise ValueError(
            f"linear_num_value_heads ({values}) must be divisible by linear_num_key_heads ({keys}): "
            f"use {keys * max(1, values // keys)} value heads."
        )
