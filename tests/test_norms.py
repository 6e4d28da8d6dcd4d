"""Norms of the layers against their formulas in float64."""

import pytest
import torch

from tests import attention_layer
from tests.ranks import pool
from tests.test_gated_delta_net import assert_close


def zero_centered(sequence_parallel):
    from megatron_gdn.norms import HeadRMSNorm, ZeroCenteredRMSNorm

    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        config = attention_layer.layer_config(sequence_parallel, params_dtype=dtype)
        norm = ZeroCenteredRMSNorm(config, 24, eps=1e-3)
        assert norm.weight.sequence_parallel == sequence_parallel and not norm.weight.any()
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(-1e-2, 1e-2, 24))
        x, weights = attention_layer.inputs()
        x = x.to(dtype).requires_grad_()
        y = norm(x)
        of_heads = HeadRMSNorm(config, 24, eps=1e-3, zero_centered=True)
        of_heads.weight.data.copy_(norm.weight)
        assert torch.equal(of_heads(x), y)
        (y * weights.to(dtype)).sum().backward()
        results.append((x.detach(), norm.weight.detach(), y.detach(), x.grad, norm.weight.grad))
    return results


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_zero_centered_norm(sequence_parallel):
    # Sums of 24 and, for the weight, of 80 terms; bfloat16 rounds the result once, by 2**-8 of it at most, and the
    # gradient comes from rounded weights of the loss.
    bounds = {torch.float32: (1e-6, 2e-6), torch.bfloat16: (2**-8, 2**-7), torch.float64: (1e-14, 1e-13)}
    loss_weights = attention_layer.inputs()[1].double()
    for result in pool(2).run(zero_centered, sequence_parallel, groups=dict(tensor_model_parallel_size=2)):
        for x, weight, y, *gradients in result:
            forward, backward = bounds[x.dtype]
            leaves = [t.double().requires_grad_() for t in (x, weight)]
            expected = leaves[0] / (leaves[0].square().mean(-1, keepdim=True) + 1e-3).sqrt() * (1 + leaves[1])
            assert ((y.double() - expected).abs() <= forward * expected.abs() + 1e-15).all()
            for ours, reference in zip(
                gradients, torch.autograd.grad((expected * loss_weights).sum(), leaves), strict=True
            ):
                assert_close(ours, reference, backward)
