"""Muon against the SVD, torch.optim.Muon and one process; what is Muon's, and that a resumed run is the same run."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_gdn.config import ConfigError, MuonConfig
from megatron_gdn.sections import gated_delta_net_sections
from tests.bench import muon_curves, tiny_h1
from tests.ranks import pool
from tests.training.test_deepspeed import two_steps
from tests.training.test_engine import VOCABULARY, compare, run_config, step_with_nan, train_steps
from tests.training.test_layouts import groups_of

COEFFICIENTS = MuonConfig().coefficients
HYBRIDS = {
    "H1": dict(pattern="G-S-", sliding_attention={"window": 25}),
    "H2": dict(pattern="M-G-S-", sliding_attention={"window": 25}, mamba_num_heads=4, mamba_head_dim=8,
               mamba_state_dim=16),
    "3:1": dict(pattern="G-G-G-*-", full_attention={"qk_norm": True, "output_gate": True}),
}  # fmt: skip


def muon(parallel: dict | None = None, training: dict | None = None, **model):
    config = run_config(parallel=parallel, training=training, **model)
    config.optimizer.name = "muon"
    return config


def singular_values(x: torch.Tensor, num_steps: int) -> torch.Tensor:
    """What iterations make of numbers: singular values do not mix."""
    a, b, c = COEFFICIENTS
    for _ in range(num_steps):
        x = a * x + b * x**3 + c * x**5
    return x


def by_svd(matrix: torch.Tensor, num_steps: int = 5) -> torch.Tensor:
    """A matrix with its singular values replaced, in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u * singular_values(s / s.norm(), num_steps) @ v


@pytest.mark.parametrize("shape", [(3, 8, 32), (2, 33, 9), (1, 16, 16)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("num_steps", [1, 5])
def test_iterations_change_singular_values_only(shape, num_steps):
    from megatron_gdn.training.muon import newton_schulz

    matrices = torch.randn(shape, dtype=torch.float64)
    found = newton_schulz(matrices, coefficients=COEFFICIENTS, num_steps=num_steps)
    for matrix, result in zip(matrices, found, strict=True):
        # Products of float64 in another order: rounding times the growth of small singular values, 3.4445 ** 5.
        torch.testing.assert_close(result, by_svd(matrix, num_steps), rtol=0, atol=1e-12)


def test_five_iterations_bring_singular_values_near_one():
    """The author's coefficients: from 1e-2 of the norm on, results lie in [0.68, 1.14]; float32 keeps to it."""
    from megatron_gdn.training.muon import newton_schulz

    curve = singular_values(torch.linspace(1e-2, 1, 100_000, dtype=torch.float64), 5)
    assert 0.68 < curve.min() and curve.max() < 1.14
    matrix = torch.randn(2, 12, 40)
    found = torch.linalg.svdvals(newton_schulz(matrix, coefficients=COEFFICIENTS, num_steps=5))
    assert 0.68 < found.min() and found.max() < 1.14
    zeros = newton_schulz(torch.zeros(1, 4, 6), coefficients=COEFFICIENTS, num_steps=5)
    assert torch.equal(zeros, torch.zeros(1, 4, 6))  # a ghost head


def directions(model_options: dict) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A random update of every weight of Muon, and what it becomes."""
    from megatron_gdn.training.engine import MegatronEngine

    engine = MegatronEngine.build(muon(**model_options), vocab_size=VOCABULARY, device=torch.device("cpu"))
    optimizer = engine.optimizer.chained_optimizers[1].optimizer
    names = {id(param): name for name, param in engine.model.named_parameters()}
    found = {}
    for param, layout in zip(optimizer.param_groups[0]["params"], optimizer.layouts, strict=True):
        update = torch.randn(param.shape)
        scaled = optimizer.orthogonal(update, layout) * optimizer._scales(layout, param)
        found[names[id(param)]] = update, scaled
    return found


def test_each_head_of_each_section_is_orthogonal_on_its_own():
    """Slices by hand, in the order of the layer's table: 2 heads of 8 rows of q and k, 4 of 12 of v and z."""
    [found] = pool(1).run(directions, dict(pattern="G-*-", full_attention={"output_gate": True}), groups={})
    layer = "decoder.layers.{}.{}.weight"
    sections = gated_delta_net_sections(num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=12)
    assert [s.name for s in sections["in_proj"]] == ["query", "key", "value", "z"]
    heads = {
        layer.format(0, "self_attention.in_proj"): [8] * 2 + [8] * 2 + [12] * 4 + [12] * 4,
        layer.format(1, "self_attention.linear_qkv"): [8] * (2 * (2 + 2 + 1 + 1)),
        layer.format(0, "mlp.linear_fc1"): [48, 48],
        layer.format(0, "mlp.linear_fc2"): [32],
        layer.format(0, "self_attention.out_proj"): [32],
        layer.format(1, "self_attention.linear_proj"): [32],
    }
    for name, rows in heads.items():
        update, result = found[name]
        assert sum(rows) == len(update)
        for before, after in zip(update.split(rows), result.split(rows), strict=True):
            scale = 0.2 * max(before.shape) ** 0.5
            # float32 rounding, 6e-8 of the norm, times 3.4445 ** 5 for small singular values
            torch.testing.assert_close(after.double(), scale * by_svd(before), rtol=0, atol=1e-4, msg=name)


def filled_up(dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random update of two heads of 8 rows (columns) and 5 that fill the weight up, and what it becomes."""
    from megatron.core import parallel_state

    from megatron_gdn.training.muon import Layout, Matrices, Muon

    weight = torch.nn.Parameter(torch.randn((21, 40) if dim == 0 else (40, 21)))
    part = Matrices(num_rows=16, count=2 if dim == 0 else 1, matrix_rows=8 if dim == 0 else 16)
    layout = Layout(dim=dim, parts=(part,))
    optimizer = Muon(
        [{"params": [weight]}], [layout], lr=0.1, momentum=0.9, nesterov=True, coefficients=COEFFICIENTS, num_steps=5,
        scale="original", dtype=torch.float32, tp_group=parallel_state.get_tensor_model_parallel_group(),
    )  # fmt: skip
    update = torch.randn(weight.shape)
    return update, optimizer.orthogonal(update, layout)


def test_rows_that_fill_a_weight_up_get_no_update():
    """As FP8 wants them (`row_multiple`), behind the heads."""
    [(update, found)] = pool(1).run(filled_up, 0, groups={})
    for head in (slice(0, 8), slice(8, 16)):
        torch.testing.assert_close(found[head].double(), by_svd(update[head]), rtol=0, atol=1e-4)
    assert torch.equal(found[16:], torch.zeros(5, 40))
    [(update, found)] = pool(1).run(filled_up, 1, groups={})
    torch.testing.assert_close(found[:, :16].double(), by_svd(update[:, :16]), rtol=0, atol=1e-4)
    assert torch.equal(found[:, 16:], torch.zeros(40, 5))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 and later")
@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_updates_of_an_unfused_weight_are_those_of_torch(scale, nesterov):
    assert all(pool(1).run(against_torch, scale, nesterov, groups={}))


def against_torch(scale: str, nesterov: bool) -> bool:
    from megatron.core import parallel_state

    from megatron_gdn.training.muon import Layout, Matrices, Muon

    for shape, dim in (((24, 40), 0), ((40, 24), 0), ((24, 40), 1)):
        ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
        size = shape[dim]
        layout = Layout(dim=dim, parts=(Matrices(num_rows=size, count=1, matrix_rows=size),))
        tp_group = parallel_state.get_tensor_model_parallel_group()
        options = dict(lr=0.1, momentum=0.9, nesterov=nesterov)
        own = Muon([{"params": [ours], "weight_decay": 0.2}], [layout], coefficients=COEFFICIENTS, num_steps=5,
                   scale=scale, dtype=torch.bfloat16, tp_group=tp_group, **options)  # fmt: skip
        reference = torch.optim.Muon([theirs], weight_decay=0.2, adjust_lr_fn=scale, **options)
        for step in range(4):
            ours.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            theirs.grad = ours.grad.clone()
            own.step()
            reference.step()
        # Batched and single products of bf16 may round apart: a few units of 2**-9 in entries of about 0.2.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.1 * update_size(scale, shape) * 2**-7)
    return True


def update_size(scale: str, shape: tuple[int, int]) -> float:
    """Largest entry of an update, over the learning rate."""
    from megatron_gdn.training.muon import update_scale

    return 1.2 * update_scale(scale, *shape)


UNEVEN = dict(
    pattern="G-*-",
    linear_num_key_heads=3,
    linear_num_value_heads=6,
    num_attention_heads=6,
    num_query_groups=3,
    kv_channels=8,
)
SHARED_KEYS = dict(pattern="G-*-", linear_num_key_heads=4, num_query_groups=1, kv_channels=8)
CASES = {
    "tp2": (2, dict(tensor=2), {}),
    "tp2 sp": (2, dict(tensor=2, sequence=True), {}),
    "pp2": (2, dict(pipeline=2), {}),
    "dp2": (2, {}, {}),
    "dp4": (4, {}, {}),
    "cp2": (2, dict(context=2), {}),
    "cp2 dp2": (4, dict(context=2), {}),
    "tp2 dp2": (4, dict(tensor=2, sequence=True), {}),
    "pp2 dp2": (4, dict(pipeline=2), {}),
    "tp2, heads that it does not divide": (2, dict(tensor=2), UNEVEN),
    "tp2, ranks that share a group of Mamba2": (2, dict(tensor=2), HYBRIDS["H2"]),
    "tp4, ranks that hold parts of a head": (4, dict(tensor=4), SHARED_KEYS),
}


@pytest.fixture(scope="module")
def one_process():
    """Results of one process by model."""
    found = {}

    def run(model: dict) -> dict:
        key = str(model)
        if key not in found:
            [found[key]] = pool(1).run(train_steps, muon(**model), groups={})
        return found[key]

    return run


@pytest.mark.parametrize("case", CASES)
def test_layouts_equal_one_process(one_process, case):
    size, parallel, model = CASES[case]
    reference = one_process(model)
    for result in pool(size).run(train_steps, muon(parallel, **model), groups=groups_of(parallel)):
        compare(result, reference, tolerance=1e-6)  # weights within 2e-5: float32 sums, times 3.4445 ** 5, times lr


MUONS = {
    "G": {"self_attention.in_proj.weight", "self_attention.out_proj.weight"},
    "M": {"self_attention.in_proj.weight", "self_attention.out_proj.weight"},
    "S": {"self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"},
    "*": {"self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"},
    "-": {"mlp.linear_fc1.weight", "mlp.linear_fc2.weight"},
}
ADAMWS = {
    "G": {"in_proj_ba.weight", "conv1d.weight", "A_log", "dt_bias", "out_norm.weight"},
    "M": {"in_proj_dt.weight", "conv1d.weight", "conv1d.bias", "A_log", "dt_bias", "D", "norm.weight"},
    "S": set(),
    "*": {"q_layernorm.weight", "k_layernorm.weight"},
}


def who_gets_what(config) -> tuple[list[str], list[str], int]:
    """Names of AdamW's and of Muon's parameters, and the number of the model's."""
    from megatron_gdn.training.engine import MegatronEngine

    engine = MegatronEngine.build(config, vocab_size=VOCABULARY, device=torch.device("cpu"))
    names = {id(getattr(param, "main_param", param)): name for name, param in engine.model.named_parameters()}
    held = [
        [names[id(param)] for group in optimizer.param_groups for param in group["params"]]
        for optimizer in engine.optimizer.chained_optimizers
    ]
    return *held, len(names)


@pytest.mark.parametrize("model", HYBRIDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_parameter_is_forgotten(model, precision):
    """In bf16 both hold float32 master weights."""
    options = HYBRIDS[model]
    config = muon(dict(tensor=2), training=dict(precision=precision), **options)
    layers = [symbol for symbol in options["pattern"].replace("-", "")]
    matrices = {f"decoder.layers.{i}.{name}" for i, x in enumerate(layers) for name in MUONS[x] | MUONS["-"]}
    rest = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}
    for i, symbol in enumerate(layers):
        rest |= {f"decoder.layers.{i}.{norm}.weight" for norm in ("input_layernorm", "pre_mlp_layernorm")}
        rest |= {f"decoder.layers.{i}.self_attention.{name}" for name in ADAMWS[symbol]}
    for adamws, muons, count in pool(2).run(who_gets_what, config, groups=dict(tensor_model_parallel_size=2)):
        assert set(muons) == matrices and set(adamws) == rest
        assert len(muons) + len(adamws) == count


def rates(config) -> list[tuple[float, float, float]]:
    """Learning rates of AdamW and Muon, and Muon's decay, over a run."""
    from megatron_gdn.training.engine import MegatronEngine

    engine = MegatronEngine.build(config, vocab_size=VOCABULARY, device=torch.device("cpu"))
    found = []
    for _ in range(config.training.train_steps + 1):
        adamw, muons = engine.optimizer.param_groups[0], engine.optimizer.param_groups[-1]
        assert engine.learning_rate == adamw["lr"]
        found.append((adamw["lr"], muons["lr"], muons["weight_decay"]))
        engine.scheduler.step(config.training.global_batch_size)
    return found


def test_both_follow_one_schedule():
    config = muon()
    config.optimizer.min_lr, config.optimizer.warmup_tokens = 3e-4, 10 * config.training.tokens_per_step
    config.optimizer.muon.lr = 0.02
    [found] = pool(1).run(rates, config, groups={})
    assert found[10][0] == pytest.approx(3e-3) and found[-1][0] == pytest.approx(3e-4)
    for adamw, muons, decay in found:
        assert muons == pytest.approx(adamw * 0.02 / 3e-3) and decay == 0.1


def continued(first, second, folder: Path, sizes: tuple[int, int]) -> dict:
    """Two steps with the first configuration, and two more from its checkpoint with the second."""
    results = []
    for i, config in enumerate((first, second)):
        parallel = dict(tensor=config.parallel.tensor, pipeline=config.parallel.pipeline)
        results.append(pool(sizes[i]).run(two_steps, config, str(folder), resume=i == 1, groups=groups_of(parallel))[0])
    return results[1] | {name: results[0][name] + results[1][name] for name in ("losses", "norms")}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_at_the_same_layout_nothing_differs(tmp_path, precision):
    config = muon(dict(tensor=2), training=dict(precision=precision))
    [whole, _] = pool(2).run(train_steps, config, 4, groups=dict(tensor_model_parallel_size=2))
    parts = continued(config, config, tmp_path, (2, 2))
    assert parts["losses"] == whole["losses"] and parts["norms"] == whole["norms"]
    assert all(torch.equal(parts["weights"][key], weight) for key, weight in whole["weights"].items())


@pytest.mark.parametrize(
    "first, second, sizes",
    [
        (dict(tensor=2), {}, (2, 1)),
        ({}, dict(tensor=2, sequence=True), (2, 2)),
        (dict(pipeline=2), dict(tensor=2), (2, 2)),
    ],
    ids=["tp 2 to 1", "dp 2 to tp 2", "pp 2 to tp 2"],
)
def test_momentum_goes_to_other_layouts(tmp_path, first, second, sizes):
    """Attention first: the first pipeline stage has no Gated DeltaNet."""
    build = partial(muon, pattern="*-G-", linear_num_key_heads=3, linear_num_value_heads=6)
    [reference] = pool(1).run(train_steps, build(), 4, groups={})
    compare(continued(build(first), build(second), tmp_path, sizes), reference)


def test_loss_falls_at_least_as_fast_as_under_adamw():
    """60 steps of a tiny H1, AdamW at the learning rate that served it best in tests/bench/results/muon.json."""
    best = json.loads((muon_curves.RESULTS / "muon.json").read_text())["best_lr"]["adamw"]
    text, ends = tiny_h1.corpus(), {}
    for name in ("adamw", "muon"):
        config = muon_curves.config(name, float(best), 60)
        [losses] = pool(1).run(tiny_h1.losses, config, text, name, groups={})
        ends[name] = muon_curves.last_losses({best: losses})[best]
    assert ends["muon"] < ends["adamw"] < 3.5  # nats per byte; 5.5 at the start


def test_nan_ends_the_run_before_the_update():
    for message, unchanged in pool(2).run(step_with_nan, muon(dict(overlap=False)), groups={}):
        assert "not finite" in message and unchanged


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"engine": {"name": "deepspeed"}}, r"optimizer.name \(muon\) needs engine.name=megatron and has deepspeed"),
        (
            {"fp8": {"recipe": "tensorwise", "param_gather": True}, "model": {"provider": "te"}},
            r"fp8.param_gather \(true\) must be false with optimizer.name=muon",
        ),
        ({"optimizer": {"muon": {"scale": "original"}}}, r"needs lr: set optimizer.muon.lr, such as 0.02"),
        (
            {"optimizer": {"name": "adamw", "muon": {"momentum": 0.9}}},
            r"muon: momentum \(0.9\) needs name muon and has adamw",
        ),
        ({"optimizer": {"muon": {"num_steps": 0}}}, r"optimizer.muon.num_steps \(0\)"),
        ({"optimizer": {"muon": {"momentums": 0}}}, r"muon.momentums is not a known key: did you mean .*momentum"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    from dataclasses import asdict

    from megatron_gdn.config import parse_config

    values = asdict(muon())
    for section, options in changes.items():
        values[section] |= options
    with pytest.raises(ConfigError, match=message):
        parse_config(values)
