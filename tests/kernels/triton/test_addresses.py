"""Addresses beyond 32 bits, without the memory: views whose rows lie 2^24 elements apart in pages that nobody touches.

Token 128 of a row is more than 2^31 elements from its start; an offset in 32 bits would wrap and lie before the buffer.
"""

import pytest
import torch

from megatron_gdn.kernels import causal_conv1d, chunk_gated_delta_rule, rms_norm_gated, ssd
from tests.kernels.data import rule_inputs

T, H, HV, K, V = 131, 1, 2, 16, 16
STRIDE = 2**24 + 64


@pytest.fixture(scope="module")
def wide():
    """`[1, T, STRIDE]` bfloat16, 4.4 GB of addresses, and as many before it, where a wrapped offset leads."""
    try:
        return torch.empty(1, T + 129, STRIDE, dtype=torch.bfloat16)[:, 129:]
    except RuntimeError as error:
        pytest.skip(f"this machine does not lend addresses without memory: {error}")


def spread(wide: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies whose rows lie side by side in `wide`, `[1, T, heads, D]`."""
    found, start = {}, 0
    for name, x in tensors.items():
        width = x[0, 0].numel()
        found[name] = wide[..., start : start + width].view(1, T, *x.shape[2:])
        found[name].copy_(x)
        start += width
    return found


def results(function, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    y = function(**leaves)
    # The gradient of the result lies as far apart as the inputs.
    y.backward((tensors["x"] if "x" in tensors else tensors["v"]).detach().reshape(y.shape))
    return {"y": y.detach()} | {name: x.grad for name, x in leaves.items()}


def rule(**x):
    return chunk_gated_delta_rule(**x, use_qk_l2norm_in_kernel=True, backend="triton")[0]


def state_space(**x):
    return ssd(**x, dt=torch.linspace(0.1, 1, T).expand(1, HV, T).mT, A=torch.tensor([-0.1, -1.0]), backend="triton")[0]


def convolution(x):
    weight = torch.linspace(-1, 1, 4 * HV * V).view(-1, 4).bfloat16()
    return causal_conv1d(x.flatten(2), weight, backend="triton")[0].view(x.shape)


def norm(x, z):
    return rms_norm_gated(x, torch.linspace(0.5, 1.5, V).bfloat16(), z, backend="triton")


def inputs(name: str) -> dict[str, torch.Tensor]:
    found = {n: x.bfloat16() for n, x in rule_inputs(1, T, H, HV, K, V).items() if n != "initial_state"}
    if name == "rule":
        return found
    if name == "ssd":
        return dict(x=found["v"], B=found["k"], C=found["q"])
    return dict(x=found["v"]) if name == "convolution" else dict(x=found["v"], z=-found["v"])


FUNCTIONS = {"rule": rule, "ssd": state_space, "convolution": convolution, "norm": norm}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_that_lie_far_apart(wide, name):
    """The same bits as of packed inputs, forward and backward."""
    packed = inputs(name)
    expected = results(FUNCTIONS[name], packed)
    found = results(FUNCTIONS[name], spread(wide, packed))
    for n, x in expected.items():
        assert x.float().square().mean() > 0 and torch.equal(found[n], x), n
