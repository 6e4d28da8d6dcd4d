"""Muon with its states dealt out over data-parallel ranks equals Muon with all of them on every rank, bit for bit; each
state and each orthogonalisation is on one rank; checkpoints go to other numbers of ranks."""

from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_gdn.config import load_config
from megatron_gdn.cost import model_cost
from tests.ranks import pool
from tests.training.test_deepspeed import two_steps
from tests.training.test_engine import VOCABULARY, compare, run_config, train_steps
from tests.training.test_layouts import groups_of

H2 = dict(pattern="M-G-S-", sliding_attention={"window": 25}, mamba_num_heads=4, mamba_head_dim=8, mamba_state_dim=16)


def muon(parallel: dict | None = None, training: dict | None = None, *, clip_grad: float = 0.5, **model):
    config = run_config(parallel=parallel, training=training, **(H2 | model))
    config.optimizer.name, config.optimizer.clip_grad = "muon", clip_grad
    return config


@pytest.mark.parametrize(
    "size, parallel, precision",
    [(2, {}, "bf16"), (4, {}, "fp32"), (4, dict(tensor=2, sequence=True), "bf16"), (4, dict(context=2), "fp32")],
    ids=["dp2 bf16", "dp4", "tp2 dp2 bf16", "dp2 cp2"],
)
def test_owners_change_no_bit(size, parallel, precision):
    """Without clipping, as the gradient norm is a sum in another order."""
    found = [
        pool(size).run(
            train_steps,
            muon(parallel | dict(distributed_optimizer=shards), dict(precision=precision), clip_grad=0.0),
            groups=groups_of(parallel),
        )
        for shards in (True, False)
    ]
    for dealt_out, whole in zip(*found, strict=True):
        assert dealt_out["losses"] == whole["losses"]
        assert dealt_out["norms"] == pytest.approx(whole["norms"], rel=1e-6)  # float32 sums of squares
        assert dealt_out["weights"].keys() == whole["weights"].keys()
        assert all(torch.equal(dealt_out["weights"][key], weight) for key, weight in whole["weights"].items())


def what_a_rank_has(config) -> tuple[dict[str, int], dict[str, int], int, set[str]]:
    """Bytes of optimizer states and master weights by parameter, numbers of matrices of Muon's parameters, iterations
    of a step, and names of all parameters."""
    from megatron_gdn.training import muon as module
    from megatron_gdn.training.engine import MegatronEngine
    from tests.training.test_engine import run_steps

    engine = MegatronEngine.build(config, vocab_size=VOCABULARY, device=torch.device("cpu"))
    with mock.patch.object(module, "newton_schulz", wraps=module.newton_schulz) as calls:
        run_steps(engine, range(1))
    names = {id(getattr(param, "main_param", param)): name for name, param in engine.model.named_parameters()}
    weights = {id(param) for param in engine.model.parameters()}
    kept, matrices = {}, {}
    for chained in engine.optimizer.chained_optimizers:
        held = [param for group in chained.optimizer.param_groups for param in group["params"]]
        assert set(map(id, held)) == set(map(id, chained.optimizer.state))
        for param in held:
            tensors = [*chained.optimizer.state[param].values(), *([] if id(param) in weights else [param])]
            kept[names[id(param)]] = sum(x.numel() * x.element_size() for x in tensors if torch.is_tensor(x))
        for param, layout in zip(held, getattr(chained.optimizer, "layouts", []), strict=False):
            matrices[names[id(param)]] = sum(part.count for part in layout.parts)
    return kept, matrices, sum(call.args[0].shape[0] for call in calls.call_args_list), set(names.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [2, 4])
def test_each_state_and_each_orthogonalisation_is_on_one_rank(size, precision):
    training = dict(precision=precision)
    [(whole, matrices, num_done, names)] = pool(1).run(what_a_rank_has, muon(training=training), groups={})
    assert whole.keys() == names and num_done == sum(matrices.values())
    found = pool(size).run(what_a_rank_has, muon(training=training), groups={})
    owned = [name for kept, *_ in found for name in kept]
    assert len(owned) == len(names) and set(owned) == names
    for kept, of_rank, done, _ in found:
        assert all(kept[name] == whole[name] for name in kept)
        assert 0 < done == sum(of_rank.values()) < num_done
        # What is dealt out one by one exceeds a share by less than a piece.
        assert sum(kept.values()) < sum(whole.values()) / size + max(whole.values())
    assert sum(done for _, _, done, _ in found) == num_done
    assert sum(sum(kept.values()) for kept, *_ in found) == sum(whole.values())


def test_tensor_parallel_ranks_own_parts_of_the_same_weights():
    """Ranks 0 and 1 are the first data-parallel rank, 2 and 3 the second."""
    config = muon(dict(tensor=2))
    first, also_first, second, also_second = (
        set(kept) for kept, *_ in pool(4).run(what_a_rank_has, config, groups=dict(tensor_model_parallel_size=2))
    )
    assert first == also_first and second == also_second and not first & second


def loads_of(path: Path) -> list:
    """What the parameters of a recipe's model cost their owners, without memory for them."""
    from megatron_gdn.hybrid.model import build_model, padded_vocab_size, transformer_config
    from megatron_gdn.training.muon import layouts
    from megatron_gdn.training.optimizer import load_of

    config = load_config(path, ["parallel.context=1"])
    host = transformer_config(config.model, config.parallel, dtype=torch.bfloat16)
    vocab_size = padded_vocab_size(config.model.vocab_size, config.model.vocab_multiple)
    with torch.device("meta"):
        model = build_model(host, config.model, vocab_size=vocab_size, max_sequence_length=4096, seed=None)
    of_muon = layouts(model, tp_size=1)
    return [load_of(param, of_muon.get(name)) for name, param in model.named_parameters()]


def test_the_papers_model_is_dealt_out_evenly():
    """h1_1.3b on 8 ranks: no rank has a tenth more than an eighth of the bytes or of the FLOPs."""
    from megatron_gdn.training.owners import deal_out

    path = Path("examples/recipes/h1_1.3b_muon.yaml")
    [loads] = pool(1).run(loads_of, path, groups={})
    cost = model_cost(load_config(path), vocab_size=32000)
    assert sum(load.num_bytes for load in loads) == pytest.approx(cost.memory_bytes(0)["optimizer"], rel=1e-3)
    owners = deal_out(loads, 8)
    fullest = {}
    for name in ("num_bytes", "flops"):
        values = [getattr(load, name) for load in loads]
        fullest[name] = max(sum(x for x, owner in zip(values, owners, strict=True) if owner == i) for i in range(8))
        assert fullest[name] < 1.1 * sum(values) / 8
    assert f"the fullest GPU keeps {fullest['num_bytes'] / 2**30:.2f} GiB" in path.read_text()


@pytest.mark.parametrize("name", ["h1_1.3b", "gdn_1.3b", "h2_1.3b", "qwen3_next_style_7b"])
def test_the_cost_model_is_a_seventh_below_the_fullest_rank_at_most(name):
    """Its mean share, or the largest parameter."""
    from megatron_gdn.training.owners import deal_out

    path = Path(f"examples/recipes/{name}.yaml")
    [loads] = pool(1).run(loads_of, path, groups={})
    config = load_config(path, ["optimizer.name=muon", "parallel.context=1"])
    for num_ranks in (2, 4, 8, 16, 32, 64):
        kept = [0.0] * num_ranks
        for load, owner in zip(loads, deal_out(loads, num_ranks), strict=True):
            kept[owner] += load.num_bytes
        cost = model_cost(config, vocab_size=config.model.vocab_size, data_parallel=num_ranks)
        expected = cost.memory_bytes(0)["optimizer"]
        assert 0.999 * expected < max(kept) < 8 / 7 * expected, num_ranks


def test_bytes_and_flops_are_both_dealt_out():
    """By bytes alone the first would balance the three others, and one rank had all FLOPs."""
    from megatron_gdn.training.owners import Load, deal_out

    loads = [Load(num_bytes=10), Load(num_bytes=4, flops=9), Load(num_bytes=3, flops=9), Load(num_bytes=3)]
    assert deal_out(loads, 2) == [0, 1, 0, 1]
    assert deal_out(loads, 1) == [0] * 4
    assert len(set(deal_out(loads, 8))) == 4
    assert sorted(deal_out([Load(num_bytes=5), Load(num_bytes=7)], 2)) == [0, 1]  # a stage without Muon


def train_as_with_apex(config) -> tuple[dict, list[int]]:
    """Steps under a clipping kernel that takes no empty list; numbers of own parameters of AdamW and Muon."""
    from megatron.core.optimizer import clip_grads

    from megatron_gdn.training.optimizer import MuonBesideAdamW

    counts, applier, build = [], clip_grads.multi_tensor_applier, MuonBesideAdamW.build

    def apply(kernel, buffer, lists, *args):
        assert lists[0], "tensor_lists[0].size() is not > 0"
        return applier(kernel, buffer, lists, *args)

    def counted(*args):
        optimizer = build(*args)
        counts.extend(len(x.get_parameters()) for x in optimizer.chained_optimizers)
        return optimizer

    with (
        mock.patch.object(clip_grads, "multi_tensor_applier", apply),
        mock.patch.object(MuonBesideAdamW, "build", counted),
    ):
        return train_steps(config), counts


def test_ranks_may_own_nothing():
    """Two matrices for four ranks."""
    config = muon(pattern="G")
    [reference] = pool(1).run(train_steps, config, groups={})
    found = pool(4).run(train_as_with_apex, config, groups={})
    assert sorted(muons for _, (_, muons) in found) == [0, 0, 1, 1]
    for result, _ in found:
        compare(result, reference, tolerance=1e-6)


def steps_of_the_last_owner(config, folder: str, *, resume: bool) -> dict:
    """`two_steps` where the last data-parallel rank owns everything."""
    from megatron_gdn.training import optimizer

    with mock.patch.object(optimizer, "deal_out", lambda loads, num_ranks: [num_ranks - 1] * len(loads)):
        return two_steps(config, folder, resume=resume)


def test_the_step_count_is_saved_where_the_first_rank_owns_nothing(tmp_path):
    """AdamW corrects its moments by it; rank 0 writes it."""
    config = muon()
    [reference] = pool(1).run(train_steps, config, 4, groups={})
    parts = [pool(2).run(steps_of_the_last_owner, config, str(tmp_path), resume=i == 1, groups={})[0] for i in (0, 1)]
    compare(parts[1] | {key: parts[0][key] + parts[1][key] for key in ("losses", "norms")}, reference)


def states(config, folder: str, *, resume: bool) -> dict[str, torch.Tensor]:
    """Global optimizer states and master weights by key on disk, after two steps and a checkpoint or read from it."""
    from megatron_gdn.training.checkpoint import CheckpointStore
    from megatron_gdn.training.data import Vocabulary
    from megatron_gdn.training.engine import MegatronEngine
    from megatron_gdn.training.state import TrainState
    from tests.training.test_engine import put_together, run_steps

    engine = MegatronEngine.build(config, vocab_size=VOCABULARY, device=torch.device("cpu"))
    parts = {name: getattr(engine, name) for name in ("model", "optimizer", "scheduler", "gathered")}
    state = TrainState(vocabulary=Vocabulary(size=VOCABULARY, eod_id=0), data_key="", **parts)
    store = CheckpointStore(Path(folder))
    if resume:
        assert state.load(store, config)
    else:
        run_steps(engine, range(2))
        state.step = 2
        state.save(store, config)
    steps = {group["step"] for group in engine.optimizer.param_groups if "step" in group}
    return put_together(state.sharded(loading=False, with_rng=False)) | {"step": torch.tensor(list(steps))}


WHOLE = dict(distributed_optimizer=False)
"""Every rank has all states, as before owners were; such checkpoints exist."""


@pytest.mark.parametrize(
    "first, second, sizes, precision",
    [
        ({}, {}, (2, 1), "bf16"),
        ({}, {}, (1, 2), "fp32"),
        ({}, {}, (2, 4), "fp32"),
        ({}, {}, (4, 2), "bf16"),
        (WHOLE, {}, (2, 4), "bf16"),
        ({}, WHOLE, (4, 2), "fp32"),
        ({}, dict(tensor=2), (2, 4), "fp32"),
        (dict(pipeline=2), dict(context=2), (4, 4), "bf16"),
    ],
    ids=["2 to 1", "1 to 2", "2 to 4", "4 to 2", "whole 2 to 4", "4 to whole 2", "2 to tp 2 dp 2", "pp 2 to cp 2"],
)
def test_states_go_to_other_numbers_of_ranks(tmp_path, first, second, sizes, precision):
    build = partial(muon, training=dict(precision=precision), linear_num_key_heads=3, linear_num_value_heads=6)
    saved, read = (
        pool(size).run(states, build(parallel), str(tmp_path), resume=i == 1, groups=groups_of(parallel))[0]
        for i, (parallel, size) in enumerate(zip((first, second), sizes, strict=True))
    )
    assert any("momentum_buffer" in key for key in saved) and any("exp_avg_sq" in key for key in saved)
    assert read.keys() == saved.keys() and read["step"].tolist() == [2]
    assert all(torch.equal(read[key], value) for key, value in saved.items())


@pytest.mark.parametrize("sizes", [(2, 1), (1, 4), (4, 2)], ids=str)
def test_training_goes_on_at_other_numbers_of_ranks(tmp_path, sizes):
    """As one process that was never interrupted: float32 sums in another order."""
    [reference] = pool(1).run(train_steps, muon(), 4, groups={})
    parts = [pool(n).run(two_steps, muon(), str(tmp_path), resume=i == 1, groups={})[0] for i, n in enumerate(sizes)]
    compare(parts[1] | {key: parts[0][key] + parts[1][key] for key in ("losses", "norms")}, reference)
