"""Documents of a sample that stay apart: bounds from the index, and steps that equal those of the documents alone."""

import numpy as np
import pytest
import torch

from megatron_gdn.training import data
from tests.hybrid.test_hybrids import PATTERNS
from tests.ranks import pool
from tests.training import runs
from tests.training.test_engine import VOCABULARY, run_config, train_steps
from tests.training.test_pretrain import curve


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """A corpus in which no id occurs twice, so each says its document and place; eod is inside of a text."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("data") / "text"
    lengths = np.random.default_rng(0).choice([1, 2, 3, 7, 16, 17, 90], 80)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(int(lengths.sum())))
    texts = np.split(np.arange(lengths.sum()), lengths.cumsum()[:-1])
    for text in texts:
        builder.add_document(torch.from_numpy(text), [len(text)])
    builder.finalize(f"{prefix}.idx")
    place = np.concatenate([np.arange(length) for length in lengths])
    return prefix, torch.from_numpy(place), int(texts[lengths.argmax()][40])


def build(prefix, cache, eod_id, **options):
    train, _ = data.build_datasets(
        train=[str(prefix)],
        validation=[],
        split=None,
        cache_dir=cache,
        sequence_length=32,
        num_train_samples=120,
        num_validation_samples=0,
        seed=3,
        vocab_size=10_000,
        eod_id=eod_id,
        **options,
    )
    return train


def test_bounds_are_those_of_the_documents(documents, tmp_path):
    """Several epochs, where a document may follow itself. The id of eod inside of a text is no bound."""
    prefix, place, eod_id = documents
    separate = build(prefix, tmp_path, eod_id, documents="separate")
    joined = build(prefix, tmp_path, eod_id)
    assert len(separate) == len(joined) >= 120
    found = []
    for i in range(len(separate)):
        sample = separate[i]
        assert torch.equal(sample["tokens"], joined[i]["tokens"])
        assert torch.equal(sample["labels"], joined[i]["labels"])
        places, follows = place[sample["tokens"]], place[sample["labels"]]
        start = torch.where(places == 0, torch.arange(32), 0).cummax(0).values
        assert torch.equal(sample["position_ids"], torch.arange(32) - start)
        # A label is its document's first token, and then it belongs to another document than the token.
        assert torch.equal(sample["loss_mask"], (follows != 0).float())
        found.append(int((places == 0).sum()))
    assert max(found) > 5 and min(found) == 0
    masks = torch.stack([joined[i]["loss_mask"] for i in range(len(joined))])
    assert masks.min() == 1.0, "the mask that Megatron caches was written to"


def rows(lengths: list[list[int]]) -> dict[str, torch.Tensor]:
    """A micro-batch whose rows hold documents of these lengths; a tenth of the tokens have no loss."""
    generator = torch.Generator().manual_seed(5)
    shape = (len(lengths), sum(lengths[0]))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    tokens, labels = (torch.randint(VOCABULARY, shape, generator=generator) for _ in range(2))
    mask = (torch.rand(shape, generator=generator) > 0.1).float()
    return dict(tokens=tokens, labels=labels, loss_mask=mask, position_ids=positions)


def documents_of(batch: dict[str, torch.Tensor], lengths: list[list[int]]) -> list[dict[str, torch.Tensor]]:
    """Each document as a micro-batch `[1, n]`."""
    sizes = [n for row in lengths for n in row]
    parts = {name: value.flatten().split(sizes) for name, value in batch.items()}
    return [{name: parts[name][i].unsqueeze(0) for name in parts} for i in range(len(sizes))]


def loss_and_gradients(config, batches) -> dict:
    from megatron_gdn.training.engine import MegatronEngine

    engine = MegatronEngine.build(config, vocab_size=VOCABULARY, device=torch.device("cpu"))
    total = engine.forward_backward(iter(batches), len(batches))
    gradients = {name: param.main_grad.clone() for name, param in engine.model.named_parameters()}
    return dict(total=total, gradients=gradients)


# Longer than a chunk, shorter than the convolution and than the window, of one token; an even sum for two ranks.
LENGTHS = [[70, 1, 2, 27], [3, 64, 33]]


def packed_and_alone(config) -> list[dict]:
    batch = rows(LENGTHS)
    alone_config = run_config(**PATTERNS["H1"])
    alone_config.model, alone_config.parallel.tensor = config.model, config.parallel.tensor
    packed = loss_and_gradients(config, [batch])
    return [packed, loss_and_gradients(alone_config, documents_of(batch, LENGTHS))]


@pytest.mark.parametrize(
    "parallel", [dict(), dict(tensor=2), dict(tensor=2, sequence=True)], ids=["tp1", "tp2", "tp2 sp"]
)
@pytest.mark.parametrize("name", ["H1", "H2", "3:1"])
def test_a_packed_batch_equals_its_documents_alone(name, parallel):
    config = run_config(parallel=parallel, training=dict(sequence_length=100), **PATTERNS[name])
    config.data.documents = "separate"
    size = parallel.get("tensor", 1)
    groups = dict(tensor_model_parallel_size=size)
    for packed, alone in pool(size).run(packed_and_alone, config, groups=groups):
        assert packed["total"][1] == alone["total"][1] > 150
        assert packed["total"][0] == pytest.approx(float(alone["total"][0]), rel=1e-6)
        for key, gradient in alone["gradients"].items():
            # float32 sums in another order, over 200 tokens and a few layers.
            scale = max(1e-3, float(gradient.abs().max()))
            assert (packed["gradients"][key] - gradient).abs().max() < 2e-5 * scale, key


def test_rows_are_documents_too():
    """Samples of one document each: packing changes nothing, with micro-batches of two and over pipeline stages."""
    [reference] = pool(1).run(train_steps, run_config(**PATTERNS["H2"]), groups={})
    for parallel, recompute in ((dict(), "full"), (dict(pipeline=2), "none")):
        config = run_config(parallel=parallel, training=dict(recompute=recompute), **PATTERNS["H2"])
        config.data.documents = "separate"
        size = parallel.get("pipeline", 1)
        for result in pool(size).run(train_steps, config, groups=dict(pipeline_model_parallel_size=size)):
            assert result["losses"] == pytest.approx(reference["losses"], rel=1e-5)
            assert result["norms"] == pytest.approx(reference["norms"], rel=1e-5)


def test_whole_run(tmp_path):
    """Two tensor-parallel ranks and one agree; joined documents give another loss."""
    prefix = runs.write_dataset(tmp_path)
    losses = {}
    for name, documents, size in (("one", "separate", 1), ("two", "separate", 2), ("joined", "join", 1)):
        values = runs.settings(
            prefix,
            tmp_path / name,
            data={"documents": documents},
            parallel={"tensor": size},
            training={"exit_after_steps": 2},
        )
        runs.run(values, world_size=size)
        losses[name] = [numbers[0] for numbers in curve(tmp_path / name).values()][1:]
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-5)
    assert abs(losses["joined"][0] - losses["one"][0]) > 1e-3
