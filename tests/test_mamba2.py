"""The Mamba2 layer against plain PyTorch, transformers' and Megatron-Core's layers, and itself at other layouts."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from tests import gdn_layer, mamba2_layer
from tests.mamba2_layer import SHAPE
from tests.ranks import RankError, pool
from tests.test_gated_delta_net import assert_close, assert_equal_results

ONE_GROUP = dict(mamba_num_groups=1)  # shared by all ranks: the usual case
FOUR_GROUPS = dict(mamba_num_groups=4)  # never shared
THREE_HEADS = dict(mamba_num_groups=1, mamba_num_heads=3)  # at four ranks one has none
SIX_HEADS = dict(mamba_num_heads=6)  # three of a group over two ranks
SHAPES = {"one group": ONE_GROUP, "two groups": {}, "four groups": FOUR_GROUPS, "3 heads": THREE_HEADS}
SHAPES |= {"6 heads": SIX_HEADS}


def plain_layer(weights: dict, x: torch.Tensor, groups: int) -> torch.Tensor:
    """The layer token by token from global weights, `[s, b, h]`, in the weights' dtype."""
    P = SHAPE["mamba_head_dim"]
    heads = len(weights["A_log"])

    def convolve(name):
        y = x @ weights[f"in_proj.weight.{name}"].T  # [s, b, channels]
        kernel, bias = weights[f"conv1d.weight.{name}"][:, 0], weights[f"conv1d.bias.{name}"]
        padded = torch.cat([y.new_zeros(kernel.shape[1] - 1, *y.shape[1:]), y])
        return F.silu(sum(padded[j : j + len(x)] * kernel[:, j] for j in range(kernel.shape[1])) + bias)

    value = convolve("x").unflatten(-1, (heads, P))
    B, C = (convolve(name).unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, 2) for name in "BC")
    dt = F.softplus(x @ weights["in_proj.weight.dt"].T + weights["dt_bias"])
    state = x.new_zeros(x.shape[1], heads, B.shape[-1], P)
    outputs = []
    for t in range(len(x)):
        decay = (-weights["A_log"].exp() * dt[t]).exp()
        state = state * decay[..., None, None] + B[t][..., None] * (dt[t][..., None] * value[t])[..., None, :]
        outputs.append((C[t][..., None] * state).sum(-2) + weights["D"][:, None] * value[t])
    u = torch.stack(outputs).flatten(2) * F.silu(x @ weights["in_proj.weight.z"].T)
    u = u.unflatten(-1, (groups, -1))
    u = u * (u.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return (u.flatten(2) * weights["norm.weight"]) @ weights["out_proj.weight"].T


def results_and_parameters(overrides):
    layer = mamba2_layer.build_layer(mamba2_layer.layer_config(**overrides))
    return mamba2_layer.loss_and_gradients(overrides=overrides), mamba2_layer.whole_parameters(layer)


@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
def test_layer_equals_plain_pytorch(overrides):
    [(ours, weights)] = pool(1).run(results_and_parameters, overrides, groups={})
    x, loss_weights = (t.double() for t in gdn_layer.inputs())
    weights = {name: value.double().requires_grad_() for name, value in weights.items()}
    x.requires_grad_()
    y = plain_layer(weights, x, (SHAPE | overrides)["mamba_num_groups"])
    loss = (y * loss_weights).sum()
    loss.backward()
    reference = {"output": y.detach(), "grad input": x.grad}
    reference |= {f"grad {name}": value.grad for name, value in weights.items()}
    reference["loss"] = (y * loss_weights).abs().sum().detach()  # the loss cancels: judge it by the size of its terms
    ours["loss"] = ours["loss"] - loss.detach() + reference["loss"]
    assert_equal_results(ours, reference)


@pytest.fixture(scope="module")
def one_rank():
    """Results of one rank by the overrides of the shape."""
    found = {}

    def of(overrides):
        key = tuple(overrides.items())
        if key not in found:
            [found[key]] = pool(1).run(mamba2_layer.loss_and_gradients, overrides=overrides, groups={})
        return found[key]

    return of


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence parallel"])
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
def test_tensor_parallel_equals_one_rank(one_rank, overrides, tp, sequence_parallel):
    groups = dict(tensor_model_parallel_size=tp)
    for result in pool(tp).run(mamba2_layer.loss_and_gradients, sequence_parallel, overrides, groups=groups):
        assert_equal_results(result, one_rank(overrides))


def gradient_norms(symbol, sequence_parallel):
    """The norm as the host takes it for clipping, of each parameter's gradient alone."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    helpers, overrides = {"G": (gdn_layer, {}), "M": (mamba2_layer, ONE_GROUP)}[symbol]
    config = helpers.layer_config(sequence_parallel, **overrides)
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(), helpers.build_layer(config))
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=0.0, min_lr=0.0, clip_grad=1.0), [ddp])
    x, weights = gdn_layer.inputs()
    if sequence_parallel:
        rank, size = ddp.module.tp_rank, ddp.module.tp_size
        x, weights = (t.chunk(size)[rank].contiguous() for t in (x, weights))
    (ddp(x)[0] * weights).sum().backward()
    ddp.finish_grad_sync()
    params = dict(ddp.module.named_parameters())
    grads, norms = {name: param.main_grad.clone() for name, param in params.items()}, {}
    for wanted in params:
        for name, param in params.items():
            param.main_grad.copy_(grads[name] if name == wanted else torch.zeros_like(grads[name]))
        optimizer.prepare_grads()
        norms[wanted] = float(optimizer.get_grad_norm())
    return norms


@pytest.mark.parametrize("symbol", ["G", "M"])
def test_the_hosts_gradient_norm_counts_every_row_once(symbol):
    [expected] = pool(1).run(gradient_norms, symbol, False, groups={})
    assert min(expected.values()) > 0
    for sequence_parallel in (False, True):
        groups = dict(tensor_model_parallel_size=2)
        for norms in pool(2).run(gradient_norms, symbol, sequence_parallel, groups=groups):
            assert norms == pytest.approx(expected, rel=1e-5)  # sums of float32


def save_layer(path, overrides):
    from megatron.core import dist_checkpointing

    from megatron_gdn.training import torch_dist

    layer = mamba2_layer.build_layer(mamba2_layer.layer_config(**overrides))
    state = layer.sharded_state_dict(prefix="layer.")
    if torch.distributed.get_rank() == 0:
        path.mkdir()
    torch.distributed.barrier()
    torch_dist.write(state, path)
    torch.distributed.barrier()
    metadata = dist_checkpointing.load_tensors_metadata(str(path))
    return mamba2_layer.whole_parameters(layer), {key: tensor.global_shape for key, tensor in metadata.items()}


def load_layer(path, overrides):
    from megatron_gdn.training import torch_dist

    layer = mamba2_layer.build_layer(mamba2_layer.layer_config(**overrides))
    with torch.no_grad():
        for param in layer.parameters():
            param.fill_(7.0)
    loaded = torch_dist.read(layer.sharded_state_dict(prefix="layer."), path)
    layer.load_state_dict({name.removeprefix("layer."): value for name, value in loaded.items()}, strict=False)
    return mamba2_layer.whole_parameters(layer)


# Shared groups split and joined, and ghost heads.
@pytest.mark.parametrize(
    "overrides, save_tp, load_tp", [(ONE_GROUP, 2, 1), ({}, 4, 2), (THREE_HEADS, 4, 1), (THREE_HEADS, 1, 4)]
)
def test_checkpoint_fits_every_number_of_ranks(tmp_path, overrides, save_tp, load_tp):
    path, groups = tmp_path / "layer", [dict(tensor_model_parallel_size=tp) for tp in (save_tp, load_tp)]
    [(saved, shapes), *_] = pool(save_tp).run(save_layer, path, overrides, groups=groups[0])
    assert {key.removeprefix("layer."): tuple(shape) for key, shape in shapes.items()} == {
        name: tuple(value.shape) for name, value in saved.items()
    }
    for loaded in pool(load_tp).run(load_layer, path, overrides, groups=groups[1]):
        assert_equal_results(loaded, saved, tolerance=0)


def initial_weights(overrides, layer_number=1, seed=1234):
    torch.manual_seed(seed)
    torch.rand(7)  # how far the generator has run must not matter
    layer = mamba2_layer.build_layer(mamba2_layer.layer_config(**overrides), layer_number)
    assert layer.A_log.dtype == layer.dt_bias.dtype == layer.D.dtype == torch.float32
    return mamba2_layer.whole_parameters(layer)


@pytest.mark.parametrize("overrides", [ONE_GROUP, SIX_HEADS], ids=["one group", "6 heads"])
def test_initial_weights_do_not_depend_on_the_layout(overrides):
    [one] = pool(1).run(initial_weights, overrides, groups={})
    for tp in (2, 4):
        for other in pool(tp).run(initial_weights, overrides, groups=dict(tensor_model_parallel_size=tp)):
            assert_equal_results(other, one, tolerance=0)
    for changed in (dict(layer_number=2), dict(seed=1)):
        [other] = pool(1).run(initial_weights, overrides, groups={}, **changed)
        for name in one.keys() - {"norm.weight", "D"}:
            assert not torch.equal(one[name], other[name]), f"{name} ignores {changed}"


def parameters_of_many_heads():
    from megatron_gdn.mamba2 import Mamba2

    config = mamba2_layer.layer_config(mamba_num_heads=4096, mamba_head_dim=1, hidden_size=2, **ONE_GROUP)
    layer = mamba2_layer.build_layer(config)
    Mamba2.reset_parameters(layer, 3)  # over what the helper wrote
    return {name: param.detach() for name, param in layer.named_parameters()}


def test_parameters_start_as_mamba2s():
    [found] = pool(1).run(parameters_of_many_heads, groups={})
    A, log_dt = found["A_log"].exp(), F.softplus(found["dt_bias"]).log()
    uniform = [(A, 1.0, 16.0), (log_dt, math.log(1e-3), math.log(0.1))]
    uniform += [(found[name].flatten(), -0.5, 0.5) for name in ("conv1d.weight", "conv1d.bias")]  # 1 / sqrt(width)
    for value, start, end in uniform:
        slack = 1e-4 * (end - start)  # softplus and its inverse in float32
        assert value.min() >= start - slack and value.max() <= end + slack
        # Uniform: with 4096 draws the empirical distribution stays within 0.03 (Kolmogorov-Smirnov, p < 1e-3).
        ranks = torch.linspace(0, 1, len(value))
        assert (((value.sort().values - start) / (end - start)) - ranks).abs().max() < 0.03
    assert (found["D"] == 1).all() and (found["norm.weight"] == 1).all()


def parameters_under_mixed_precision():
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    config = mamba2_layer.layer_config(params_dtype=torch.bfloat16, bf16=True)
    layer = mamba2_layer.build_layer(config)
    with torch.no_grad():
        layer.D.add_(1e-4)  # more than bfloat16 holds
    kept = [layer.A_log, layer.dt_bias, layer.D]
    before = [param.detach().clone() for param in kept]
    ddp = DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), Float16Module(config, layer)
    )
    for param, value in zip(kept, before, strict=True):
        assert param.dtype == torch.float32 and torch.equal(param, value)  # not rounded through bfloat16 either
    x, weights = gdn_layer.inputs()
    (ddp(x.bfloat16())[0] * weights).sum().backward()
    for param in kept:
        assert param.main_grad.dtype == torch.float32 and param.main_grad.count_nonzero() > 0
    layer.bfloat16()
    for param, value in zip((layer.A_log, layer.dt_bias, layer.D), before, strict=True):
        assert param.dtype == torch.float32 and torch.equal(param, value)
    assert layer.half().D.dtype == torch.float32 and layer.conv1d.bias.dtype == torch.float16


def test_float32_parameters_stay_so_under_bf16_and_ddp():
    pool(1).run(parameters_under_mixed_precision, groups={})


def packed_and_separate():
    from megatron.core.packed_seq_params import PackedSeqParams

    layer = mamba2_layer.build_layer(mamba2_layer.layer_config())
    x, _ = gdn_layer.inputs(tokens=96, batch=1)
    bounds = [0, 1, 30, 94, 96]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
    with torch.no_grad():
        together = layer(x, packed_seq_params=packed)[0]
        alone = torch.cat([layer(x[start:end])[0] for start, end in zip(bounds, bounds[1:], strict=False)])
    return together, alone, layer(x)[0].detach()


@pytest.mark.parametrize("tp", [1, 2])
def test_packed_documents_do_not_see_each_other(tp):
    for together, alone, unpacked in pool(tp).run(packed_and_separate, groups=dict(tensor_model_parallel_size=tp)):
        assert_close(together, alone)
        assert (unpacked - alone).abs().max() > 1e-2  # the documents do influence each other when not told apart


def beside_transformers_layer(overrides):
    """Our layer and transformers' with the same weights: outputs, input gradients and those of all weights."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = mamba2_layer.layer_config(**overrides)
    ours = mamba2_layer.build_layer(config)
    theirs = Mamba2Mixer(
        Mamba2Config(
            num_heads=config.mamba_num_heads,
            head_dim=config.mamba_head_dim,
            hidden_size=config.hidden_size,
            expand=config.mamba_num_heads * config.mamba_head_dim // config.hidden_size,
            state_size=config.mamba_state_dim,
            n_groups=config.mamba_num_groups,
            conv_kernel=config.linear_conv_kernel_dim,
            layer_norm_epsilon=config.layernorm_epsilon,
            chunk_size=32,
        ),
        layer_idx=0,
    )
    copied = {name: ours.get_parameter(name) for name, _ in theirs.named_parameters() if name != "in_proj.weight"}
    copied["in_proj.weight"] = torch.cat([ours.in_proj.weight, ours.in_proj_dt.weight])
    theirs.load_state_dict(copied)
    x, weights = gdn_layer.inputs()
    results = []
    for layer in (lambda x: ours(x)[0], lambda x: theirs(x.transpose(0, 1)).transpose(0, 1)):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        (y * weights).sum().backward()
        results.append(dict(output=y.detach(), input=leaf.grad))
    grads = {name: ours.get_parameter(name).grad for name in copied if name != "in_proj.weight"}
    grads["in_proj.weight"] = torch.cat([ours.in_proj.weight.grad, ours.in_proj_dt.weight.grad])
    results[0] |= grads
    results[1] |= {name: theirs.get_parameter(name).grad for name in copied}
    return results


@pytest.mark.parametrize("overrides", [ONE_GROUP, {}], ids=["one group", "two groups"])
def test_layer_equals_transformers(overrides):
    pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    [(ours, theirs)] = pool(1).run(beside_transformers_layer, overrides, groups={})
    assert_equal_results(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_of_16_bit_inputs_is_float32(dtype):
    """Output and gradients are those of float64, rounded once."""
    from megatron_gdn.mamba2 import GatedGroupRMSNorm, LocalGroups

    groups = LocalGroups(2, SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    norm = GatedGroupRMSNorm(48, group_channels=24, eps=1e-5, groups=groups, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    y, z, dout = (torch.randn(5, 48, generator=generator).to(dtype) for _ in range(3))
    leaves = [t.clone().requires_grad_() for t in (y, z)]
    out = norm(*leaves)
    out.backward(dout)
    wide = [t.double().requires_grad_() for t in (y, z)]
    u = (wide[0] * F.silu(wide[1])).unflatten(-1, (2, -1))
    expected = (u * (u.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(-2)
    expected.backward(dout.double())
    for found, reference in ((out, expected), *((a.grad, b.grad) for a, b in zip(leaves, wide, strict=True))):
        assert found.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2  # of one step; float32's own error shows next to 0
        torch.testing.assert_close(found.double(), reference, rtol=1.01 * rounding, atol=1e-6)


def test_triton_kernels_in_the_layer():
    """Interpreted; each backend is held to float64 on its own, here they differ by float32's rounding."""
    pytest.importorskip("triton")
    results = []
    for backend in ("torch", "triton"):
        overrides = dict(mamba_num_heads=4)
        [found] = pool(1).run(mamba2_layer.loss_and_gradients, overrides=overrides, backend=backend, groups={})
        found.pop("loss")  # it cancels; the output has its terms
        results.append(found)
    assert_equal_results(results[1], results[0])


class NormWithWeight(torch.nn.Module):
    """Parameters of Megatron's norm, which mamba_ssm would compute; sharded as its ExtendedRMSNorm."""

    def __init__(self, channels, **_):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(channels))

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        from megatron.core import parallel_state
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )


def keys_beside_megatrons_layer():
    """Key, global shape, offset and replica of every tensor on disk, of our layer and of Megatron-Core's own."""
    import megatron.core.ssm.mamba_context_parallel as host_context
    import megatron.core.ssm.mamba_mixer as host
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    # It refuses to build without the packages that would compute it; nothing is computed here.
    host.HAVE_MAMBA_SSM = host.HAVE_EINOPS = host_context.HAVE_EINOPS = True
    host.ExtendedRMSNorm = NormWithWeight
    config = mamba2_layer.layer_config()
    theirs = host.MambaMixer(
        config,
        host.MambaMixerSubmodules(ColumnParallelLinear, RowParallelLinear),
        config.hidden_size,
        layer_number=1,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    results = []
    for layer in (mamba2_layer.build_layer(config), theirs):
        state = layer.sharded_state_dict(prefix="decoder.layers.0.mixer.")
        state = {k: v for k, v in state.items() if isinstance(v, ShardedTensorFactory) or v.data is not None}
        apply_factories(state)
        tensors = [t for v in state.values() for t in (v if isinstance(v, list) else [v])]
        keys = {t.key: (t.global_shape, t.global_offset, t.replica_id) for t in tensors if hasattr(t, "global_shape")}
        results.append(keys)
    return results


@pytest.mark.parametrize("tp", [1, 2])
def test_keys_on_disk_are_megatrons(tp):
    pytest.importorskip("triton", reason="Megatron-Core's module imports it")
    groups = dict(tensor_model_parallel_size=tp)
    for ours, theirs in pool(tp).run(keys_beside_megatrons_layer, groups=groups):
        assert len(ours) == 16 and ours == theirs


def in_a_transformer_layer():
    """Output of a whole layer and of its parts one after the other, and what the observer saw."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    from megatron_gdn.mamba2 import Mamba2, Mamba2Submodules
    from megatron_gdn.norms import RMSNorm

    linears = Mamba2Submodules(ColumnParallelLinear, ColumnParallelLinear, RowParallelLinear)
    submodules = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(module=Mamba2, submodules=linears),
        self_attn_bda=get_bias_dropout_add,
    )
    config = mamba2_layer.layer_config(hidden_dropout=0.0)
    layer = TransformerLayer(config, submodules, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    seen = {}
    layer.self_attention.observer = seen.update
    x, _ = gdn_layer.inputs()
    with torch.no_grad():
        y, _ = layer(x, attention_mask=None)
        by_hand = x + layer.self_attention(layer.input_layernorm(x))[0]
        mixer, steps = layer.self_attention, layer.self_attention.in_proj_dt(layer.input_layernorm(x))[0]
        alpha = (-mixer.A_log.exp() * F.softplus(steps.transpose(0, 1) + mixer.dt_bias)).exp()
    torch.testing.assert_close(seen["alpha"], alpha)
    return (
        y,
        by_hand,
        {name: (tuple(value.shape), value.min().item(), value.max().item()) for name, value in seen.items()},
    )


def test_as_self_attention_of_a_transformer_layer():
    [(y, by_hand, seen)] = pool(1).run(in_a_transformer_layer, groups={})
    torch.testing.assert_close(y, by_hand, rtol=0, atol=0)
    assert {name: shape for name, (shape, *_) in seen.items()} == dict(
        alpha=(2, 72, 8), state=(2, 8, 12, 6), gate=(2, 72, 48)
    )
    assert 0 < seen["alpha"][1] < seen["alpha"][2] < 1


def observed(overrides):
    """What an observer sees on all ranks, heads put together."""
    layer, seen = mamba2_layer.build_layer(mamba2_layer.layer_config(**overrides)), {}
    layer.observer = seen.update
    with torch.no_grad():
        layer(gdn_layer.inputs()[0])
    return {name: gdn_layer.whole(x, 1 if name == "state" else 2) for name, x in seen.items()}


def test_observer_sees_no_ghosts():
    """Two heads and one beside a ghost, whose decay is not 0 and whose empty state would lower the mean."""
    [expected] = pool(1).run(observed, THREE_HEADS, groups={})
    assert expected["state"].shape[1] == 3
    for found in pool(2).run(observed, THREE_HEADS, groups=dict(tensor_model_parallel_size=2)):
        assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in expected.items()}
        assert_equal_results(found, expected)


def build_with(**overrides):
    mamba2_layer.build_layer(mamba2_layer.layer_config(**overrides))


def run_with_inference_context():
    layer = mamba2_layer.build_layer(mamba2_layer.layer_config())
    layer(gdn_layer.inputs()[0], None, object())


@pytest.mark.parametrize(
    "tp, overrides, message",
    [
        (1, dict(mamba_num_heads=None), r"mamba_num_heads \(None\) must be a number: .* mamba_head_dim = 8"),
        (1, dict(mamba_num_heads=7), r"mamba_num_heads \(7\) must be divisible by mamba_num_groups \(2\): use 6 heads"),
        (
            2,
            dict(mamba_num_groups=3, mamba_num_heads=6),
            r"mamba_num_groups \(3\) must divide tensor_model_parallel_size \(2\) or be a multiple of it: use 2 groups",
        ),
        (
            4,
            dict(mamba_state_dim=13),
            r"mamba_state_dim \(13\) must be divisible by the 2 tensor-parallel ranks that share a group: use 12",
        ),
    ],
)
def test_wrong_shapes_are_refused(tp, overrides, message):
    with pytest.raises(RankError, match=message):
        pool(tp).run(build_with, groups=dict(tensor_model_parallel_size=tp), **overrides)


def test_inference_context_is_refused():
    with pytest.raises(RankError, match=r"inference_context \(object\) must be None: Mamba2 has no cached decoding"):
        pool(1).run(run_with_inference_context, groups={})
