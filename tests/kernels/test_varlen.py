"""The table of chunks: every token once, sequences in order, blocks of any size, errors."""

import pytest
import torch

from megatron_gdn.kernels import prepare_chunk_table
from megatron_gdn.kernels.varlen import CHUNK_SIZE, table_of_batch
from tests.kernels.data import bounds

LENGTHS = [(1,), (64, 64), (0, 5, 0, 130, 64, 0), (200, 1, 70), tuple(range(40)), (0, 0)]


def expected_chunks(lengths: tuple[int, ...]) -> list[list[int]]:
    """Tokens of each chunk, step by step, longer sequences first, without any of the table's arithmetic."""
    starts, chunks = bounds(*lengths).tolist(), []
    by_length = sorted(range(len(lengths)), key=lambda n: -((lengths[n] + CHUNK_SIZE - 1) // CHUNK_SIZE))
    for step in range(max(lengths) // CHUNK_SIZE + 1):
        for n in by_length:
            tokens = range(starts[n], starts[n + 1])[step * CHUNK_SIZE : (step + 1) * CHUNK_SIZE]
            chunks += [list(tokens)] if tokens else []
    return chunks


@pytest.mark.parametrize("max_chunks", [1, 3, 1000])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_blocks_read_and_write_every_token_once(lengths, max_chunks):
    table = prepare_chunk_table(bounds(*lengths))
    x = torch.arange(1, sum(lengths) + 1).unsqueeze(-1)  # token t holds t + 1; 0 is padding
    written, found = torch.zeros_like(x), []
    for block in table.blocks(max_chunks):
        chunks = table.read(x, block).flatten(0, -3)
        assert 0 < len(chunks) <= max(max_chunks, 1)
        assert sum(part.stop - part.start for part, _ in block.parts) == len(chunks)
        found += [[t - 1 for t in chunk.flatten().tolist() if t] for chunk in chunks]
        table.write(written, block, chunks)
    assert found == expected_chunks(lengths)
    assert torch.equal(written, x)


@pytest.mark.parametrize("max_chunks", [1, 3, 1000])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_places_of_chunks_belong_to_their_sequence(lengths, max_chunks):
    """Place p within a step is the p-th sequence of the table's order, at every step and in every block."""
    table = prepare_chunk_table(bounds(*lengths))
    document = table.document_of_tokens()
    assert document.tolist() == [n for n, length in enumerate(lengths) for _ in range(length)]
    for block in table.blocks(max_chunks):
        owners = table.read(document.unsqueeze(-1) + 1, block).flatten(0, -3).flatten(1).amax(1) - 1
        for chunks, places in block.parts:
            assert owners[chunks].tolist() == table.order[places].tolist()


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_chunks_by_sequence(lengths):
    table, starts = prepare_chunk_table(bounds(*lengths)), bounds(*lengths).tolist()
    expected = [
        (n, first, min(first + CHUNK_SIZE, starts[n + 1]))
        for n in range(len(lengths))
        for first in range(starts[n], starts[n + 1], CHUNK_SIZE)
    ]
    found = zip(table.chunk_sequence.tolist(), table.chunk_bounds.tolist(), strict=True)
    assert [(n, *chunk) for n, chunk in found] == expected
    numbers = [n for n, _, _ in expected]
    assert table.first_chunk.tolist() == [sum(m < n for m in numbers) for n in range(len(lengths) + 1)]


def test_a_selection_has_the_order_that_is_asked_for():
    table = prepare_chunk_table(bounds(5, 70))
    turned = table.select([1, 0])
    assert turned.lengths == [70, 5] and turned.chunk_bounds.tolist() == [[5, 69], [69, 75], [0, 5]]
    assert table.select([0, 1]) is table


def test_batch_of_whole_chunks_is_read_without_a_copy():
    x = torch.randn(2, 128, 3)
    table = table_of_batch(x, None)
    (block,) = table.blocks(100)
    assert table.read(x.flatten(0, 1), block).data_ptr() == x.data_ptr()


ERRORS = {
    r"cu_seqlens \(torch.float32, \[2\]\) must be a vector of int32 or int64: pass": torch.tensor([0.0, 5.0]),
    r"cu_seqlens \(torch.int64, \[1\]\) must be a vector": torch.tensor([0]),
    r"cu_seqlens \(torch.int64, \[1, 2\]\) must be a vector": torch.tensor([[0, 5]]),
    r"cu_seqlens \(\[1, 5\]\) must start at 0 and never fall: pass": torch.tensor([1, 5]),
    r"cu_seqlens \(\[0, 4, 3, 5\]\) must start at 0 and never fall": torch.tensor([0, 4, 3, 5]),
    r"cu_seqlens \(\[1, 2, 3, 4, '...', 6, 7, 8, 9\]\) must start at 0": torch.arange(1, 10),
    r"cu_seqlens \(ends at 4\) must end at the number of tokens \(5\): pass": torch.tensor([0, 4]),
    r"cu_seqlens \(a table on meta\) must be on the device of the inputs \(cpu\): build": prepare_chunk_table(
        torch.tensor([0, 5]), device="meta"
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message):
        table_of_batch(torch.zeros(1, 5, 1), ERRORS[message])


def test_packed_batches_have_one_row():
    with pytest.raises(ValueError, match=r"batch \(2\) must be 1 with cu_seqlens: pack all documents into one row"):
        table_of_batch(torch.zeros(2, 5, 1), torch.tensor([0, 5]))
