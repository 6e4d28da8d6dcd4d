"""Muon: momentum made orthogonal, for the matrices between the embedding and the output layer.

    B <- mu B + (1 - mu) G                           G: gradient, after clipping
    U  = mu B + (1 - mu) G                           with nesterov, else B
    O  = newton_schulz(U)                            about (U U^T)^(-1/2) U: every singular value near 1
    W <- (1 - lr decay) W - lr scale(rows, columns) O

Sources: https://kellerjordan.github.io/posts/muon/ (steps, coefficients, nesterov); arXiv 2502.16982 (decay, the scale
that gives updates the size of AdamW's). The arithmetic is that of torch.optim.Muon (torch 2.9 and later), which takes
a weight as one matrix; megatron-core 0.16.1's muon needs a package that PyPI calls a research project, and knows no
fused weight but an ungated linear_qkv, which it does not split by head.

What is one matrix here:

    weight                          matrices
    in_proj of Gated DeltaNet       each head of q, k, v and z
    linear_qkv of attention         each head of q, its gate, k and v
    in_proj of Mamba2               each head of z and x, each group of B and C
    linear_fc1 of a SwiGLU          gate, up
    out_proj, linear_proj, fc2      the weight

Taken as one, a fused weight would let the head with the largest gradient set the step of all others (Kimi K3, arXiv
2607.24653, section 2.5; GLM-5's Muon Split, arXiv 2602.15763). Everything else is AdamW's: embeddings and the output
layer, vectors, convolutions (Jordan, as above), and in_proj_ba and in_proj_dt, whose rows each make one number of one
head. A row has no directions that could be balanced, and all rows as one matrix would tie decays to write strengths and
heads to each other: gates want AdamW's step for each number.

Tensor parallelism changes nothing: heads lie whole on a rank; what does not (fc1, and weights split along their inputs)
is gathered, each rank makes the whole orthogonal and takes its part. Of data parallelism this file knows nothing: each
weight is given to one rank (megatron_gdn/training/owners.py), as five iterations on a weight of m x n, m <= n, are
5 (4 m m n + 2 m m m) FLOPs, which 64 ranks that all did them would spend more time on than on a step of 0.5 M tokens at
m = 2048.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_gdn.attention import HybridSelfAttention
from megatron_gdn.gated_delta_net import GatedDeltaNet
from megatron_gdn.mamba2 import Mamba2
from megatron_gdn.sections import Section, pad_ghosts

_EPSILON = 1e-7
"""Smallest norm that a matrix is divided by; torch.optim.Muon's."""


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """Neighbouring rows of a rank's weight that hold matrices of one size, one above the other.

    num_rows: on this rank, ghosts included.
    count: matrices in them, or in those of all ranks where they are gathered.
    matrix_rows: of one matrix without ghosts, which its scale is made from.
    gathered: tensor-parallel ranks hold parts of each matrix.
    """

    num_rows: int
    count: int
    matrix_rows: int
    gathered: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The matrices of a rank's weight.

    dim: 0: as the weight has them; 1: rows of the matrices are the weight's columns.
    parts: in order; what lies behind them fills the weight up and gets no update.
    """

    dim: int
    parts: tuple[Matrices, ...]


def layouts(model: torch.nn.Module, tp_size: int) -> dict[str, Layout]:
    """Layouts of the weights that are Muon's, by name.

    Args:
        model: a stage of a model, on one of `tp_size` tensor-parallel ranks.
        tp_size: tensor-parallel size.
    """
    found: dict[str, Layout] = {}
    for name, module in model.named_modules():
        if isinstance(module, GatedDeltaNet | Mamba2):
            parts = tuple(_of_section(section, module, tp_size) for section in module.sections["in_proj"])
            found[f"{name}.in_proj.weight"] = Layout(dim=0, parts=parts)
            section = module.sections["out_proj"][0]
            found[f"{name}.out_proj.weight"] = _columns(section.padded_rows(tp_size), section.num_rows, tp_size)
        elif isinstance(module, HybridSelfAttention):
            size = module.hidden_size_per_attention_head
            num_rows = module.linear_qkv.weight.shape[0]
            # With fewer key heads than ranks, a rank may hold a part of a head.
            split = num_rows % size != 0
            count = num_rows * (tp_size if split else 1) // size
            part = Matrices(num_rows=num_rows, count=count, matrix_rows=size, gathered=split)
            found[f"{name}.linear_qkv.weight"] = Layout(dim=0, parts=(part,))
            num_columns, section = module.linear_proj.weight.shape[1], module.sections["linear_proj"][0]
            found[f"{name}.linear_proj.weight"] = _columns(num_columns, section.num_rows, tp_size)
        elif isinstance(module, MLP):
            inner = module.linear_fc2.weight.shape[1]
            columns = _columns(inner, inner * tp_size, tp_size)
            found[f"{name}.linear_fc1.weight"] = Layout(dim=0, parts=columns.parts * 2)  # SwiGLU: gate, up
            found[f"{name}.linear_fc2.weight"] = columns
    return found


def _of_section(section: Section, module: GatedDeltaNet | Mamba2, tp_size: int) -> Matrices:
    """One matrix per head; Mamba2's table deals out rows of B and C one by one, whose heads are groups."""
    num_rows, size = section.padded_rows(tp_size), section.head_dim
    if isinstance(module, Mamba2) and section.name in ("B", "C"):
        size = module.config.mamba_state_dim
    split = num_rows % size != 0
    return Matrices(
        num_rows=num_rows,
        count=num_rows * (tp_size if split else 1) // size,
        matrix_rows=size,
        gathered=split,
    )


def _columns(num_columns: int, of_all_ranks: int, tp_size: int) -> Layout:
    """A weight split along its columns, as one matrix; ghosts count among a rank's columns only."""
    part = Matrices(num_rows=num_columns, count=1, matrix_rows=of_all_ranks, gathered=tp_size > 1)
    return Layout(dim=1, parts=(part,))


def newton_schulz(matrices: Tensor, *, coefficients: tuple[float, float, float], num_steps: int) -> Tensor:
    """Matrices with the same singular vectors and singular values near 1; zeros stay zeros.

    x <- a x + (b A + c A A) x with A = x x^T, from x divided by its Frobenius norm.

    Args:
        matrices: [count, m, n], in the dtype of the products.
        coefficients: a, b, c.
        num_steps: iterations.
    """
    a, b, c = coefficients
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPSILON)
    for _ in range(num_steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def update_scale(rule: str, rows: int, columns: int) -> float:
    """Factor of the learning rate for one matrix.

    Args:
        rule: match_rms_adamw: 0.2 sqrt(max(rows, columns)), a root mean square of about 0.2 (arXiv 2502.16982, section
            2.2). original: sqrt(max(1, rows / columns)) (Jordan).
        rows, columns: outputs and inputs of the matrix.
    """
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


class Muon(torch.optim.Optimizer):
    """Muon over the weights that a rank updates.

    Args:
        groups: parameter groups, which may be empty.
        layouts: of every parameter of all groups, in order; parameters may be replaced by master weights later.
        lr: learning rate.
        momentum: mu.
        nesterov: look one step ahead.
        coefficients, num_steps: see `newton_schulz`.
        scale: see `update_scale`.
        dtype: of the products and of what ranks send each other.
        tp_group: tensor-parallel ranks, which update parts of the same weights.
    """

    def __init__(
        self,
        groups: list[dict],
        layouts: Sequence[Layout],
        *,
        lr: float,
        momentum: float,
        nesterov: bool,
        coefficients: tuple[float, float, float],
        num_steps: int,
        scale: str,
        dtype: torch.dtype,
        tp_group: dist.ProcessGroup,
    ):
        super().__init__(groups, dict(lr=lr, weight_decay=0.0))
        self.layouts = list(layouts)
        self.momentum, self.nesterov, self.scale = momentum, nesterov, scale
        self.coefficients, self.num_steps = coefficients, num_steps
        self.dtype, self.tp_group = dtype, tp_group
        for param in (param for group in self.param_groups for param in group["params"]):
            # Before the first step, so that a checkpoint has it; Megatron's wrapper moves it to the master weight.
            self.state[param] = {"momentum_buffer": torch.zeros_like(param, dtype=torch.float32)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter from its `grad`; collective over tensor-parallel ranks."""
        pairs = [(group, param) for group in self.param_groups for param in group["params"]]
        for (group, param), layout in zip(pairs, self.layouts, strict=True):
            buffer = self.state[param]["momentum_buffer"]
            buffer.lerp_(param.grad, 1 - self.momentum)
            update = param.grad.lerp(buffer, self.momentum) if self.nesterov else buffer
            direction = self.orthogonal(update, layout)
            param.mul_(1 - group["lr"] * group["weight_decay"])
            param.add_(direction * self._scales(layout, param), alpha=-group["lr"])

    def orthogonal(self, update: Tensor, layout: Layout) -> Tensor:
        """A weight whose matrices are orthogonal, not scaled; collective where tensor-parallel ranks hold parts of one.

        Args:
            update: U, of the weight's shape.
            layout: of the weight.
        """
        rows = update if layout.dim == 0 else update.mT
        parts = [part.num_rows for part in layout.parts]
        own = rows[: sum(parts)].to(self.dtype).split(parts)
        done = torch.cat([self._of_part(*pair) for pair in zip(own, layout.parts, strict=True)])
        filled = pad_ghosts(done, rows.shape[0], 0)
        return filled if layout.dim == 0 else filled.mT.contiguous()

    def _of_part(self, own: Tensor, part: Matrices) -> Tensor:
        held = own.contiguous()
        if part.gathered:
            held = own.new_empty(self.tp_group.size() * len(own), own.shape[1])
            dist.all_gather_into_tensor(held, own.contiguous(), group=self.tp_group)
        matrices = held.view(part.count, -1, held.shape[1])
        done = newton_schulz(matrices, coefficients=self.coefficients, num_steps=self.num_steps).reshape(held.shape)
        return done.narrow(0, self.tp_group.rank() * len(own), len(own)) if part.gathered else done

    def _scales(self, layout: Layout, weight: Tensor) -> Tensor | float:
        """Factors of the learning rate: of every row of a weight, [rows, 1] float32, or of all of it."""
        outputs, inputs = weight.shape
        if layout.dim == 1:
            (part,) = layout.parts
            return update_scale(self.scale, outputs, part.matrix_rows)
        scales = [(part.num_rows, update_scale(self.scale, part.matrix_rows, inputs)) for part in layout.parts]
        rows = torch.cat([weight.new_full((count, 1), scale) for count, scale in scales])
        return pad_ghosts(rows, outputs, 0)


def newton_schulz_flops(layout: Layout, shape: torch.Size) -> float:
    """FLOPs of one iteration on a rank's weight, gathered matrices whole.

    Args:
        layout: of the weight.
        shape: of the weight.
    """
    total = 0.0
    columns = shape[1 - layout.dim]
    for part in layout.parts:
        small, large = sorted((part.matrix_rows, columns))
        total += part.count * (4 * small * small * large + 2 * small**3)
    return total
