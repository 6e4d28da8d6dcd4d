"""In Megatron-LM's own trainer: its zigzag batches, model and rotary embedding, specs by `--spec`, none of our loop."""

import pytest
import torch
import torch.distributed as dist

from tests.hybrid.test_megatron_lm import TOKENS, VOCABULARY, build
from tests.ranks import pool

BATCH = 2


def step_of_the_host(name: str) -> dict:
    """Sum of losses and gradients of one batch, over the context-parallel ranks."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    cp_group = parallel_state.get_context_parallel_group()
    gpt = build(name, context_parallel_size=cp_group.size())
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(VOCABULARY, (BATCH, TOKENS + 1), generator=generator)
    batch = {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "loss_mask": (torch.rand(BATCH, TOKENS, generator=generator) > 0.2).float(),
        "position_ids": torch.arange(TOKENS).repeat(BATCH, 1),
    }
    batch = get_batch_on_this_cp_rank(batch, cp_group)
    losses = gpt(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    loss = (losses * batch["loss_mask"]).sum()
    loss.backward()
    found = {"loss": loss.detach()} | {name: param.grad for name, param in gpt.named_parameters()}
    for value in found.values():
        dist.all_reduce(value, group=cp_group)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_megatrons_zigzag_batches_equal_one_rank(ranks):
    """H2, as `--spec megatron_gdn.hybrid.layer_specs gdn_h2` builds it."""
    [expected] = pool(1).run(step_of_the_host, "gdn_h2", groups={})
    for found in pool(ranks).run(step_of_the_host, "gdn_h2", groups=dict(context_parallel_size=ranks)):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            # float32 sums in another order, over 144 tokens and six layers.
            torch.testing.assert_close(found[key], value, rtol=0, atol=2e-5 * float(value.abs().max()), msg=key)
