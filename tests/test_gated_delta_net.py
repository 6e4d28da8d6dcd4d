"""The Gated DeltaNet layer against a plain PyTorch model, Megatron-Core's own layer, and itself at other layouts."""

import math
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch.nn import functional as F

from megatron_gdn.initialization import log_uniform_decay
from tests import gdn_layer
from tests.gdn_layer import SHAPE, build_layer, inputs, layer_config
from tests.ranks import RankError, pool

# Two orders of summing float32: a few 1e-6 of a tensor's largest element.
TOLERANCE = 1e-5


def assert_equal_results(ours: dict, theirs: dict, tolerance: float = TOLERANCE) -> None:
    """Each tensor of `ours` equals its namesake within `tolerance` times the namesake's largest element."""
    assert ours.keys() == theirs.keys()
    for name, reference in theirs.items():
        assert_close(ours[name], reference, tolerance, name)


def assert_close(ours, reference, tolerance: float = TOLERANCE, name: str = "") -> None:
    error = (ours.double() - reference.double()).abs().max() / reference.double().abs().max()
    assert error <= tolerance, f"{name}: error {error:.1e} of the largest element"


@pytest.fixture(scope="module")
def one_rank():
    return pool(1).run(gdn_layer.loss_and_gradients, groups={})[0]


def plain_layer(weights: dict, x: torch.Tensor, *, neg_eigval=False, gate=True, qk_norm=True) -> torch.Tensor:
    """The layer token by token from global weights, `[s, b, h]`, in the weights' dtype."""
    H, HV = SHAPE["linear_num_key_heads"], SHAPE["linear_num_value_heads"]

    def project(name, heads):
        return (x @ weights[f"in_proj.weight.{name}"].T).unflatten(-1, (heads, -1))  # [s, b, heads, d]

    def convolve(name, heads):
        y = project(name, heads).flatten(2)  # [s, b, channels]
        kernel = weights[f"conv1d.weight.{name}"][:, 0]  # [channels, width]
        padded = torch.cat([y.new_zeros(kernel.shape[1] - 1, *y.shape[1:]), y])
        y = sum(padded[j : j + len(x)] * kernel[:, j] for j in range(kernel.shape[1]))
        return F.silu(y).unflatten(-1, (heads, -1))

    q, k, v = convolve("query", H), convolve("key", H), convolve("value", HV)
    if qk_norm:
        q, k = (t * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
    q, k = (t.repeat_interleave(HV // H, dim=2) for t in (q, k))
    beta = project("beta", HV)[..., 0].sigmoid() * (2 if neg_eigval else 1)
    decay = torch.ones_like(beta)
    if "A_log" in weights:
        decay = (-weights["A_log"].exp() * F.softplus(project("alpha", HV)[..., 0] + weights["dt_bias"])).exp()
    state = x.new_zeros(x.shape[1], HV, k.shape[-1], v.shape[-1])
    outputs = []
    for t in range(len(x)):
        state = state * decay[t][..., None, None]
        error = v[t] - (k[t][..., None] * state).sum(-2)
        state = state + k[t][..., None] * (beta[t][..., None] * error)[..., None, :]
        outputs.append((q[t][..., None] * state).sum(-2) / math.sqrt(k.shape[-1]))
    o = torch.stack(outputs)
    o = o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weights["out_norm.weight"]
    if gate:
        o = o * F.silu(project("z", HV))
    return o.flatten(2) @ weights["out_proj.weight"].T


OPTIONS = [
    dict(),
    dict(allow_neg_eigval=True),
    dict(use_output_gate=False),
    dict(use_decay=False),
    dict(use_qk_l2norm=False, A_init_range=(8.0, 16.0)),  # fast decay keeps the state small without normalised keys
    # What lies between the projections as one operation, in Triton's interpreter.
    dict(backend="triton"),
    dict(backend="triton", allow_neg_eigval=True),
]


def output_and_parameters(**options):
    layer = gdn_layer.build_layer(gdn_layer.layer_config(), **options)
    return gdn_layer.loss_and_gradients(**options), gdn_layer.whole_parameters(layer)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "default")
def test_layer_equals_plain_pytorch(options):
    [(ours, weights)] = pool(1).run(output_and_parameters, groups={}, **options)
    x, loss_weights = (t.double() for t in gdn_layer.inputs())
    weights = {name: value.double().requires_grad_() for name, value in weights.items()}
    x.requires_grad_()
    y = plain_layer(
        weights,
        x,
        neg_eigval=options.get("allow_neg_eigval", False),
        gate=options.get("use_output_gate", True),
        qk_norm=options.get("use_qk_l2norm", True),
    )
    loss = (y * loss_weights).sum()
    loss.backward()
    reference = {"output": y.detach(), "loss": loss.detach(), "grad input": x.grad}
    reference |= {f"grad {name}": value.grad for name, value in weights.items()}
    reference["loss"] = (y * loss_weights).abs().sum().detach()  # the loss cancels: judge it by the size of its terms
    ours["loss"] = ours["loss"] - loss.detach() + reference["loss"]
    # torch sums gradients of the log-decay in float64, Triton in float32; over all tokens they nearly cancel.
    assert_equal_results(ours, reference, 3e-5 if options.get("backend") == "triton" else TOLERANCE)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_parallel_equals_one_rank(one_rank, tp, sequence_parallel):
    groups = dict(tensor_model_parallel_size=tp)
    for result in pool(tp).run(gdn_layer.loss_and_gradients, sequence_parallel, groups=groups):
        assert_equal_results(result, one_rank)


THREE_HEADS = dict(linear_num_key_heads=3, linear_num_value_heads=6)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tp", [2, 4])
def test_heads_that_ranks_do_not_divide(tp, sequence_parallel):
    """Three key heads over two ranks, and over four of which one has none; `whole_parameters` checks the ghosts."""
    [one] = pool(1).run(gdn_layer.loss_and_gradients, overrides=THREE_HEADS, groups={})
    groups = dict(tensor_model_parallel_size=tp)
    for result in pool(tp).run(gdn_layer.loss_and_gradients, sequence_parallel, THREE_HEADS, groups=groups):
        assert_equal_results(result, one)


def save_layer(path, overrides):
    from megatron.core import dist_checkpointing

    from megatron_gdn.training import torch_dist

    layer = gdn_layer.build_layer(gdn_layer.layer_config(**overrides))
    state = layer.sharded_state_dict(prefix="layer.")
    if torch.distributed.get_rank() == 0:
        path.mkdir()
    torch.distributed.barrier()
    torch_dist.write(state, path)
    torch.distributed.barrier()
    metadata = dist_checkpointing.load_tensors_metadata(str(path))
    return gdn_layer.whole_parameters(layer), {key: tensor.global_shape for key, tensor in metadata.items()}


def load_layer(path, overrides):
    from megatron_gdn.training import torch_dist

    layer = gdn_layer.build_layer(gdn_layer.layer_config(**overrides))
    with torch.no_grad():
        for param in layer.parameters():
            param.fill_(7.0)
    loaded = torch_dist.read(layer.sharded_state_dict(prefix="layer."), path)
    layer.load_state_dict({name.removeprefix("layer."): value for name, value in loaded.items()}, strict=False)
    return gdn_layer.whole_parameters(layer)


@pytest.mark.parametrize("save_tp, load_tp", [(2, 1), (4, 2), (1, 4)])
def test_checkpoint_holds_no_ghosts_and_fits_every_number_of_ranks(tmp_path, save_tp, load_tp):
    path, groups = tmp_path / "layer", [dict(tensor_model_parallel_size=tp) for tp in (save_tp, load_tp)]
    [(saved, shapes), *_] = pool(save_tp).run(save_layer, path, THREE_HEADS, groups=groups[0])
    assert {key.removeprefix("layer."): tuple(shape) for key, shape in shapes.items()} == {
        name: tuple(value.shape) for name, value in saved.items()
    }
    for loaded in pool(load_tp).run(load_layer, path, THREE_HEADS, groups=groups[1]):
        assert_equal_results(loaded, saved, tolerance=0)


def initial_weights(layer_number=1, seed=1234):
    torch.manual_seed(seed)
    torch.rand(7)  # how far the generator has run must not matter
    layer = gdn_layer.build_layer(gdn_layer.layer_config(), layer_number)
    assert layer.A_log.dtype == layer.dt_bias.dtype == torch.float32
    return gdn_layer.whole_parameters(layer)


def test_initial_weights_do_not_depend_on_the_layout():
    [one] = pool(1).run(initial_weights, groups={})
    for tp in (2, 4):
        for other in pool(tp).run(initial_weights, groups=dict(tensor_model_parallel_size=tp)):
            assert_equal_results(other, one, tolerance=0)
    for changed in (dict(layer_number=2), dict(seed=1)):
        [other] = pool(1).run(initial_weights, groups={}, **changed)
        for name in one.keys() - {"out_norm.weight"}:
            assert not torch.equal(one[name], other[name]), f"{name} ignores {changed}"


def gates_of_many_heads():
    config = gdn_layer.layer_config(linear_num_key_heads=4096, linear_num_value_heads=4096, hidden_size=2)
    layer = gdn_layer.build_layer(config)
    return layer.A_log.detach(), layer.dt_bias.detach()


def test_gates_start_as_in_the_papers_code():
    [(A_log, dt_bias)] = pool(1).run(gates_of_many_heads, groups={})
    A, log_dt = A_log.exp(), F.softplus(dt_bias).log()
    low, high = math.log(1e-3), math.log(0.1)
    for value, start, end in ((A, 0.0, 16.0), (log_dt, low, high)):
        slack = 1e-4 * (end - start)  # softplus and its inverse in float32
        assert value.min() >= start - slack and value.max() <= end + slack
        # Uniform: with 4096 draws the empirical distribution stays within 0.03 (Kolmogorov-Smirnov, p < 1e-3).
        ranks = torch.linspace(0, 1, len(value))
        assert (((value.sort().values - start) / (end - start)) - ranks).abs().max() < 0.03


def test_a_rate_of_zero_has_a_logarithm():
    """U(0, 16) is 0 once in 2**24 draws."""
    A_log = torch.empty(4)
    with mock.patch.object(torch.Tensor, "uniform_", lambda self, low, high: self.fill_(low)):
        log_uniform_decay(A_log, low=0.0, high=16.0)
    assert torch.equal(A_log, torch.full((4,), torch.finfo(torch.float32).tiny).log())


def gates_under_mixed_precision():
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    config = gdn_layer.layer_config(params_dtype=torch.bfloat16, bf16=True)
    layer = gdn_layer.build_layer(config)
    before = layer.A_log.detach().clone(), layer.dt_bias.detach().clone()
    wrapped = Float16Module(config, layer)
    for sharded in (False, True):
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=sharded)
        ddp = DistributedDataParallel(config, ddp_config, wrapped)
        for param, value in zip((layer.A_log, layer.dt_bias), before, strict=True):
            assert param.dtype == torch.float32 and torch.equal(param, value)  # not rounded through bfloat16 either
        settings = OptimizerConfig(
            lr=1e-2,
            min_lr=0.0,
            weight_decay=0.0,
            clip_grad=0.0,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=sharded,
        )
        optimizer = get_megatron_optimizer(settings, [ddp])
        x, weights = gdn_layer.inputs()
        ddp.zero_grad_buffer()
        (ddp(x.bfloat16())[0] * weights).sum().backward()
        assert layer.A_log.main_grad.dtype == torch.float32
        ddp.finish_grad_sync()
        expected = layer.A_log.detach() - 1e-2 * layer.A_log.main_grad.sign()  # Adam's first step is lr * sign
        optimizer.step()
        assert layer.A_log.dtype == layer.dt_bias.dtype == torch.float32
        # 1e-8 in Adam's denominator; bfloat16 would be off by 4e-3
        torch.testing.assert_close(layer.A_log.detach(), expected, rtol=1e-6, atol=1e-6)
        before = layer.A_log.detach().clone(), layer.dt_bias.detach().clone()
    assert layer.half().A_log.dtype == torch.float32


def test_gates_stay_float32_under_bf16_and_ddp():
    pool(2).run(gates_under_mixed_precision, groups={})


def packed_and_separate():
    from megatron.core.packed_seq_params import PackedSeqParams

    layer = gdn_layer.build_layer(gdn_layer.layer_config())
    x, _ = gdn_layer.inputs(tokens=96, batch=1)
    bounds = [0, 1, 30, 94, 96]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
    with torch.no_grad():
        together = layer(x, packed_seq_params=packed)[0]
        alone = torch.cat([layer(x[start:end])[0] for start, end in zip(bounds, bounds[1:], strict=False)])
    return together, alone, layer(x)[0].detach()


def test_packed_documents_do_not_see_each_other():
    [(together, alone, unpacked)] = pool(1).run(packed_and_separate, groups={})
    assert_close(together, alone)
    assert (unpacked - alone).abs().max() > 1e-2  # the documents do influence each other when not told apart


def joined_and_apart(overrides):
    """A packed row: the operations one after the other, and as one in Triton with rows that fill the weights up."""
    from megatron_gdn.documents import PackedDocuments

    x, _ = gdn_layer.inputs(tokens=96, batch=1)
    documents = PackedDocuments.of(torch.tensor([0, 1, 30, 94, 96]), device=x.device)
    results = []
    for options in (dict(backend="triton", row_multiple=32), dict(backend="torch")):
        layer = gdn_layer.build_layer(gdn_layer.layer_config(**overrides), **options)
        seen = {}
        with torch.no_grad():
            y = layer(x, packed_seq_params=documents)[0]
            layer.observer = seen.update
            results.append({"output": y, "observed": layer(x, packed_seq_params=documents)[0]} | seen)
    return results


@pytest.mark.parametrize("tp", [1, 2])
def test_joined_operations_of_packed_and_filled_up_rows(tp):
    """Heads that two ranks do not divide. An observer sees what it sees of the operations."""
    for joined, apart in pool(tp).run(joined_and_apart, THREE_HEADS, groups=dict(tensor_model_parallel_size=tp)):
        assert {"alpha", "beta", "gate", "state"} < apart.keys()
        assert_equal_results(joined, apart)


def gates_of_a_bf16_layer():
    layer = gdn_layer.build_layer(gdn_layer.layer_config(params_dtype=torch.bfloat16, bf16=True))
    x, seen = gdn_layer.inputs()[0].bfloat16(), {}
    layer.observer = seen.update
    with torch.no_grad():
        layer(x)
        beta, alpha = layer.in_proj_ba(x)[0].transpose(0, 1).double().chunk(2, dim=-1)
    g = -layer.A_log.detach().double().exp() * F.softplus(alpha + layer.dt_bias.detach().double())
    return (seen["beta"], beta.sigmoid()), (seen["alpha"], g.exp())


def test_gates_of_bf16_projections_are_float32():
    [pairs] = pool(1).run(gates_of_a_bf16_layer, groups={})
    for found, expected in pairs:
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)  # bfloat16 would be off by 4e-3


def beside_megatrons_layer(sequence_parallel):
    """Our layer and Megatron-Core's own with the same weights: outputs, input gradients, keys on disk."""
    import megatron.core.ssm.gated_delta_net as theirs
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from megatron_gdn.norms import RMSNorm

    # Without fla it refuses to build; its deterministic mode then uses its own PyTorch code.
    gdn_layer.replace_in_megatrons_layer(HAVE_FLA=True, l2norm=gdn_layer.l2norm_in_torch)
    config = gdn_layer.layer_config(sequence_parallel, deterministic_mode=True, activation_func=F.silu)
    ours = gdn_layer.build_layer(config)
    submodules = theirs.GatedDeltaNetSubmodules(ColumnParallelLinear, RMSNorm, RowParallelLinear)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    host = theirs.GatedDeltaNet(config, submodules, layer_number=1, pg_collection=groups)
    with torch.no_grad():
        # Its rows are q, k, v, z, beta, alpha of this rank: our two projections, one after the other.
        host.in_proj.weight.copy_(torch.cat([ours.in_proj.weight, ours.in_proj_ba.weight]))
        for name in ("conv1d.weight", "A_log", "dt_bias", "out_norm.weight", "out_proj.weight"):
            host.get_parameter(name).copy_(ours.get_parameter(name))
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    x, weights = gdn_layer.inputs()
    if sequence_parallel:
        x, weights = (t.chunk(tp)[rank].contiguous() for t in (x, weights))
    results = []
    for layer in (ours, host):
        leaf = x.clone().requires_grad_()
        y = layer(leaf, None)[0]
        (y * weights).sum().backward()
        state = layer.sharded_state_dict(prefix="decoder.layers.0.self_attention.")
        state = {k: v for k, v in state.items() if isinstance(v, ShardedTensorFactory) or v.data is not None}
        apply_factories(state)
        tensors = [t for v in state.values() for t in (v if isinstance(v, list) else [v])]
        keys = {t.key: (t.global_shape, t.global_offset, t.replica_id) for t in tensors if hasattr(t, "global_shape")}
        results.append((y.detach(), leaf.grad, keys))
    return results


@pytest.mark.parametrize("tp, sequence_parallel", [(1, False), (2, False), (2, True)])
def test_layer_equals_megatrons_own(tp, sequence_parallel):
    groups = dict(tensor_model_parallel_size=tp)
    for ours, theirs in pool(tp).run(beside_megatrons_layer, sequence_parallel, groups=groups):
        assert_close(ours[0], theirs[0])
        assert_close(ours[1], theirs[1])
        assert ours[2] == theirs[2]


def build_with(**overrides):
    gdn_layer.build_layer(gdn_layer.layer_config(**overrides))


@pytest.mark.parametrize(
    "tp, overrides, message",
    [
        (1, dict(linear_num_value_heads=6), r"linear_num_value_heads \(6\) must be divisible by linear_num_key_heads"),
    ],
)
def test_wrong_heads_are_refused(tp, overrides, message):
    with pytest.raises(RankError, match=message):
        pool(tp).run(build_with, groups=dict(tensor_model_parallel_size=tp), **overrides)


def run_with_inference_context():
    build_layer(layer_config())(inputs()[0], None, object())


def test_inference_context_is_refused():
    with pytest.raises(RankError, match=r"inference_context \(object\) must be None: Gated DeltaNet has no cached dec"):
        pool(1).run(run_with_inference_context, groups={})


def _filled(row_multiple: int):
    layer = build_layer(layer_config(), row_multiple=row_multiple)
    x, weights = inputs()
    x.requires_grad_()
    y, _ = layer(x)
    (y * weights).sum().backward()
    on_disk = {}
    factories = {k: v for k, v in layer.sharded_state_dict().items() if isinstance(v, ShardedTensorFactory)}
    for factory in factories.values():
        on_disk |= {part.key: (part.data, part.global_offset, part.global_shape) for part in factory.build()}
    merged = factories["in_proj.weight"].merge_fn([part.data for part in factories["in_proj.weight"].build()])
    assert torch.equal(merged, layer.in_proj.weight)
    linears = {name: getattr(layer, name).weight for name in ("in_proj", "in_proj_ba", "out_proj")}
    return {
        "results": (y.detach(), x.grad),
        "shapes": {name: tuple(weight.shape) for name, weight in linears.items()},
        "gradients": {name: weight.grad for name, weight in linears.items()},
        "on disk": on_disk,
    }


@pytest.mark.parametrize("size", [1, 2])
def test_rows_that_fill_up_to_a_multiple_change_nothing(size):
    groups = dict(tensor_model_parallel_size=size)
    plain, filled = (pool(size).run(_filled, multiple, groups=groups) for multiple in (1, 32))
    rows, columns = 208 // size, 80 // size
    for expected, found in zip(plain, filled, strict=True):
        torch.testing.assert_close(found["results"], expected["results"], rtol=1e-5, atol=1e-6)  # sums of other lengths
        assert expected["shapes"] == {"in_proj": (rows, 24), "in_proj_ba": (16 // size, 24), "out_proj": (24, columns)}
        assert found["shapes"] == {
            "in_proj": ({1: 224, 2: 128}[size], 24),
            "in_proj_ba": (16 // size, 24),
            "out_proj": (24, {1: 96, 2: 64}[size]),
        }
        for name, part in (("in_proj", slice(None, rows)), ("out_proj", (slice(None), slice(None, columns)))):
            gradient = found["gradients"][name].clone()
            torch.testing.assert_close(gradient[part], expected["gradients"][name], rtol=1e-5, atol=1e-5)
            gradient[part] = 0
            assert not gradient.any()
        assert found["on disk"].keys() == expected["on disk"].keys()
        for key, (data, offset, shape) in expected["on disk"].items():
            assert torch.equal(found["on disk"][key][0], data) and found["on disk"][key][1:] == (offset, shape), key
