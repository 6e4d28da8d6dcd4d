"""Every recipe at a tiny width: 20 steps that learn, and the same steps at other layouts."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from megatron_gdn.config import parse_config
from megatron_gdn.cost import model_cost
from tests.ranks import pool
from tests.training.test_engine import TOKENS, VOCABULARY, sample, stored_weights

RECIPES = Path(__file__).parents[2] / "examples/recipes"
# Widths by the name of the field; a recipe gets those of the fields it has.
TINY = dict(
    hidden_size=36,
    ffn_hidden_size=48,
    linear_key_head_dim=4,
    linear_value_head_dim=8,
    kv_channels=8,
    mamba_num_heads=9,
    mamba_head_dim=8,
    mamba_state_dim=12,
    vocab_size=VOCABULARY,
)
# Few heads that 2 ranks do not divide where they do not divide those of the recipe at some number of ranks up to 8.
HEADS = {2: 2, 4: 4, 8: 4, 9: 9, 12: 9, 16: 6, 18: 9, 32: 12}


def tiny(path: Path) -> dict:
    """A recipe with its pattern once or twice, its options, optimizer and schedule, at small widths."""
    values = yaml.safe_load(path.read_text())
    model = values["model"]
    unit = re.fullmatch(r"\((.*)\)x\d+", model["pattern"])[1]
    model["pattern"] = unit if len(unit) > 2 else f"({unit})x2"
    model |= {name: value for name, value in TINY.items() if name in model or name == "vocab_size"}
    model |= {name: HEADS[model[name]] for name in model if name.endswith("_heads") and name not in TINY}
    if "sliding_attention" in model:
        model["sliding_attention"]["window"] = 20
    steps = 100
    values["optimizer"] |= dict(lr=1e-2, min_lr=1e-3, warmup_tokens=0)
    values["training"] |= dict(
        sequence_length=TOKENS,
        micro_batch_size=8,
        global_batch_size=8,
        train_tokens=steps * 8 * TOKENS,
        precision="fp32",
        recompute="none",
        validation_samples=0,
    )
    values["run"] = dict(output_dir="unused", device="cpu")
    return {name: values[name] for name in ("run", "model", "data", "optimizer", "training")}


def distinct() -> dict[str, dict]:
    """Tiny recipes by name; of those that differ in widths only, the first."""
    found: dict[str, dict] = {}
    for path in sorted(RECIPES.glob("*.yaml")):
        values = tiny(path)
        values["data"] = dict(train=["unused"])
        if values not in found.values():
            found[path.stem] = values
    return found


MODELS = distinct()
names = pytest.mark.parametrize("name", MODELS)


def test_every_kind_of_model_is_there():
    patterns = {values["model"]["pattern"] for values in MODELS.values()}
    assert patterns == {"(G-)x2", "G-S-", "M-G-S-", "G-G-G-*-", "(*-)x2", "(M)x2"}


@names
def test_tiny_recipes_learn(name):
    """20 steps on the same eight samples: the loss of a model that memorises them falls."""
    [losses] = pool(1).run(losses_on_the_same_samples, parse_config(MODELS[name]), groups={})
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5
    assert all(b < a + 0.3 for a, b in zip(losses, losses[1:], strict=False))


def eight_samples() -> dict[str, torch.Tensor]:
    """One micro-batch."""
    samples = [sample(i) for i in range(8)]
    return {name: torch.stack([each[name] for each in samples]) for name in samples[0]}


def losses_on_the_same_samples(config, steps: int = 20):
    from megatron_gdn.training.engine import MegatronEngine

    engine = MegatronEngine.build(config, vocab_size=VOCABULARY, device=torch.device("cpu"))
    losses = []
    for _ in range(steps):
        total = engine.forward_backward(iter([eight_samples()]), 1)
        engine.update()
        losses.append(engine.mean_loss(total))
    return losses


def loss_and_gradients(config) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one step; gradients by key on disk, put together over the ranks, on which replicas must agree."""
    from megatron_gdn.training.engine import MegatronEngine

    engine = MegatronEngine.build(config, vocab_size=VOCABULARY, device=torch.device("cpu"))
    total = engine.forward_backward(iter([eight_samples()]), 1)
    for param in engine.model.parameters():
        param.data = param.main_grad.clone()
    return engine.mean_loss(total), stored_weights(engine.model)


@pytest.fixture(scope="module")
def one_rank():
    """A step of a recipe on one rank, run once for all layouts."""
    found = {}

    def step(name):
        if name not in found:
            [found[name]] = pool(1).run(loss_and_gradients, parse_config(MODELS[name]), groups={})
        return found[name]

    return step


@pytest.mark.parametrize("sequence", [False, True])
@names
def test_two_tensor_parallel_ranks_equal_one(one_rank, name, sequence):
    config = parse_config(MODELS[name] | {"parallel": dict(tensor=2, sequence=sequence)})
    expected_loss, expected = one_rank(name)
    for loss, gradients in pool(2).run(loss_and_gradients, config, groups=dict(tensor_model_parallel_size=2)):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert gradients.keys() == expected.keys()
        for key, gradient in expected.items():
            # float32 sums of some thousand terms in another order.
            assert gradient.any() and (gradients[key] - gradient).abs().max() < 2e-5 * gradient.abs().max(), key


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipes_header_states_its_parameters(path):
    config = parse_config(yaml.safe_load(path.read_text()))
    cost = model_cost(config, vocab_size=config.model.vocab_size or 4096)
    stated = f"# Parameters: {cost.parameters:,}, {cost.parameters_without_embeddings:,} without embeddings."
    assert stated in path.read_text()


def test_the_muon_recipe_states_its_costs():
    """On 8 GPUs, beside the recipe that differs in the optimizer only."""
    text = (RECIPES / "h1_1.3b_muon.yaml").read_text()
    with_muon, with_adamw = (
        parse_config(yaml.safe_load((RECIPES / f"{name}.yaml").read_text())) for name in ("h1_1.3b_muon", "h1_1.3b")
    )
    assert with_muon.model == with_adamw.model and with_muon.training == with_adamw.training
    muon, adamw = (model_cost(config, vocab_size=32000, data_parallel=8) for config in (with_muon, with_adamw))
    kept, kept_by_adamw = (cost.memory_bytes(0)["optimizer"] / 2**30 for cost in (muon, adamw))
    sent, sent_by_adamw = (cost.communication_bytes(0)["data"] / 2**30 for cost in (muon, adamw))
    stated = (
        f"# Each of 8 GPUs keeps {kept:.2f} GiB of optimizer states, under AdamW {kept_by_adamw:.2f}, and sends "
        f"{sent:.2f} GiB per step, under AdamW {sent_by_adamw:.2f}."
    )
    assert stated in text
