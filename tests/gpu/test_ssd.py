"""Mamba2's state-space op at real sizes: backend "triton" against float64, forward and every gradient."""

import pytest
import torch
from torch import Tensor

from megatron_gdn.kernels import prepare_chunk_table, ssd
from megatron_gdn.kernels.ssd.reference import recurrent_ssd_ref
from tests.gpu.stage import output_gradient
from tests.kernels.data import bounds, rms_error

# (heads, groups, N, P). The first is Mamba2's own; then a group for each head, no powers of two, the largest state.
SHAPES = {
    "128/64, one group": (64, 1, 128, 64),
    "128/64, eight groups": (64, 8, 128, 64),
    "64/64, ungrouped": (8, 8, 64, 64),
    "60/100": (9, 1, 60, 100),
    "256/128": (4, 1, 256, 128),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# One token, around a chunk, a tail, whole chunks, a long sequence.
GRID = [("128/64, one group", T, "bf16") for T in (1, 63, 64, 65, 1000, 4096, 16384)]
GRID += [(shape, 1000, dtype) for shape in SHAPES for dtype in DTYPES if (shape, 1000, dtype) not in GRID]

# As for the rule (stage.py): the field's bounds in 16 bits, three products of tf32 parts in float32; dt and A are sums
# of numbers of both signs.
BOUNDS_16_BIT = dict.fromkeys(("y", "final_state"), 5e-3) | dict.fromkeys(("x", "B", "C", "D", "initial_state"), 8e-3)
BOUNDS_16_BIT |= dict(dt=2e-2, A=2e-2)
BOUNDS_FLOAT32 = dict.fromkeys(BOUNDS_16_BIT, 5e-5) | dict(y=2e-5, final_state=2e-5, dt=2e-4, A=2e-4)


def inputs(stage, shape: str, T: int, dtype: str, *, batch: int = 1, states: int | None = None) -> dict[str, Tensor]:
    """Signed inputs; dt A from almost 0 to about -10."""
    heads, groups, N, P = SHAPES[shape]
    if stage.rehearsal:
        heads, groups = max(1, heads // 8), min(groups, max(1, heads // 8))
    N, P, kind = stage.head(N), stage.head(P), DTYPES[dtype]
    return dict(
        x=stage.normal(batch, T, heads, P, seed=1, dtype=kind),
        dt=torch.nn.functional.softplus(2 * stage.normal(batch, T, heads, seed=2) - 2),
        A=-stage.normal(heads, seed=3).exp(),
        B=stage.normal(batch, T, groups, N, seed=4, dtype=kind),
        C=stage.normal(batch, T, groups, N, seed=5, dtype=kind),
        D=stage.normal(heads, seed=6),
        initial_state=stage.normal(states or batch, heads, N, P, seed=7),
    )


def results(function, tensors: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """y, final_state, and the gradient of each input, named "d" + its name."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    y, final = function(**leaves, output_final_state=True, **options)
    grads = torch.autograd.grad([y, final], list(leaves.values()), [output_gradient(x) for x in (y, final)])
    return dict(y=y.detach(), final_state=final.detach()) | {f"d{n}": x for n, x in zip(leaves, grads, strict=True)}


def check(stage, tensors: dict[str, Tensor], factor: float = 1.0, **options) -> None:
    """The backend on the stage against the torch backend in float64, which the first test holds to the recurrence."""
    limits = BOUNDS_FLOAT32 if tensors["x"].dtype == torch.float32 else BOUNDS_16_BIT
    exact = results(ssd, {name: x.double() for name, x in tensors.items()}, **options, backend="torch")
    ours = results(ssd, tensors, **options, backend=stage.backend)
    for name, expected in exact.items():
        bound = factor * limits[name if name in limits else name[1:]]
        stage.check(f"ssd {str(tensors['x'].dtype)[6:]} {name}", ours[name], expected, bound)


def test_reference_equals_recurrence(stage):
    tensors = inputs(stage, "60/100", stage.tokens(200), "fp32", batch=2)
    tensors = {name: x.double() for name, x in tensors.items()}
    expected = results(recurrent_ssd_ref, tensors)
    for name, value in results(ssd, tensors, backend="torch").items():
        # Two orders of summation of some hundred terms with a unit roundoff of 1e-16.
        assert rms_error(value, expected[name]) <= 1e-11, name


@pytest.mark.parametrize("shape, T, dtype", GRID)
def test_equals_float64(stage, shape, T, dtype):
    stage.need_gib(40 if T > 4096 else 20)
    check(stage, inputs(stage, shape, stage.tokens(T), dtype, batch=2 if T <= 1000 else 1))


DOCUMENTS = {
    "empty ones at the start, inside, in a row, at the end": (0, 5, 0, 0, 1070, 0),
    "single tokens": (1,) * 50,
    "at the bounds of chunks": (64, 128, 63, 65, 1, 127),
    "many of all lengths": tuple((37 * n) % 331 for n in range(60)),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_packed(stage, name):
    stage.need_gib(40)
    lengths = stage.lengths(DOCUMENTS[name])
    tensors = inputs(stage, "128/64, one group", sum(lengths), "bf16", states=len(lengths))
    check(stage, tensors, cu_seqlens=prepare_chunk_table(bounds(*lengths), device=stage.device))


EXTREMES = {
    "no decay": dict(A=torch.zeros_like),
    "decay of exp(-50)": dict(A=lambda A: torch.full_like(A, -10.0), dt=lambda dt: torch.full_like(dt, 5.0)),
    "resets between slow decay": dict(
        dt=lambda dt: torch.where(torch.arange(dt.shape[1], device=dt.device)[:, None] % 9 == 4, 60.0, dt / 1e3)
    ),
    "dt 0": dict(dt=torch.zeros_like),
}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(stage, name, dtype):
    tensors = inputs(stage, "128/64, eight groups", stage.tokens(1000), dtype)
    tensors |= {key: change(tensors[key]) for key, change in EXTREMES[name].items()}
    # Sums of -560 have neighbours 6e-5 apart: the relative error of a decay, in float32 three bounds of y.
    check(stage, tensors, factor=4 if name.startswith("resets") else 1)


def test_slices_of_one_projection_and_same_bits_in_every_run(stage):
    tensors = inputs(stage, "128/64, one group", stage.tokens(4096), "bf16")
    first = results(ssd, tensors, backend=stage.backend)
    fused = torch.cat([tensors[name].flatten(2) for name in ("x", "B", "C")], -1)
    parts = fused.split([tensors[name].flatten(2).shape[2] for name in ("x", "B", "C")], -1)
    views = {n: part.unflatten(-1, tensors[n].shape[2:]) for n, part in zip(("x", "B", "C"), parts, strict=True)}

    for _ in range(10 if not stage.rehearsal else 1):
        again = results(ssd, tensors, backend=stage.backend)
        assert [name for name, x in first.items() if not torch.equal(x, again[name])] == []
    with torch.no_grad():
        y, final = ssd(**tensors | views, output_final_state=True, backend=stage.backend)
    assert torch.equal(y, first["y"]) and torch.equal(final, first["final_state"])


@pytest.mark.plain_memory
def test_gradients_beyond_32_bit_addresses(stage):
    """x and dx have 2.3e9 elements: the last tokens equal those of a slice, which no 32-bit address reaches."""
    stage.need_gib(72)
    T, part = (2**19 + 2**15, 8192) if not stage.rehearsal else (192, 128)
    tensors = inputs(stage, "128/64, one group", T, "bf16")
    tensors.pop("initial_state")
    tensors["dt"] += 1.0  # the state forgets everything within a thousand tokens

    def gradients(given, weight_at):
        leaves = {n: x.detach().requires_grad_() for n, x in given.items()}
        y, _ = ssd(**leaves, backend=stage.backend)
        weight = torch.zeros_like(y)
        weight[:, weight_at] = (y.detach()[:, weight_at] * 4).round() / 4
        return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), weight), strict=True))

    of_time = ("x", "dt", "B", "C")
    piece = {n: x[:, T - part :] if n in of_time else x for n, x in tensors.items()}
    expected, found = gradients(piece, slice(part // 2, part)), gradients(tensors, slice(T - part // 2, T))
    for name in of_time:
        stage.check(f"long ssd d{name}", found[name][:, T - part // 2 :], expected[name][:, part // 2 :], 1e-4)
