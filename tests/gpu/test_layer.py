"""The whole layer, and training steps: kernels of backend "triton" against those of "torch". Mostly needs Megatron."""

import pytest
import torch

from tests.gpu.stage import output_gradient
from tests.kernels.data import bounds

# Two layers whose rule differs by 2e-5 (tests/gpu/stage.py), its gate gradients by 2e-4 before they are summed over
# all tokens into those of A_log and dt_bias, where they nearly cancel.
TOLERANCE, GATES = 1e-4, 2e-3
SIZES = dict(
    hidden_size=1024,
    linear_num_key_heads=4,
    linear_num_value_heads=8,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_conv_kernel_dim=4,
)


@pytest.fixture(scope="module")
def groups(stage, tmp_path_factory):
    """One process with Megatron's groups; NCCL on a GPU."""
    pytest.importorskip("megatron.core", reason="Megatron-Core is not installed")
    import torch.distributed as dist

    if stage.rehearsal:
        from megatron_gdn.parallel import cpu

        cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    store = tmp_path_factory.mktemp("store") / "store"
    backend = "gloo" if stage.rehearsal else "nccl"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def build(stage, backend: str):
    from tests import gdn_layer

    sizes = SIZES if not stage.rehearsal else {name: max(2, size // 16) for name, size in SIZES.items()}
    sizes |= dict(linear_conv_kernel_dim=4, linear_num_key_heads=2, linear_num_value_heads=4) if stage.rehearsal else {}
    torch.manual_seed(0)
    config = gdn_layer.layer_config(**sizes)
    return gdn_layer.build_layer(config, backend=backend).to(stage.device), sizes["hidden_size"]


@pytest.mark.parametrize("packed", [False, True])
def test_layer_equals_torch_backend(stage, groups, packed):
    from megatron.core.packed_seq_params import PackedSeqParams

    lengths = stage.lengths([1, 130, 0, 700, 64, 2000, 3])
    tokens, batch = (sum(lengths), 1) if packed else (stage.tokens(1000), 2)
    params = None
    if packed:
        cu_seqlens = bounds(*lengths).int().to(stage.device)
        params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
    found = []
    for backend in ("torch", stage.backend):
        layer, hidden_size = build(stage, backend)
        x = stage.normal(tokens, batch, hidden_size).requires_grad_()
        y = layer(x, packed_seq_params=params)[0]
        y.backward(stage.normal(*y.shape, seed=1))
        grads = {f"grad {name}": param.grad for name, param in layer.named_parameters()}
        found.append({"output": y.detach(), "grad input": x.grad} | grads)
    for name, expected in found[0].items():
        gate = any(part in name for part in ("A_log", "dt_bias", "in_proj_ba"))
        stage.check(f"layer {name}", found[1][name], expected, GATES if gate else TOLERANCE)


def run_config(stage, backend: str, precision: str):
    from megatron_gdn.config import parse_config

    return parse_config(
        {
            "run": {"output_dir": "unused", "device": stage.device.type},
            "data": {"train": ["unused"]},
            "model": {
                "pattern": "G-G-*-",
                "hidden_size": 256,
                "ffn_hidden_size": 512,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": stage.head(64),
                "linear_value_head_dim": stage.head(64),
                "num_attention_heads": 4,
                "kernel_backend": backend,
            },
            "optimizer": {"lr": 3e-3},
            "training": {
                "sequence_length": 200 if not stage.rehearsal else 70,
                "micro_batch_size": 2,
                "global_batch_size": 4,
                "train_tokens": 10**6,
                "precision": precision,
            },
        }
    )


def train(stage, backend: str, precision: str, steps: int = 6) -> list[float]:
    """Losses of steps on one batch, so that they fall."""
    from megatron_gdn.training.engine import MegatronEngine

    config, vocabulary = run_config(stage, backend, precision), 250
    torch.manual_seed(0)
    engine = MegatronEngine.build(config, vocab_size=vocabulary, device=stage.device)
    length = config.training.sequence_length
    text = torch.randint(vocabulary, (2, length + 1), generator=torch.Generator().manual_seed(0)).to(stage.device)
    batch = dict(
        tokens=text[:, :-1].contiguous(),
        labels=text[:, 1:].contiguous(),
        loss_mask=torch.ones(2, length, device=stage.device),
        position_ids=torch.arange(length, device=stage.device).expand(2, -1),
    )
    losses = []
    for _ in range(steps):
        total = engine.forward_backward(iter([batch, batch]), 2)
        engine.update()
        losses.append(float(engine.mean_loss(total)))
    return losses


@pytest.mark.plain_memory
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_steps(stage, groups, precision):
    expected, found = (train(stage, backend, precision) for backend in ("torch", stage.backend))
    assert expected[-1] < expected[0] - 0.1, expected
    # The rounding of a step changes the next; in bf16 the two backends round in different places (2^-9 each).
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("joined", [True, False])
def test_functional_layer_equals_torch_backend(stage, joined):
    """The layer's chain of kernels without Megatron, in bf16: convolution, gate, rule, gated norm."""
    from tests.bench.mixer import Mixer

    sizes = dict(hidden_size=512, H=2, HV=4, K=stage.head(128), V=stage.head(128), device=stage.device)
    tokens, found = stage.tokens(1000), []
    for backend, dtype in (("torch", torch.float64), (stage.backend, torch.bfloat16)):
        mixer = Mixer(**sizes, backend=backend, dtype=dtype, joined=joined and backend != "torch")
        x = stage.normal(2, tokens, 512, dtype=torch.bfloat16).to(dtype).requires_grad_()
        y = mixer(x)
        found.append([y.detach(), *torch.autograd.grad(y, [x, *mixer.parameters()], output_gradient(y))])
    names = ["output", "input", *(name for name, _ in mixer.named_parameters())]
    for name, ours, exact in zip(names, found[1], found[0], strict=True):
        # Each of the ten steps of the chain and back rounds to bfloat16, 2^-9 relative and independent; gates as above.
        bound = 5e-2 if name in ("A_log", "dt_bias", "in_proj_ba") else 2e-2
        stage.check(f"bf16 layer {name}", ours, exact, bound)
