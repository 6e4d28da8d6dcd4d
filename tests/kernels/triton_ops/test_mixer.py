"""The layer between its projections in Triton, interpreted, against the public operations in float64."""

import pytest
import torch
from torch import Tensor

from megatron_gdn.kernels import chunk_gated_delta_rule, gated_delta_mixer, prepare_chunk_table
from megatron_gdn.kernels.gated_delta_rule import prepare as stage_prepare
from megatron_gdn.kernels.gated_delta_rule.inputs_triton import inputs
from megatron_gdn.kernels.gated_delta_rule.prepare import prepare
from megatron_gdn.kernels.l2norm import L2NORM_EPS
from megatron_gdn.kernels.varlen import table_of_batch
from tests.kernels.data import bounds, loss, rms_error, rule_inputs

# float32: chains of ten sums of up to hundreds of terms; gradients of gates and their parameters are sums of products
# of both signs. 16 bits: q, k, v, o and their gradients are each rounded on their way, to 2^-9 in bfloat16.
FLOAT32 = dict(y=1e-5, mixed=1e-5, gates=5e-5, conv_weight=1e-5, norm_weight=1e-5, A_log=5e-5, dt_bias=5e-5)
BFLOAT16 = dict(y=1e-2, mixed=1.5e-2, gates=2e-2, conv_weight=1.5e-2, norm_weight=1e-2, A_log=2e-2, dt_bias=2e-2)


def layer(B=1, T=70, H=1, HV=2, K=12, V=20, width=4, *, gate=True, decay=True) -> tuple[dict[str, Tensor], dict]:
    """Tensors in float64 and the options that go with them."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    channels = 2 * H * K + HV * V
    tensors = dict(
        # Sequence first, as Megatron has it.
        mixed=normal(T, B, channels + HV * V * gate).transpose(0, 1),
        gates=normal(T, B, HV * (1 + decay)).transpose(0, 1),
        conv_weight=normal(channels, width) * 0.5,
        norm_weight=normal(V),
    )
    if decay:
        tensors |= dict(A_log=normal(HV), dt_bias=normal(HV) - 1)
    return tensors, dict(num_key_heads=H, num_value_heads=HV, key_head_dim=K)


def run(tensors: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """y and the gradients of all tensors."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    y = gated_delta_mixer(**leaves, **options)
    grads = torch.autograd.grad(loss(y), list(leaves.values()))
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def check(tensors: dict[str, Tensor], options: dict, dtype: torch.dtype = torch.float32) -> None:
    given = {n: x.to(torch.float32 if n in ("A_log", "dt_bias") else dtype) for n, x in tensors.items()}
    exact = run({n: x.double() for n, x in given.items()}, **options, backend="torch")
    ours, limits = run(given, **options, backend="triton"), FLOAT32 if dtype == torch.float32 else BFLOAT16
    errors = {name: rms_error(ours[name], x) for name, x in exact.items()}
    assert ours["mixed"].dtype == dtype and ours["mixed"].shape == tensors["mixed"].shape
    too_large = {name: f"{error:.1e}" for name, error in errors.items() if not error <= limits[name]}
    assert not too_large, f"{too_large} of {errors}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_operations(dtype):
    tensors, options = layer(B=2)
    check(tensors, options, dtype)


# Two key heads; K a power of two and V beyond a block of channels; no gate and no norm; DeltaNet with eigenvalues down
# to -1; taps of 2 and two tokens.
@pytest.mark.parametrize(
    "shape, options",
    [
        (dict(H=2, HV=2, K=16, V=36), {}),
        (dict(gate=False), dict(use_qk_l2norm=False)),
        (dict(decay=False), dict(allow_neg_eigval=True)),
        (dict(width=2, T=2, HV=3), {}),
    ],
    ids=str,
)
def test_variants(shape, options):
    tensors, sizes = layer(**shape)
    if not options.get("use_qk_l2norm", True):
        tensors["conv_weight"] /= 3  # |k| stays below 1
    check(tensors, sizes | options)


def test_documents():
    lengths = (0, 2, 70, 0, 1, 64, 0)
    tensors, options = layer(T=sum(lengths))
    check(tensors, options | dict(cu_seqlens=prepare_chunk_table(bounds(*lengths))))


def test_norms_are_those_of_the_stored_rows():
    """The first stage gives the same with the norms of the fused kernel as with those that it computes."""
    tensors, _ = layer(B=2, H=2, HV=2)
    mixed, gates = (tensors[name].bfloat16() for name in ("mixed", "gates"))
    parameters = (tensors["conv_weight"].bfloat16(), tensors["A_log"].float(), tensors["dt_bias"].float())
    table = table_of_batch(mixed, None)
    qkv, g, beta, norms = inputs(
        mixed, gates[..., 2:], gates[..., :2], *parameters, heads=(2, 2), sizes=(12, 20), table=table,
        l2norm_eps=L2NORM_EPS, beta_max=1.0,
    )  # fmt: skip
    q, k = (x.unflatten(-1, (2, 12)) for x in qkv[..., :48].split(24, -1))
    common = dict(table=table, l2norm_eps=L2NORM_EPS, negative_eigenvalues=False)
    computed = prepare(q, k, g, beta, **common)
    # NaN in the place of q: it is not read.
    given = prepare(q * float("nan"), k, g, beta, **common, norms=norms)
    assert torch.equal(given.G, computed.G)
    for name in ("rq", "rk"):
        assert rms_error(getattr(given, name), getattr(computed, name)) < 2e-7
    # T is rounded to bfloat16: a last bit of the norms may turn one of its roundings.
    assert rms_error(given.T, computed.T) < 1e-3


def test_no_tokens():
    tensors, options = layer(T=0)
    found = run({n: x.float() for n, x in tensors.items()}, **options, backend="triton")
    assert found["y"].shape == (1, 0, 2, 20) and found["conv_weight"].abs().max() == 0


def test_errors():
    tensors, options = layer()
    given = {n: x.float() for n, x in tensors.items()}

    def call(**changes):
        return gated_delta_mixer(**(given | options | changes), backend="triton")

    with pytest.raises(ValueError, match=r"mixed \(\[1, 70, 103\]\) must be \[B, T, 64\] for q, k, v, or \[B, T"):
        call(mixed=given["mixed"][..., 1:])
    with pytest.raises(ValueError, match=r"gates \(\[1, 70, 3\]\) must be \[B, T, 2 HV\], b and alpha, for HV 2"):
        call(gates=given["gates"][..., 1:])
    with pytest.raises(ValueError, match=r"conv_weight \(\[63, 4\]\) must be \[64, W\]"):
        call(conv_weight=given["conv_weight"][1:])
    with pytest.raises(ValueError, match="A_log and dt_bias must both be given, or neither"):
        call(dt_bias=None)
    with pytest.raises(ValueError, match=r"A_log \(torch.bfloat16\) must be float32: convert it"):
        call(A_log=given["A_log"].bfloat16())
    with pytest.raises(ValueError, match=r"width \(5\) must be 2, 3 or 4 for backend triton"):
        call(conv_weight=torch.zeros(64, 5))


class Recorder:
    """A kernel that notes how precisely each launch solves a chunk."""

    def __init__(self, kernel):
        self.kernel, self.seen = kernel, []

    def __getitem__(self, grid):
        def launch(*tensors, **options):
            self.seen.append(options["PRECISION"])
            self.kernel[grid](*tensors, **options)

        return launch


@pytest.mark.parametrize(
    "dtype, negative, precision",
    [(torch.bfloat16, False, "tf32"), (torch.bfloat16, True, "tf32x3"), (torch.float32, False, "tf32x3")],
)
def test_negative_eigenvalues_are_solved_with_more_digits(monkeypatch, dtype, negative, precision):
    """The interpreter always computes with all digits, so results do not show that the option reaches the kernel."""
    recorder = Recorder(stage_prepare.prepare_kernel)
    monkeypatch.setattr(stage_prepare, "prepare_kernel", recorder)
    tensors, options = layer(T=3)
    given = {n: x.float() if n in ("A_log", "dt_bias") else x.to(dtype) for n, x in tensors.items()}
    gated_delta_mixer(**given, **options, allow_neg_eigval=negative, backend="triton")
    rule = {n: x.to(dtype if n in "qkv" else torch.float32) for n, x in rule_inputs(1, 3, 1, 2, 16, 16).items()}
    chunk_gated_delta_rule(**rule, allow_neg_eigval=negative, backend="triton")
    assert recorder.seen == [precision] * 2
