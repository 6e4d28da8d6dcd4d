"""Hybrids at layouts of four and eight processes equal one process: losses of three steps and final weights.

Each case has gradient accumulation and the distributed optimizer, and sequence parallelism where tensor parallelism is.
"""

import pytest
import torch

from tests.ranks import pool
from tests.training.test_engine import run_config, train_steps

WINDOW = 25
"""Tokens; more than a fragment of nine has, so that windows reach over several ranks."""

MODELS = {
    "H1": dict(pattern="G-S-", sliding_attention={"window": WINDOW}),
    # Three layers, which two pipeline stages do not cut evenly.
    "H2": dict(pattern="M-G-S-", sliding_attention={"window": WINDOW}, mamba_num_heads=4, mamba_head_dim=16,
               mamba_state_dim=16, mamba_num_groups=2),
    "3:1": dict(pattern="G-G-G-*-", full_attention={"rotary_percent": 0.5, "qk_norm": True, "output_gate": True}),
}  # fmt: skip

LAYOUTS = {
    "tp2 cp2": dict(tensor=2, sequence=True, context=2),
    "cp4 zigzag": dict(context=4, context_layout="zigzag"),
    "pp2 cp2": dict(pipeline=2, context=2),
    "tp2 pp2": dict(tensor=2, sequence=True, pipeline=2),
    "dp2 cp2 zigzag": dict(context=2, context_layout="zigzag"),
}


BATCH = {"global_batch_size": 4, "micro_batch_size": 1}
"""Two data-parallel ranks accumulate two micro-batches, the others four."""
DOCUMENTS = [2, 10, 1, 5, 36, 1, 17]
"""Tokens: bounds at a rank's edge, beside one and far from all; shorter than the convolution; over several ranks."""


def tiny(model: str, *, parallel: dict | None = None, training: dict | None = None, **options):
    return run_config(parallel=parallel, training=BATCH | (training or {}), **MODELS[model], **options)


def groups_of(parallel: dict) -> dict:
    """Arguments of Megatron's initialize_model_parallel."""
    return dict(
        tensor_model_parallel_size=parallel.get("tensor", 1),
        pipeline_model_parallel_size=parallel.get("pipeline", 1),
        context_parallel_size=parallel.get("context", 1),
    )


def compare(results: list[dict], reference: dict) -> None:
    """float32 sums in another order, and Adam's division by small second moments: 1e-5."""
    for result in results:
        assert result["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(reference["norms"], rel=1e-5)
        assert result["weights"].keys() == reference["weights"].keys()
        for name, weight in reference["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def one_process():
    """Results of one process by model."""
    return {model: pool(1).run(train_steps, tiny(model), groups={})[0] for model in MODELS}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_processes_equal_one(one_process, layout, model):
    parallel = LAYOUTS[layout]
    config = tiny(model, parallel=parallel)
    compare(pool(4).run(train_steps, config, groups=groups_of(parallel)), one_process[model])


def test_eight_processes_equal_one(one_process):
    """TP 2, CP 2, DP 2; one model, as eight processes are slow on two cores."""
    parallel = dict(tensor=2, sequence=True, context=2, context_layout="zigzag")
    results = pool(8).run(train_steps, tiny("H2", parallel=parallel), groups=groups_of(parallel), timeout_s=600)
    compare(results, one_process["H2"])


@pytest.mark.parametrize(
    "parallel, training",
    [
        (dict(context=4, state_exchange="scan"), {}),
        (dict(context=4), dict(recompute="full")),
        (dict(context=2, distributed_optimizer=False, overlap=False), dict(micro_batch_size=2)),
    ],
    ids=["states by a scan", "recomputation", "no distributed optimizer"],
)
def test_options_equal_one_process(one_process, parallel, training):
    config = tiny("H2", parallel=parallel, training=training)
    compare(pool(4).run(train_steps, config, groups=groups_of(parallel)), one_process["H2"])


def test_attention_by_heads_equals_one_process():
    [reference] = pool(1).run(train_steps, tiny("3:1", num_query_groups=4), groups={})
    parallel = dict(tensor=2, context=2, context_attention="a2a", context_layout="zigzag")
    config = tiny("3:1", parallel=parallel, num_query_groups=4)
    compare(pool(4).run(train_steps, config, groups=groups_of(parallel)), reference)


@pytest.mark.parametrize("layout", ["tp2 cp2", "cp4 zigzag", "pp2 cp2"])
def test_packed_documents_equal_one_process(one_process, layout):
    """Two samples of seven documents in a row; the pipeline passes on the rows of a rank."""
    parallel, training = LAYOUTS[layout], dict(micro_batch_size=2)
    configs = [tiny("H2", training=training), tiny("H2", parallel=parallel, training=training)]
    for config in configs:
        config.data.documents = "separate"
    [reference] = pool(1).run(train_steps, configs[0], documents=DOCUMENTS, groups={})
    assert reference["losses"] != one_process["H2"]["losses"]
    compare(pool(4).run(train_steps, configs[1], documents=DOCUMENTS, groups=groups_of(parallel)), reference)
