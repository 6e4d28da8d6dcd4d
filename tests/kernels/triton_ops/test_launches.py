"""What calls launch, seen without running a kernel: on which device, how often, and no second derivatives."""

import contextlib
import importlib

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from megatron_gdn.kernels import (
    causal_conv1d,
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
    gated_delta_mixer,
    l2norm,
    rms_norm_gated,
    ssd,
)
from megatron_gdn.kernels.causal_conv1d import causal_conv1d_update
from megatron_gdn.kernels.compile_report import MODULES
from megatron_gdn.kernels.gated_delta_rule.gate import gates

T, H, HV, K, V = 3, 1, 2, 16, 16


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Kernels that were launched, each with the devices that were made current around it; none of them runs."""
    seen, around = [], []

    @contextlib.contextmanager
    def device_of(x):
        around.append(x.device)
        yield
        around.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *_, **__: seen.append((self.__name__, list(around))))
    return seen


def leaves(*shapes) -> list[torch.Tensor]:
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def rule(backend, **options):
    *tokens, g, beta, state = leaves((1, T, H, K), (1, T, H, K), (1, T, HV, V), (1, T, HV), (1, T, HV), (1, HV, K, V))
    options |= dict(initial_state=state, output_final_state=True, backend=backend)
    return chunk_gated_delta_rule(*tokens, g=-g.square(), beta=beta.sigmoid(), **options), tokens[0]


def mixer(backend):
    channels = 2 * H * K + HV * V
    mixed, gate, conv, norm, A_log, dt_bias = leaves(
        (1, T, channels + HV * V), (1, T, 2 * HV), (channels, 4), (V,), (HV,), (HV,)
    )
    options = dict(num_key_heads=H, num_value_heads=HV, key_head_dim=K, backend=backend)
    y = gated_delta_mixer(
        mixed, gates=gate, conv_weight=conv, norm_weight=norm, A_log=A_log, dt_bias=dt_bias, **options
    )
    return (y,), mixed


def state_space(backend):
    x, dt, A, B, C, D, state = leaves(
        (1, T, HV, V), (1, T, HV), (HV,), (1, T, H, K), (1, T, H, K), (HV,), (1, HV, K, V)
    )
    options = dict(D=D, initial_state=state, output_final_state=True, backend=backend)
    return ssd(x, dt=dt.exp(), A=-A.exp(), B=B, C=C, **options), x


def convolution(backend):
    x, weight, bias, state = leaves((1, T, 6), (6, 4), (6,), (1, 3, 6))
    return causal_conv1d(x, weight, bias, initial_state=state, output_final_state=True, backend=backend), x


def norm(backend):
    x, weight, z = leaves((T, V), (V,), (T, V))
    return (rms_norm_gated(x, weight, z, backend=backend),), x


def norm_of_keys(backend):
    [x] = leaves((T, K))
    return (l2norm(x, backend=backend),), x


def gate(backend):
    alpha, b, A_log, dt_bias = leaves((1, T, HV), (1, T, HV), (HV,), (HV,))
    return gates(alpha, b, A_log, dt_bias, backend=backend), alpha


WITH_GRADIENTS = (rule, mixer, state_space, convolution, norm, norm_of_keys, gate)


def test_every_kernel_is_launched_on_the_device_of_its_tensors(launches):
    """Triton launches on the current device, which with several GPUs in a process may be another one."""
    for function in WITH_GRADIENTS:
        outputs, x = function("triton")
        torch.autograd.grad(sum(y.sum() for y in outputs), x)
    with torch.no_grad():
        causal_conv1d_update(*leaves((2, 6), (2, 3, 6), (6, 4)), backend="triton")
        q, v, g = leaves((1, T, H, K), (1, T, HV, V), (1, T, HV))
        fused_recurrent_gated_delta_rule(q, q, v, g=g, beta=g, backend="triton")
    modules = [importlib.import_module(f"megatron_gdn.kernels.{name}") for name in MODULES]
    kernels = {case.kernel.__name__ for module in modules for case in module.compile_cases("sm_90")}
    # Context parallelism launches this one, between ranks.
    assert {name for name, _ in launches} == kernels - {"affine_map_kernel"}
    assert [name for name, around in launches if around[-1:] != [torch.device("cpu")]] == []


@pytest.mark.parametrize("recompute, times", [(None, 2), (True, 2), (False, 1)])
def test_states_are_computed_again_unless_they_are_to_be_kept(launches, recompute, times):
    outputs, x = rule("triton", recompute_states=recompute)
    torch.autograd.grad(outputs[0].sum(), x)
    assert [name for name, _ in launches].count("state_kernel") == times


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("function", WITH_GRADIENTS)
def test_second_derivatives_are_refused(function, backend):
    """The formulas of backward passes take what was saved for constants: their own gradients would be wrong."""
    outputs, x = function(backend)
    (grad,) = torch.autograd.grad(outputs[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
