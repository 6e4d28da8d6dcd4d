"""Training steps at other layouts equal those of one process: losses, gradient norms and final weights."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_gdn.config import parse_config
from tests.ranks import pool

STEPS, SAMPLES, TOKENS, VOCABULARY = 3, 8, 72, 250  # 72 tokens are more than a chunk; 250 are padded to 256


def run_config(
    pattern: str = "G-*-G-G-",
    parallel: dict | None = None,
    training: dict | None = None,
    engine: dict | None = None,
    **model,
):
    """A tiny hybrid: HV = 2 H, K != V, attention with grouped heads."""
    return parse_config(
        {
            "run": {"output_dir": "unused", "device": "cpu"},
            "data": {"train": ["unused"]},
            "model": {
                "pattern": pattern,
                "hidden_size": 32,
                "ffn_hidden_size": 48,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 12,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "init_method_std": 0.1,
                **model,
            },
            "parallel": parallel or {},
            "engine": engine or {},
            # Adam turns rounding of near-zero gradients into full steps; this epsilon keeps the update smooth there.
            "optimizer": {"lr": 3e-3, "clip_grad": 0.5, "epsilon": 1e-4},
            "training": {
                "sequence_length": TOKENS,
                "micro_batch_size": 2,
                "global_batch_size": SAMPLES,
                "train_tokens": 100 * SAMPLES * TOKENS,
                "precision": "fp32",
                **(training or {}),
            },
        }
    )


def sample(index: int, documents: list[int] | None = None) -> dict[str, torch.Tensor]:
    """Sample `index` of an endless random corpus; every fifth token has no loss, and samples differ in how many.

    `documents` are the lengths of its documents; None: one.
    """
    generator = torch.Generator().manual_seed(index)
    text = torch.randint(VOCABULARY, (TOKENS + 1,), generator=generator)
    mask = (torch.rand(TOKENS, generator=generator) > 0.1 * (index % 5)).float()
    positions = torch.cat([torch.arange(length) for length in documents or [TOKENS]])
    return dict(tokens=text[:-1], labels=text[1:], loss_mask=mask, position_ids=positions)


def train_steps(config, steps: int = STEPS, documents: list[int] | None = None) -> dict:
    """Losses, gradient norms, and the weights by name with tensor-parallel rows where this rank has them."""
    from megatron_gdn.training.loop import engine_type

    engine = engine_type(config).build(config, vocab_size=VOCABULARY, device=torch.device("cpu"))
    losses, norms = run_steps(engine, range(steps), documents)
    engine.sync_parameters()
    with engine.gathered():
        return dict(losses=losses, norms=norms, weights=stored_weights(engine.model))


def run_steps(engine, steps: range, documents: list[int] | None = None) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of these steps of the endless corpus."""
    losses, norms = [], []
    for step in steps:
        batches = batches_of(engine.config, step, documents)
        total = engine.forward_backward(iter(batches), len(batches))
        norms.append(engine.update())
        losses.append(engine.mean_loss(total))
    return losses, norms


def batches_of(config, step: int, documents: list[int] | None = None) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of this rank for a step."""
    from megatron.core import parallel_state

    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    per_pass, per_step = config.training.micro_batch_size, config.training.global_batch_size
    starts = [step * per_step + (i * size + rank) * per_pass for i in range(per_step // (per_pass * size))]
    batches = [[sample(start + j, documents) for j in range(per_pass)] for start in starts]
    return [{name: torch.stack([s[name] for s in batch]) for name in batch[0]} for batch in batches]


def stored_weights(model) -> dict[str, torch.Tensor]:
    """Global weights by key on disk, see `put_together`."""
    return put_together(model.sharded_state_dict())


def put_together(state) -> dict[str, torch.Tensor]:
    """Global tensors by key on disk, from the sharded tensors of all ranks; the same on every rank."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    apply_factories(state)
    mine = [
        (t.key, t.global_shape, t.global_offset, t.local_shape, t.data.detach().clone())
        for t in nested_values(state)
        if isinstance(t, ShardedTensor)
    ]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    weights = {}
    for key, shape, offset, local_shape, data in (item for items in everyone for item in items):
        whole = weights.setdefault(key, torch.full(shape, float("nan"), dtype=data.dtype))
        where = tuple(slice(start, start + length) for start, length in zip(offset, local_shape, strict=True))
        replica = whole[where]
        # Replicas of a weight on different ranks must not drift.
        assert replica.isnan().any() or torch.equal(replica, data), key
        whole[where] = data
    return weights


@pytest.fixture(scope="module")
def one_process():
    return pool(1).run(train_steps, run_config(), groups={})[0]


LAYOUTS = {
    "tp2": dict(tensor=2),
    "tp2 sp": dict(tensor=2, sequence=True),
    "pp2": dict(pipeline=2),
    "pp2, cut after the first layer": dict(pipeline=2, pipeline_layers=[1, 3]),
    "dp2": dict(),
    "dp2 no distributed optimizer": dict(distributed_optimizer=False),
    "dp2 no overlap": dict(overlap=False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_equal_one_process(one_process, layout):
    parallel = LAYOUTS[layout]
    groups = dict(
        tensor_model_parallel_size=parallel.get("tensor", 1),
        pipeline_model_parallel_size=parallel.get("pipeline", 1),
    )
    for result in pool(2).run(train_steps, run_config(parallel=parallel), groups=groups):
        compare(result, one_process)


def compare(result, reference, tolerance=1e-5):
    # float32 sums in another order; Adam divides by the root of tiny second moments, so weights get the looser bound.
    assert result["losses"] == pytest.approx(reference["losses"], rel=tolerance)
    assert result["norms"] == pytest.approx(reference["norms"], rel=tolerance)
    assert result["weights"].keys() == reference["weights"].keys()
    for name, weight in reference["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=20 * tolerance, msg=name)


def test_four_processes_tp2_sp_dp2(one_process):
    config = run_config(parallel=dict(tensor=2, sequence=True))
    for result in pool(4).run(train_steps, config, groups=dict(tensor_model_parallel_size=2)):
        compare(result, one_process)


def test_pipeline_stages_of_unequal_size():
    """Five layers over two stages, three and two."""
    pattern = "G-*-GG-G-"
    [reference] = pool(1).run(train_steps, run_config(pattern), groups={})
    config = run_config(pattern, parallel=dict(pipeline=2))
    for result in pool(2).run(train_steps, config, groups=dict(pipeline_model_parallel_size=2)):
        compare(result, reference)


def test_recompute_changes_nothing(one_process):
    [result] = pool(1).run(train_steps, run_config(training=dict(recompute="full")), groups={})
    assert result["losses"] == one_process["losses"] and result["norms"] == one_process["norms"]


def test_micro_batches_do_not_change_the_step(one_process):
    """The loss is a mean over tokens, not over micro-batches of different numbers of tokens."""
    for size in (1, 4):
        [result] = pool(1).run(train_steps, run_config(training=dict(micro_batch_size=size)), groups={})
        compare(result, one_process)


class StandIn:
    """Apex's fused_weight_gradient_mlp_cuda in PyTorch: adds a product to a float32 buffer; counts its calls."""

    calls = 0

    @classmethod
    def wgrad_gemm_accum_fp32(cls, total_input, grad_output, main_grad):
        cls.calls += 1
        main_grad.add_(grad_output.flatten(0, -2).float().mT @ total_input.flatten(0, -2).float())


def train_with_stand_in(config) -> tuple[dict, int]:
    """Steps on a device that is taken for one with CUDA, and calls of the extension."""
    from megatron.core.tensor_parallel import layers

    from megatron_gdn.training import engine

    StandIn.calls = 0
    with (
        mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", StandIn, create=True),
        mock.patch.object(layers, "_grad_accum_fusion_available", True),
        mock.patch.object(engine, "fuses_weight_gradients", lambda device: True),
    ):
        result = train_steps(config)
    return result, StandIn.calls


def test_fused_weight_gradients_change_nothing(one_process):
    """Every linear layer adds its weight's gradient itself, in every micro-batch; DDP must not add it again."""
    [(result, calls)] = pool(1).run(train_with_stand_in, run_config(), groups={})
    compare(result, one_process)
    linears = 3 * 3 + 2 + 4 * 2 + 1  # Gated DeltaNet, attention, MLPs, the output layer
    assert calls == linears * STEPS * SAMPLES // 2


def test_bf16_follows_fp32(one_process):
    [result] = pool(1).run(train_steps, run_config(training=dict(precision="bf16")), groups={})
    # bf16 has 8 bits: 4e-3 per rounding, over 4 layers
    assert result["losses"] == pytest.approx(one_process["losses"], rel=2e-2)
    assert result["losses"] != one_process["losses"]
    dtypes = {name: weight.dtype for name, weight in result["weights"].items()}
    fp32 = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert fp32 == {name for name in dtypes if name.endswith(("A_log", "dt_bias"))}


def learning_rates(config):
    from megatron_gdn.training.engine import MegatronEngine

    engine = MegatronEngine.build(config, vocab_size=VOCABULARY, device=torch.device("cpu"))
    rates = []
    for _ in range(config.training.train_steps + 1):
        rates.append(engine.learning_rate)
        engine.scheduler.step(config.training.global_batch_size)
    return rates


def expected_rate(step: int, schedule: str, lr=3e-3, low=1e-3, warmup=10, total=100, decay=20) -> float:
    import math

    if step < warmup:
        return lr * step / warmup
    if schedule == "cosine":
        return low + (lr - low) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    if schedule == "wsd":
        return lr if step <= total - decay else low + (lr - low) * (1 - (step - (total - decay)) / decay)
    return lr


@pytest.mark.parametrize("schedule, decay", [("cosine", 20), ("wsd", 20), ("wsd", None), ("constant", 20)])
def test_schedules_are_in_tokens(schedule, decay):
    """decay: steps, of 100; None: the last tenth."""
    config = run_config()
    per_step = config.training.tokens_per_step
    config.optimizer.min_lr, config.optimizer.schedule = 1e-3, schedule
    config.optimizer.warmup_tokens, config.optimizer.decay_tokens = 10 * per_step, decay and decay * per_step
    [rates] = pool(1).run(learning_rates, config, groups={})
    assert rates == pytest.approx([expected_rate(step, schedule, decay=decay or 10) for step in range(101)], rel=1e-9)


def beside_torchs_adamw(config) -> list[tuple]:
    """Weights by name after four steps, and those of torch's AdamW from the same clipped gradients in float64."""
    from megatron_gdn.training.engine import MegatronEngine

    engine = MegatronEngine.build(config, vocab_size=VOCABULARY, device=torch.device("cpu"))
    settings = config.optimizer
    params = dict(engine.model.named_parameters())
    copies = {name: torch.nn.Parameter(param.detach().double()) for name, param in params.items()}
    matrices, vectors = ([p for p in copies.values() if (p.ndim > 1) is wanted] for wanted in (True, False))
    groups = [dict(params=matrices, weight_decay=settings.weight_decay), dict(params=vectors, weight_decay=0.0)]
    betas = (settings.beta1, settings.beta2)
    reference = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.epsilon)
    for step in range(4):
        batches = batches_of(config, step)
        engine.forward_backward(iter(batches), len(batches))
        for name, param in params.items():
            assert param.main_grad.dtype == torch.float32
            copies[name].grad = param.main_grad.double()
        torch.nn.utils.clip_grad_norm_(copies.values(), settings.clip_grad)
        for group in reference.param_groups:
            group["lr"] = expected_rate(step, "cosine", low=0.0, warmup=2)
        reference.step()
        engine.update()
    engine.sync_parameters()
    return [(name, param.detach(), copies[name].detach()) for name, param in params.items()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_are_those_of_torchs_adamw(precision):
    """Schedule, clipping, decay of matrices alone, betas; in bf16 weights are rounded, A_log and dt_bias are not."""
    config = run_config(training=dict(precision=precision))
    config.optimizer.clip_grad, config.optimizer.weight_decay, config.optimizer.beta2 = 0.2, 0.3, 0.9
    config.optimizer.warmup_tokens = 2 * config.training.tokens_per_step
    [found] = pool(1).run(beside_torchs_adamw, config, groups={})
    for name, param, expected in found:
        rtol = 2**-8 if param.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(param.double(), expected, rtol=rtol, atol=3e-7, msg=name)


def step_with_nan(config):
    from megatron_gdn.training.engine import MegatronEngine

    engine = MegatronEngine.build(config, vocab_size=VOCABULARY, device=torch.device("cpu"))
    before = {name: param.detach().clone() for name, param in engine.model.named_parameters()}
    batch = {name: torch.stack([value] * config.training.micro_batch_size) for name, value in sample(0).items()}
    if dist.get_rank() == 0:  # one rank's data is bad
        batch["loss_mask"][0, 3] = float("nan")
    count = SAMPLES // config.training.micro_batch_size // dist.get_world_size()
    try:
        engine.forward_backward(iter([batch] * count), count)
        engine.update()
        raise AssertionError("no error")
    except FloatingPointError as error:
        message = str(error)
    return message, all(torch.equal(param, before[name]) for name, param in engine.model.named_parameters())


@pytest.mark.parametrize("sharded", [False, True])
def test_nan_ends_the_run_before_the_update(sharded):
    config = run_config(parallel=dict(distributed_optimizer=sharded, overlap=False))
    for message, unchanged in pool(2).run(step_with_nan, config, groups={}):
        assert "not finite" in message and unchanged
