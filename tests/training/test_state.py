"""Random generators go into a checkpoint and come back where the layout is the same."""

import torch

from tests.ranks import pool
from tests.training.test_engine import VOCABULARY, run_config, run_steps


def draw() -> torch.Tensor:
    """Numbers of both generators: torch's and the one that Megatron keeps for tensor-parallel ranks."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        of_tracker = torch.rand(4)
    return torch.cat([torch.rand(4), of_tracker])


def numbers(folder) -> list[torch.Tensor]:
    """After a save, after loading it, and after loading it at another layout."""
    from megatron_gdn.training.checkpoint import CheckpointStore
    from megatron_gdn.training.data import Vocabulary
    from megatron_gdn.training.engine import MegatronEngine
    from megatron_gdn.training.state import TrainState

    config = run_config("G-")
    engine = MegatronEngine.build(config, vocab_size=VOCABULARY, device=torch.device("cpu"))
    parts = {name: getattr(engine, name) for name in ("model", "optimizer", "scheduler", "gathered")}
    state = TrainState(vocabulary=Vocabulary(size=VOCABULARY, eod_id=0), data_key="", **parts)
    run_steps(engine, range(1))
    engine.sync_parameters()
    store, found = CheckpointStore(folder), []
    state.save(store, config)
    found.append(draw())
    assert state.load(store, config)
    found.append(draw())
    config.parallel.overlap = not config.parallel.overlap
    assert state.load(store, config)
    found.append(draw())
    return found


def test_generators_go_on_at_the_same_layout_alone(tmp_path):
    [(saved, loaded, elsewhere)] = pool(1).run(numbers, tmp_path, groups={})
    assert torch.equal(loaded, saved)
    assert not (elsewhere == saved).any()
