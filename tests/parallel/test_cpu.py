"""The CPU shim: what Megatron-Core asks of CUDA is answered, and our AdamW equals torch's."""

import os

import pytest
import torch
import torch.distributed as dist

from megatron_gdn.parallel.cpu import AdamW
from tests.ranks import pool


@pytest.mark.parametrize("adam_w_mode, theirs", [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_adamw_equals_torch(adam_w_mode, theirs):
    torch.manual_seed(0)
    start = torch.randn(7, 5, dtype=torch.float32)
    ours, reference = start.clone().requires_grad_(), start.clone().requires_grad_()
    settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizers = AdamW([ours], adam_w_mode=adam_w_mode, **settings), theirs([reference], **settings)
    for _ in range(20):
        grad = torch.randn_like(start)
        for param, optimizer in zip((ours, reference), optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
    # float32 updates of size lr accumulate rounding of 20 steps: a few ulp of values near 1
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def cuda_calls_on_cpu():
    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.zeros(2, device="cuda").cuda().to("cuda:0").device.type == "cpu"
    assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is inert where CUDA exists")
def test_cuda_calls_are_answered_on_the_cpu():
    pool(2).run(cuda_calls_on_cpu, groups={})
    assert torch.zeros(2).type() == "torch.FloatTensor"  # this process did not install it


def _threads_of_groups(count: int) -> int:
    before = len(os.listdir("/proc/self/task"))
    groups = [dist.new_group() for _ in range(count)]
    x = torch.ones(1)
    for group in groups:
        dist.all_reduce(x, group=group)
    assert x.item() == 2.0**count
    return len(os.listdir("/proc/self/task")) - before


def test_process_groups_share_one_event_loop():
    # Two threads of each group wait for work; a loop of its own would be a third that never sleeps for long.
    assert pool(2).run(_threads_of_groups, 10) == [20, 20]
