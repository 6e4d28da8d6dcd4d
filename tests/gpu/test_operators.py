"""Convolution, norms, gate and decoding at real sizes: backend "triton" against plain torch in float64."""

import pytest
import torch
from torch import Tensor

from megatron_gdn.kernels import (
    causal_conv1d,
    fused_recurrent_gated_delta_rule,
    gated_delta_gate,
    l2norm,
    prepare_chunk_table,
    rms_norm_gated,
)
from megatron_gdn.kernels.causal_conv1d import causal_conv1d_ref
from megatron_gdn.kernels.gated_delta_rule.gate import gated_delta_gate_ref
from megatron_gdn.kernels.gated_delta_rule.reference import recurrent_gated_delta_rule_ref
from megatron_gdn.kernels.gated_rms_norm import rms_norm_gated_ref
from megatron_gdn.kernels.l2norm import l2norm_ref
from tests.gpu.stage import call_rule, output_gradient
from tests.kernels.data import bounds, rms_error

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def results(function, tensors: list[Tensor], **options) -> list[Tensor]:
    """Outputs, then gradients of all tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    found = function(*leaves, **options)
    outputs = [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]
    gradients = torch.autograd.grad(outputs, leaves, [output_gradient(x) for x in outputs])
    return [*(x.detach() for x in outputs), *gradients]


def check_rounded_once(stage, kind: str, ours: list[Tensor], exact: list[Tensor], float32: float = 2e-6) -> None:
    """Each result is off by one rounding to its dtype and `float32`, the error of arithmetic in float32."""
    for i, (got, value) in enumerate(zip(ours, exact, strict=True)):
        rounding = rms_error(value.to(got.dtype), value, smallest=1e-30)
        stage.check(f"{kind} {str(got.dtype)[6:]} result {i}", got, value, 1.02 * rounding + float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
# (B, T, D): the layer's, no power of two, fewer tokens than taps, one token.
@pytest.mark.parametrize("shape", [(1, 8192, 8192), (4, 1000, 100), (2, 2, 96), (3, 1, 33), (2, 4097, 1000)], ids=str)
def test_convolution(stage, shape, bias, dtype):
    stage.need_gib(20)
    B, T, D = shape if not stage.rehearsal else (shape[0], min(shape[1], 70), min(shape[2], 20))
    kind, W = DTYPES[dtype], 4
    tensors = [stage.normal(B, T, D, dtype=kind), stage.normal(D, W, seed=1, dtype=kind)]
    tensors += [stage.normal(D, seed=2, dtype=kind)] * bias + [stage.normal(B, W - 1, D, seed=3, dtype=kind)]

    def with_state(function, **options):
        def call(x, weight, *rest):
            return function(x, weight, *rest[:-1], initial_state=rest[-1], **options)

        return call

    exact = results(with_state(causal_conv1d_ref), [x.double() for x in tensors])
    ours = results(with_state(causal_conv1d, output_final_state=True, backend=stage.backend), tensors)
    # The gradient of the final state joins that of x after rounding; weights sum over B T terms in float32.
    check_rounded_once(stage, "convolution", ours, exact, float32=1e-5 + (2e-3 if T < 10 and dtype != "fp32" else 0))


@pytest.mark.parametrize("activation", ["silu", None])
def test_convolution_packed_from_a_slice(stage, activation):
    """As the layer calls it: columns of the wide projection, many documents, empty and shorter than the taps too."""
    lengths = stage.lengths([0, 5, 0, 0, 700, 1, 2, 3, *((37 * n) % 331 for n in range(200)), 0])
    T, D = sum(lengths), 4096 if not stage.rehearsal else 20
    wide = stage.normal(1, T, D + 24, dtype=torch.bfloat16)
    weight = stage.normal(D, 4, seed=1, dtype=torch.bfloat16)
    table = prepare_chunk_table(bounds(*lengths), device=stage.device)

    def ours(wide, weight):
        return causal_conv1d(
            wide[..., 8 : 8 + D], weight, activation=activation, cu_seqlens=table, backend=stage.backend
        )

    def exact(wide, weight):
        x = wide[..., 8 : 8 + D]
        return causal_conv1d_ref(x, weight, activation=activation, cu_seqlens=bounds(*lengths))[0]

    expected = results(exact, [wide.double(), weight.double()])
    check_rounded_once(stage, "packed convolution", results(ours, [wide, weight]), expected, float32=1e-5)


# Rows of the layer's heads; no power of two; one row.
ROWS = [(2, 4096, 32, 128), (1000, 100), (1, 200), (3, 777, 5, 60), (512, 2048)]


def rows(stage, shape):
    return shape if not stage.rehearsal else (*(min(n, 3) for n in shape[:-1]), min(shape[-1], 50))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_l2norm(stage, shape, dtype):
    x = stage.normal(*rows(stage, shape), dtype=DTYPES[dtype])
    exact = results(l2norm_ref, [x.double()])
    check_rounded_once(stage, "l2norm", results(l2norm, [x], backend=stage.backend), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "sigmoid", None])
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_gated_norm(stage, shape, activation, dtype):
    shape, kind = rows(stage, shape), DTYPES[dtype]
    tensors = [stage.normal(*shape, dtype=kind), stage.normal(shape[-1], seed=1, dtype=kind)]
    tensors += [stage.normal(*shape, seed=2, dtype=kind)] if activation else []
    options = dict(activation=activation or "silu")
    exact = results(rms_norm_gated_ref, [x.double() for x in tensors], **options)
    ours = results(rms_norm_gated, tensors, **options, backend=stage.backend)
    # The gradient of the weight is a sum over up to 2^18 rows in float32.
    check_rounded_once(stage, "gated norm", ours, exact, float32=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 8192, 32), (1000, 5), (1, 1, 64)], ids=str)
def test_gate(stage, shape, dtype):
    shape = shape if not stage.rehearsal else (*(min(n, 40) for n in shape[:-1]), min(shape[-1], 8))
    alpha = stage.normal(*shape, dtype=DTYPES[dtype])
    A_log, dt_bias = stage.normal(shape[-1], seed=1), stage.normal(shape[-1], seed=2)
    exact = results(gated_delta_gate_ref, [x.double() for x in (alpha, A_log, dt_bias)])
    ours = results(gated_delta_gate, [alpha, A_log, dt_bias], backend=stage.backend)
    assert ours[0].dtype == torch.float32
    # Gradients of A_log and dt_bias are sums over 2^14 tokens whose signs cancel.
    check_rounded_once(stage, "gate", ours, exact, float32=2e-5)


# (requests, tokens each): decoding, a batch of it, speculation, a short prefill.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requests, tokens", [(1, 1), (64, 1), (8, 5), (2, 130)])
@pytest.mark.parametrize("K, V", [(128, 128), (60, 100), (256, 512)])
def test_decode(stage, requests, tokens, K, V, dtype):
    H, HV = stage.heads(4, 8)
    tokens = min(tokens, 9) if stage.rehearsal else tokens
    shape = (min(requests, 3) if stage.rehearsal else requests, tokens, H, HV, stage.head(K), stage.head(V))
    tensors = stage.rule_inputs(*shape, DTYPES[dtype], states=shape[0])
    options = dict(use_qk_l2norm_in_kernel=True, output_final_state=True)
    with torch.no_grad():
        exact = call_rule(recurrent_gated_delta_rule_ref, {n: x.double() for n, x in tensors.items()}, **options)
        ours = call_rule(fused_recurrent_gated_delta_rule, tensors, **options, backend=stage.backend)
    assert ours[1].dtype == torch.float32
    check_rounded_once(stage, "decode", list(ours), list(exact), float32=1e-5)


def test_decode_packed(stage):
    lengths = [1, 0, 3, 1, 1, 7, 0, 20]
    H, HV = stage.heads(4, 8)
    D = stage.head(128)
    tensors = stage.rule_inputs(1, sum(lengths), H, HV, D, D, torch.bfloat16, states=len(lengths))
    options = dict(use_qk_l2norm_in_kernel=True, output_final_state=True)
    with torch.no_grad():
        wide, packed = {n: x.double() for n, x in tensors.items()}, bounds(*lengths)
        exact = call_rule(recurrent_gated_delta_rule_ref, wide, **options, cu_seqlens=packed)
        options |= dict(cu_seqlens=prepare_chunk_table(packed, device=stage.device), backend=stage.backend)
        ours = call_rule(fused_recurrent_gated_delta_rule, tensors, **options)
    check_rounded_once(stage, "packed decode", list(ours), list(exact), float32=1e-5)
