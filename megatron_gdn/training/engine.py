"""One optimizer step and one validation on Megatron-Core's public pieces: schedule, DDP, distributed optimizer."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_gdn.config import Config
from megatron_gdn.documents import PackedDocuments
from megatron_gdn.fp8.recipe import host_options
from megatron_gdn.hybrid.model import build_model, padded_vocab_size, transformer_config
from megatron_gdn.parallel.fragments import prepare_fragments
from megatron_gdn.parallel.host import FragmentParams
from megatron_gdn.providers import fuses_weight_gradients
from megatron_gdn.training.optimizer import build_optimizer
from megatron_gdn.training.packing import Batch, pack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(kw_only=True)
class MegatronEngine:
    """A model stage with its optimizer and schedule, driven by Megatron-Core.

    model: the stage itself, for checkpoints.
    wrapped: the stage under mixed precision and data parallelism, for computation.
    """

    config: Config
    model: GPTModel
    wrapped: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    device: torch.device

    @classmethod
    def build(cls, config: Config, *, vocab_size: int, device: torch.device) -> "MegatronEngine":
        """Build this rank's stage; needs Megatron's process groups.

        Args:
            config: the run.
            vocab_size: tokens of the vocabulary, before padding.
            device: of this rank.
        """
        fuse = fuses_weight_gradients(device)
        host_config, model = build_stage(config, vocab_size=vocab_size, device=device, fuse_weight_gradients=fuse)
        dtype = host_config.params_dtype
        overlap = config.parallel.overlap
        wrapped = DistributedDataParallel(
            host_config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=config.slices_optimizer,
                overlap_grad_reduce=overlap,
                overlap_param_gather=overlap and config.slices_optimizer,
            ),
            Float16Module(host_config, model) if dtype is torch.bfloat16 else model,
        )
        optimizer = build_optimizer(config, model, wrapped, dtype)
        host_config.grad_scale_func = optimizer.scale_loss
        host_config.finalize_model_grads_func = finalize_model_grads
        if overlap:
            host_config.no_sync_func = wrapped.no_sync
        if overlap and config.slices_optimizer:
            host_config.param_sync_func = wrapped.start_param_sync
        return cls(
            config=config,
            model=model,
            wrapped=wrapped,
            optimizer=optimizer,
            scheduler=build_scheduler(config, optimizer),
            device=device,
        )

    def forward_backward(
        self, batches: Iterator[Batch], num_microbatches: int, *, forward_only: bool = False
    ) -> Tensor:
        """Run the micro-batches of one step through the pipeline.

        Args:
            batches: yields `tokens`, `labels`, `loss_mask`, `position_ids`, each `[micro batch, s]` of whole samples,
                the same on all context-parallel ranks; where `data.documents` is separate, one starts where
                `position_ids` are 0.
            num_microbatches: how many to take.
            forward_only: no gradients.

        Returns:
            `[2]` float32 on the last pipeline stage, this rank's sum of losses in nats and its number of tokens;
            zeros on other stages.
        """
        if not forward_only:
            self.wrapped.zero_grad_buffer()
            self.optimizer.zero_grad()
        results = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=batches,
            model=self.wrapped,
            num_microbatches=num_microbatches,
            **self._activation_shape,
            forward_only=forward_only,
        )
        total = torch.zeros(2, device=self.device)
        for result in results:
            total += result["loss"]
        return total

    def update(self) -> float:
        """Clip, step the optimizer and the schedule.

        Returns:
            The global gradient norm before clipping.

        Raises:
            FloatingPointError: the norm is not finite; nothing was updated.
        """
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())  # waits for the device
        if not math.isfinite(grad_norm):
            # The norm is the same on every rank, so all of them stop here, with the weights of the last good step.
            raise FloatingPointError(
                f"the gradient norm is not finite ({grad_norm}): lower optimizer.lr, look for bad data in this step or "
                "resume from an older checkpoint."
            )
        max_norm = self.config.optimizer.clip_grad
        if max_norm > 0.0:
            for optimizer in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
                if params := optimizer.get_parameters():  # Apex's kernel takes no empty list
                    clip_grad_by_total_norm_fp32(params, max_norm=max_norm, total_norm=grad_norm)
        self.optimizer.step_with_ready_grads()
        self.scheduler.step(self.config.training.global_batch_size)
        return grad_norm

    def sync_parameters(self) -> None:
        """Gather the updated parameters that would otherwise arrive with the next forward pass; before a checkpoint."""
        if self.wrapped.ddp_config.overlap_param_gather:
            self.wrapped.start_param_sync(force_sync=True)

    def mean_loss(self, total: Tensor) -> float:
        """Nats per token over all data-parallel and context-parallel ranks, known on every rank.

        Args:
            total: from `forward_backward`, or a sum of such.
        """
        total = total.clone()
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            dist.broadcast(total, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        loss, num_tokens = total.tolist()
        return loss / max(num_tokens, 1.0)

    def gathered(self, *, modify: bool = False) -> AbstractContextManager:
        """Whole parameters of this stage inside the block; they always are.

        Args:
            modify: the block changes them, alike on every data-parallel rank.
        """
        return nullcontext()

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def _activation_shape(self) -> dict[str, int]:
        """What pipeline stages pass on: rows of samples, or one row that holds all documents of a micro-batch."""
        rows, tokens = self.config.training.micro_batch_size, self.config.training.sequence_length
        if self.config.data.documents == "separate":
            rows, tokens = 1, rows * tokens
        return dict(seq_length=tokens, micro_batch_size=rows)

    def _forward_step(self, batches: Iterator[Batch], model) -> tuple[Tensor, Callable]:
        batch, params = self._cut(next(batches))
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        loss_mask = batch["loss_mask"].flatten().float()

        def loss_function(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss = (losses.flatten().float() * loss_mask).sum()
            num_tokens = loss_mask.sum()
            return loss, num_tokens.to(torch.int), {"loss": torch.stack([loss.detach(), num_tokens])}

        options = dict(labels=batch["labels"], packed_seq_params=params)
        return model(batch["tokens"], batch["position_ids"], None, **options), loss_function

    def _cut(self, batch: Batch) -> tuple[Batch, PackedSeqParams | None]:
        """This context-parallel rank's tokens, and what tells every mixer which they are and where documents start."""
        bounds = None
        if self.config.data.documents == "separate":
            batch, bounds = pack(batch)
        parallel = self.config.parallel
        if parallel.context == 1:
            return batch, None if bounds is None else PackedDocuments.of(bounds, device=self.device)
        fragments = prepare_fragments(
            batch["tokens"].shape[1],
            layout=parallel.context_layout,
            group=parallel_state.get_context_parallel_group(),
            cu_seqlens=bounds,
            device=self.device,
        )
        return {name: fragments.local(value) for name, value in batch.items()}, FragmentParams.of(fragments)


def build_stage(
    config: Config, *, vocab_size: int, device: torch.device, fuse_weight_gradients: bool = False
) -> tuple[TransformerConfig, GPTModel]:
    """Megatron's configuration, and this rank's pipeline stage on its device.

    Args:
        config: the run.
        vocab_size: tokens of the vocabulary, before padding.
        device: of this rank.
        fuse_weight_gradients: linear layers add to the float32 buffers of Megatron's DDP, see `fuses_weight_gradients`.
    """
    host_config = transformer_config(
        config.model,
        config.parallel,
        dtype=DTYPES[config.training.precision],
        # The loss of a step is the mean over its tokens, however they fall into micro-batches and ranks.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=fuse_weight_gradients,
        **host_options(config.fp8),
        **_recompute(config.training.recompute),
    )
    model = build_model(
        host_config,
        config.model,
        vocab_size=padded_vocab_size(vocab_size, config.model.vocab_multiple),
        max_sequence_length=config.training.sequence_length,
        seed=config.run.seed,
        fp8=config.fp8,
        state_exchange=config.parallel.state_exchange,
    ).to(device)
    return host_config, model


def build_scheduler(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Learning-rate schedule over samples; lengths in the configuration are in tokens.

    Args:
        config: the run.
        optimizer: whose learning rate it sets.
    """
    training, settings = config.training, config.optimizer
    train_samples = training.train_steps * training.global_batch_size
    to_samples = training.sequence_length
    decay_tokens = settings.decay_tokens if settings.decay_tokens is not None else training.train_tokens // 10
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_tokens // to_samples,
        lr_decay_steps=train_samples,
        lr_decay_style={"cosine": "cosine", "wsd": "WSD", "constant": "constant"}[settings.schedule],
        wsd_decay_steps=max(1, decay_tokens // to_samples),
        lr_wsd_decay_style="linear",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=train_samples,
        wd_incr_style="constant",
    )


def _recompute(choice: str) -> dict:
    if choice == "none":
        return {}
    return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
