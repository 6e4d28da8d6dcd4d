"""What one layer costs: parameters, FLOPs, memory and communication, term by term; megatron_gdn/cost.py adds them up.

Model FLOPs count the mathematics: multiplications of weights, of the recurrent state token by token, and of the pairs
of tokens that an attention layer sees, its window included; MFU uses them. Executed FLOPs count what the chunked
kernels multiply.
"""

import math
from dataclasses import dataclass

from megatron_gdn.config import Config, ModelConfig, ParallelConfig
from megatron_gdn.kernels.sliding_window import scored_pairs
from megatron_gdn.kernels.varlen import CHUNK_SIZE
from megatron_gdn.sections import gated_delta_net_sections, held_heads, local_sizes, mamba2_sections

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Terms of one part of the model. "Per token" is per token of a sequence of the run's length.

    name: what it is.
    parameters: of the whole model.
    rank_parameters: that one tensor-parallel rank holds, ghost heads included.
    flops: model FLOPs per token of the forward pass; the backward pass has twice as many.
    executed_flops: multiplications and additions of matrix products per token, forward and backward.
    activation_bytes: kept for the backward pass, per token on one rank.
    largest_parameter: of rank_parameters, those of the largest weight.
    matrix_parameters: of rank_parameters, those that Muon would update (megatron_gdn/training/muon.py).
    split_parameters: of those, the ones whose matrices lie over several tensor-parallel ranks.
    state_bytes: recurrent state or key-value cache of one sequence on all ranks, as decoding keeps it.
    column_linears, row_linears: linear layers with a tensor-parallel exchange of the hidden states before, after.
    tensor_bytes: that a tensor-parallel rank sends beside those, per token, in one pass.
    context_bytes: that a context-parallel rank in the middle of the sequence sends, per sequence, in the forward and in
        the backward pass; an all-gather sends a rank's part to all others.
    context_flops: multiplications and additions per token that passing states adds, in both passes, without the one
        product of a map and a state for each rank.
    """

    name: str
    parameters: int
    rank_parameters: int
    flops: float
    executed_flops: float
    activation_bytes: float
    largest_parameter: int
    matrix_parameters: int = 0
    split_parameters: int = 0
    state_bytes: float = 0.0
    column_linears: int = 0
    row_linears: int = 0
    tensor_bytes: float = 0.0
    context_bytes: tuple[float, float] = (0.0, 0.0)
    context_flops: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What every term needs: the model, tokens per sequence, the layout, bytes of an element, sequences."""

    model: ModelConfig
    sequence_length: int
    parallel: ParallelConfig
    element: int
    micro_batch: int

    @property
    def tensor(self) -> int:
        """Tensor-parallel size."""
        return self.parallel.tensor

    @property
    def sequence_parallel(self) -> bool:
        """Whether tokens between tensor-parallel regions are sharded."""
        return self.parallel.sequence

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.model.hidden_size

    @property
    def hidden_bytes(self) -> float:
        """Bytes of a token's hidden state between layers, on one rank."""
        return self.hidden * self.element / (self.tensor if self.sequence_parallel else 1)

    @property
    def input_bytes(self) -> float:
        """What a norm and the linear layer after it keep: their inputs. Megatron gathers the latter again."""
        return 2 * self.hidden_bytes

    @property
    def context(self) -> int:
        """Context-parallel size."""
        return self.parallel.context

    @property
    def fragments_per_rank(self) -> int:
        """Stretches of the sequence that a context-parallel rank holds."""
        return {"contiguous": 1, "zigzag": 2}[self.parallel.context_layout]

    def state_bytes(self, map_numbers: int, state_numbers: int) -> tuple[float, float]:
        """Sent per sequence: float32 maps and states of this rank's fragments forward, gradients of states backward."""
        to_others = 4 * self.fragments_per_rank * (self.context - 1)
        if self.parallel.state_exchange == "scan":
            # A pair travels at each doubling, the result once more; both ways alike.
            steps = math.ceil(math.log2(self.fragments_per_rank * self.context)) if self.context > 1 else 0
            per_fragment = steps * (map_numbers + state_numbers) + min(steps, 1) * state_numbers
            return (4 * self.fragments_per_rank * per_fragment,) * 2
        return to_others * (map_numbers + state_numbers), to_others * state_numbers

    def halo_bytes(self, rows: int, numbers: float) -> float:
        """Sent per sequence and pass: the last rows of this rank's fragments to those that reach so far."""
        fragments = self.fragments_per_rank * self.context
        reached = min(rows, (fragments - 1) * self.sequence_length // fragments)
        return self.fragments_per_rank * reached * numbers * self.element if self.context > 1 else 0.0


def gated_delta_net_cost(sizes: Sizes) -> LayerCost:
    """A Gated DeltaNet mixer with the norm before it."""
    model, tp = sizes.model, sizes.tensor
    H, HV = model.linear_num_key_heads, model.linear_num_value_heads
    K, V, width, h = model.linear_key_head_dim, model.linear_value_head_dim, model.linear_conv_kernel_dim, sizes.hidden
    sections = gated_delta_net_sections(
        num_key_heads=H,
        num_value_heads=HV,
        key_head_dim=K,
        value_head_dim=V,
        output_gate=model.use_output_gate,
        decay=model.use_decay,
    )
    columns = {"in_proj": h, "in_proj_ba": h, "conv1d": width, "A_log": 1, "dt_bias": 1, "out_proj": h}
    rows = {name: sum(section.num_rows for section in parts) for name, parts in sections.items()}
    local = {name: sum(local_sizes(parts, tp)) for name, parts in sections.items()}
    linear = sum(rows[name] * h for name in ("in_proj", "in_proj_ba", "out_proj"))
    local_heads = local["out_proj"] // V
    # Per value head: S read for the error and the output, the update, its decay, each 2 K V; kernels/README.md counts
    # the products of the chunked form.
    chunked = 18 * K * V + CHUNK_SIZE * (16 * K + 12 * V)
    # mixed as the convolution's input and z; its output; o; the input of out_proj; T, and g, beta, G in float32.
    kept = local["in_proj"] + local["conv1d"] + 2 * local["out_proj"] + local_heads * CHUNK_SIZE
    return LayerCost(
        name="Gated DeltaNet",
        parameters=h + V + sum(rows[name] * columns[name] for name in rows),
        rank_parameters=h + V + sum(local[name] * columns[name] for name in local),
        flops=2 * linear + 8 * HV * K * V,
        executed_flops=6 * linear + HV * chunked,
        activation_bytes=sizes.input_bytes + kept * sizes.element + local_heads * 3 * 4,
        largest_parameter=h * local["in_proj"],
        matrix_parameters=h * (local["in_proj"] + local["out_proj"]),
        split_parameters=h * local["out_proj"],
        state_bytes=4 * (HV * K * V) + sizes.element * rows["conv1d"] * (width - 1),
        column_linears=2,
        row_linears=1,
        context_bytes=add_pairs(
            sizes.state_bytes(local_heads * K * K, local_heads * K * V),
            (sizes.halo_bytes(width - 1, local["conv1d"]),) * 2,
        ),
        # Map and state of a fragment forward, the gradient of its state backward: kernels/gated_delta_rule/stretch.py.
        context_flops=HV * (10 * K * V + 4 * K * K + CHUNK_SIZE * (8 * K + 6 * V)) if sizes.context > 1 else 0.0,
    )


def head_exchange_bytes(config: Config) -> float:
    """Sent per sequence, Gated DeltaNet layer and pass, if ranks exchanged heads for tokens as Megatron-Core 0.18 does.

    Every rank sends its tokens of all projections to the ranks that own their heads, and gets its outputs back; heads
    must be divisible by tensor-parallel times context-parallel ranks. This grows with the sequence.
    """
    model, tensor, context = config.model, config.parallel.tensor, config.parallel.context
    keys = 2 * model.linear_num_key_heads * model.linear_key_head_dim
    values = model.linear_num_value_heads * (model.linear_value_head_dim * (2 if model.use_output_gate else 1) + 2)
    outputs = model.linear_num_value_heads * model.linear_value_head_dim
    numbers = (keys + values + outputs) / tensor * config.training.sequence_length / context
    return (context - 1) / context * numbers * BYTES[config.training.precision]


def add_pairs(*pairs: tuple[float, float]) -> tuple[float, float]:
    """Sums of the first and of the second numbers of pairs."""
    forward, backward = (sum(parts) for parts in zip(*pairs, strict=True))
    return forward, backward


def mamba2_cost(sizes: Sizes) -> LayerCost:
    """A Mamba2 mixer with the norm before it."""
    model, tp, h = sizes.model, sizes.tensor, sizes.hidden
    heads, P, N, groups = model.mamba_num_heads, model.mamba_head_dim, model.mamba_state_dim, model.mamba_num_groups
    inner, width = heads * P, model.linear_conv_kernel_dim
    sections = mamba2_sections(num_heads=heads, head_dim=P, num_groups=groups, state_dim=N)
    columns = {"in_proj": h, "in_proj_dt": h, "conv1d": width + 1, "norm": 1, "out_proj": h}
    columns |= {name: 1 for name in ("A_log", "dt_bias", "D")}
    rows = {name: sum(section.num_rows for section in parts) for name, parts in sections.items()}
    local = {name: sum(local_sizes(parts, tp)) for name, parts in sections.items()}
    linear = sum(rows[name] * h for name in ("in_proj", "in_proj_dt", "out_proj"))
    # mixed as the convolution's input and z; its output; y; the norm's output; dt, its sums and the norm in float32.
    kept = local["in_proj"] + local["conv1d"] + 2 * local["out_proj"]
    # C B^T of a group forward, again and twice backward; its product with x once and twice; products with the state
    # twice and five times.
    # Where ranks share a group they gather its B and C, and sum squares of its channels in float32.
    shared = (2 * groups * N * sizes.element + 2 * groups * 4) * (tp - 1) / tp if tp > groups else 0.0
    chunked = 4 * 2 * CHUNK_SIZE * groups * N + inner * (3 * 2 * CHUNK_SIZE + 7 * 2 * N)
    return LayerCost(
        name="Mamba2",
        parameters=h + sum(rows[name] * columns[name] for name in rows),
        rank_parameters=h + sum(local[name] * columns[name] for name in local),
        flops=2 * linear + 6 * inner * N,
        executed_flops=6 * linear + chunked,
        activation_bytes=sizes.input_bytes + kept * sizes.element + local["A_log"] * 3 * 4,
        largest_parameter=h * local["in_proj"],
        matrix_parameters=h * (local["in_proj"] + local["out_proj"]),
        # B and C too, where ranks share a group.
        split_parameters=h * (local["out_proj"] + (2 * groups * N // tp if groups % tp else 0)),
        state_bytes=4 * inner * N + sizes.element * rows["conv1d"] * (width - 1),
        column_linears=2,
        row_linears=1,
        tensor_bytes=shared,
        context_bytes=add_pairs(
            sizes.state_bytes(local["A_log"], local["A_log"] * P * N),
            (sizes.halo_bytes(width - 1, local["conv1d"]),) * 2,
        ),
        # One product for the state of a fragment forward, one for its gradient backward.
        context_flops=4 * inner * N if sizes.context > 1 else 0.0,
    )


def mean_context(sequence_length: int, window: int | None) -> float:
    """Tokens that a token sees on average, itself included, in a sequence from its start.

    Args:
        sequence_length: tokens.
        window: most that it sees; None: all before it.
    """
    window = min(window or sequence_length, sequence_length)
    return (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length


def attention_cost(sizes: Sizes, number: int) -> LayerCost:
    """The attention mixer of a layer with the norm before it; executed FLOPs are those of the torch backend's blocks.

    Args:
        sizes: of the model.
        number: of the layer, from 1.
    """
    model, tp, h = sizes.model, sizes.tensor, sizes.hidden
    options = model.attention_options(number)
    heads, groups = model.num_attention_heads, options.num_query_groups
    size, gates = model.attention_head_dim, 2 if options.output_gate else 1
    linear = h * size * (heads * (gates + 1) + 2 * groups)
    held, held_groups = (count / tp for count in held_heads(heads, groups, tp))  # by a rank, ghosts included
    context = mean_context(sizes.sequence_length, options.window)
    scored = scored_pairs(sizes.sequence_length, options.window, sizes.micro_batch * round(held))
    norms = 2 * size if options.qk_norm else 0
    rows = size * (held * gates + 2 * held_groups)
    kept = rows * (2 if options.qk_norm else 1) + 2 * held * size
    cached = min(options.window or sizes.sequence_length, sizes.sequence_length)
    return LayerCost(
        name=("full attention" if options.window is None else "sliding-window attention")
        + (f" of layer {number}" if number in model.attention_layers else ""),
        parameters=h + linear + norms,
        rank_parameters=h + round(h * (rows + held * size)) + norms,
        flops=2 * linear + 4 * heads * size * context,
        # The backward pass multiplies scores once more, and four products instead of two.
        executed_flops=6 * linear + 14 * heads * size * scored / sizes.sequence_length,
        activation_bytes=sizes.input_bytes + kept * sizes.element + held * 4,
        largest_parameter=round(h * rows),
        matrix_parameters=round(h * (rows + held * size)),
        split_parameters=round(h * (held * size + (rows if rows % size else 0))),
        state_bytes=2 * groups * size * cached * sizes.element,
        column_linears=1,
        row_linears=1,
        context_bytes=(_attention_context_bytes(sizes, held * size, 2 * held_groups * size, options.window),) * 2,
    )


def _attention_context_bytes(sizes: Sizes, query_numbers: float, key_value_numbers: float, window: int | None) -> float:
    """Sent per sequence in one pass, from the numbers that a token has on this tensor-parallel rank."""
    if window is not None:
        return sizes.halo_bytes(window - 1, key_value_numbers)
    local_bytes = sizes.sequence_length / sizes.context * sizes.element
    if sizes.parallel.context_attention == "a2a":
        # Queries, keys and values to the ranks of their heads, outputs back.
        return (sizes.context - 1) / sizes.context * local_bytes * (2 * query_numbers + key_value_numbers)
    return (sizes.context - 1) * local_bytes * key_value_numbers


def mlp_cost(sizes: Sizes) -> LayerCost:
    """A SwiGLU MLP with the norm before it."""
    h, inner, tp = sizes.hidden, sizes.model.ffn_hidden_size, sizes.tensor
    return LayerCost(
        name="MLP",
        parameters=h + 3 * h * inner,
        rank_parameters=h + 3 * h * inner // tp,
        flops=6 * h * inner,
        executed_flops=18 * h * inner,
        activation_bytes=sizes.input_bytes + 3 * inner * sizes.element / tp,
        largest_parameter=2 * h * inner // tp,
        matrix_parameters=3 * h * inner // tp,
        split_parameters=3 * h * inner // tp,
        column_linears=1,
        row_linears=1,
    )


def embedding_cost(sizes: Sizes, vocab_size: int) -> LayerCost:
    """The embedding; a lookup has no FLOPs."""
    parameters = vocab_size * sizes.hidden
    return LayerCost(
        name="embedding",
        parameters=parameters,
        rank_parameters=parameters // sizes.tensor,
        flops=0.0,
        executed_flops=0.0,
        activation_bytes=8,
        largest_parameter=parameters // sizes.tensor,
        row_linears=1,
    )


def output_cost(sizes: Sizes, vocab_size: int) -> LayerCost:
    """The final norm, the output layer and the loss; a tied output layer has no parameters of its own."""
    h, tp = sizes.hidden, sizes.tensor
    weights = 0 if sizes.model.tie_embeddings else vocab_size * h
    return LayerCost(
        name="output",
        parameters=h + weights,
        rank_parameters=h + weights // tp,
        flops=2 * vocab_size * h,
        executed_flops=6 * vocab_size * h,
        # Logits and their softmax in float32.
        activation_bytes=sizes.input_bytes + vocab_size / tp * (sizes.element + 4),
        largest_parameter=weights // tp,
        column_linears=1,
    )


def mixer_cost(sizes: Sizes, number: int, symbol: str) -> LayerCost:
    """The mixer of a layer with the norm before it.

    Args:
        sizes: of the model.
        number: of the layer, from 1.
        symbol: a key of `megatron_gdn.hybrid.pattern.MIXERS`.
    """
    if symbol == "G":
        return gated_delta_net_cost(sizes)
    return mamba2_cost(sizes) if symbol == "M" else attention_cost(sizes, number)


def sizes_of(config: Config) -> Sizes:
    """What the terms need of a run."""
    return Sizes(
        model=config.model,
        sequence_length=config.training.sequence_length,
        parallel=config.parallel,
        element=BYTES[config.training.precision],
        micro_batch=config.training.micro_batch_size,
    )
