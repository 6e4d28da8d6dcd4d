"""What a conversion refuses and the dtypes that it chooses, with weights in memory."""

import pytest
import torch

from tools.convert import conversion
from tools.convert.conversion import Conversion
from tools.convert.errors import ConvertError
from tools.convert.mapping import Link


class Weights(dict):
    """Tensors by name as a source."""

    fingerprint: list = []

    def shape(self, name):
        return tuple(self[name].shape)

    def dtype(self, name):
        return self[name].dtype

    def read(self, name):
        return self[name]


STACKED = Link(ours=("a", "b"), theirs=("ab",), to_theirs=lambda *x: (torch.cat(x),), to_ours=lambda x: x.split([1, 2]))
EMBEDDING = Link(ours=("embedding.word_embeddings.weight",), theirs=("wte",))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_numbers_that_no_rule_scales_are_refused(dtype):
    weights = Weights(ab=torch.zeros(3, 2).to(dtype))
    with pytest.raises(ConvertError, match=rf"ab \({dtype}\) must hold float32, bfloat16 or float16: no rule"):
        Conversion([STACKED], weights, to="ours", dtype=None)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_weights_that_become_one_keep_the_widest_dtype(dtypes):
    parts = [torch.rand(rows, 2).to(dtype) for rows, dtype in zip((1, 2), dtypes, strict=True)]
    found = Conversion([STACKED], Weights(a=parts[0], b=parts[1]), to="theirs", dtype=None)
    assert [(x.name, x.shape, x.dtype) for x in found.tensors] == [("ab", (3, 2), torch.float32)]
    assert torch.equal(found.read("ab"), torch.cat([x.float() for x in parts]))
    # At most the parts and what they become are in memory at once.
    assert found.peak_bytes == sum(x.nbytes for x in parts) + 3 * 2 * 4


def test_a_vocabulary_that_the_embedding_does_not_hold_is_refused():
    weights = Weights({"embedding.word_embeddings.weight": torch.rand(5, 2)})
    found = Conversion([EMBEDDING], weights, to="theirs", dtype=None, vocab_size=4)
    assert torch.equal(found.read("wte"), weights["embedding.word_embeddings.weight"][:4])
    with pytest.raises(ConvertError, match="word_embeddings.weight has 5 rows, and the vocabulary 6 tokens"):
        Conversion([EMBEDDING], weights, to="theirs", dtype=None, vocab_size=6)


def test_gates_that_are_not_finite_are_refused():
    link = Link(ours=("A_log",), theirs=("theirs.A_log",), keep_float32=True)
    weights = Weights({"theirs.A_log": torch.tensor([0.5, float("nan")], dtype=torch.bfloat16)})
    found = Conversion([link], weights, to="ours", dtype=None)
    with pytest.raises(ConvertError, match="theirs.A_log holds values that are not finite: the checkpoint is damaged"):
        found.read("A_log")


@pytest.mark.parametrize("written, free, enough", [(0, 24, True), (0, 23, False), (8, 16, True), (8, 15, False)])
def test_space_is_for_what_is_still_to_be_written(tmp_path, monkeypatch, written, free, enough):
    """Of 24 bytes. What an earlier start has written stays."""
    found = Conversion([STACKED], Weights(ab=torch.zeros(3, 2)), to="ours", dtype=None)
    assert found.num_bytes == found.peak_bytes == 24  # parts of a weight are views of it
    aside = tmp_path / "aside"
    aside.mkdir()
    monkeypatch.setattr(conversion, "free_bytes", lambda path: free)
    if enough:
        conversion.check_space(found, aside, written=written)
    else:
        with pytest.raises(ConvertError, match="and the disk has"):
            conversion.check_space(found, aside, written=written)
    assert aside.exists() == (enough or written > 0)
