"""The chunked rule at real sizes: backend "triton" against float64, forward and every gradient."""

import pytest
import torch

from megatron_gdn.kernels import chunk_gated_delta_rule, prepare_chunk_table
from megatron_gdn.kernels.gated_delta_rule.reference import recurrent_gated_delta_rule_ref
from tests.gpu.stage import bounds_of, call_rule, check_rule, exact_results, results
from tests.kernels.data import bounds, rms_error

# (H, HV, K, V). Few heads where a head is large: what matters is the tile.
SHAPES = {
    "128, as many keys": (16, 16, 128, 128),
    "128, grouped": (16, 32, 128, 128),
    "64": (8, 8, 64, 64),
    "60/100, no power of two": (4, 8, 60, 100),
    "192/384": (2, 4, 192, 384),
    "200/400": (2, 2, 200, 400),
    "256/512, the largest": (2, 2, 256, 512),
}
# One token, around a chunk, a tail, whole chunks, a long sequence.
TOKENS = (1, 63, 64, 65, 1000, 4096, 32768)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

GRID = [("128, grouped", T, "bf16") for T in TOKENS]
GRID += [("128, as many keys", T, "bf16") for T in (65, 4096)]
GRID += [(shape, T, "bf16") for shape in list(SHAPES)[2:] for T in (65, 1000, 4096)]
GRID += [(shape, 1000, dtype) for shape in list(SHAPES)[1:] for dtype in ("fp16", "fp32")]
GRID += [("128, grouped", 4096, "fp32")]


def inputs(stage, shape: str, T: int, dtype: str, **options):
    H, HV = stage.heads(*SHAPES[shape][:2])
    K, V = (stage.head(size) for size in SHAPES[shape][2:])
    B = 2 if T <= 1000 else 1
    return stage.rule_inputs(B, stage.tokens(T), H, HV, K, V, DTYPES[dtype], **options | dict(states=B))


def test_reference_equals_recurrence(stage):
    """What all other tests compare with, on this device and in float64."""
    tensors = stage.rule_inputs(2, stage.tokens(200), 1, 2, 32, 48, torch.float32, states=2)
    tensors = {name: x.double() for name, x in tensors.items()}
    expected = results(recurrent_gated_delta_rule_ref, tensors, use_qk_l2norm_in_kernel=True)
    for name, value in exact_results(tensors, use_qk_l2norm_in_kernel=True).items():
        # Two orders of summation of some hundred terms with a unit roundoff of 1e-16.
        assert rms_error(value, expected[name]) <= 1e-11, name


@pytest.mark.parametrize("shape, T, dtype", GRID)
def test_equals_float64(stage, shape, T, dtype):
    stage.need_gib(40 if T == 32768 else 20)
    check_rule(stage, inputs(stage, shape, T, dtype), use_qk_l2norm_in_kernel=True)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_normalised_outside(stage, dtype):
    tensors = inputs(stage, "128, grouped", 1000, dtype)
    for name in ("q", "k"):
        tensors[name] = torch.nn.functional.normalize(tensors[name].float(), dim=-1).to(tensors[name].dtype)
    check_rule(stage, tensors, scale=0.3)


DOCUMENTS = {
    "empty ones at the start, inside, in a row, at the end": (0, 5, 0, 0, 1070, 0),
    "single tokens": (1,) * 50,
    "at the bounds of chunks": (64, 128, 63, 65, 1, 127),
    "many of all lengths": tuple((37 * n) % 331 for n in range(300)),
    "few long ones": (16384, 8192, 8000, 192),
    # 4500 documents of 16 heads: more programs than the second dimension of a grid may have (65535).
    "more than one dimension of a grid": (3,) * 4500,
}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_packed(stage, name, dtype):
    stage.need_gib(60)
    lengths = stage.lengths(DOCUMENTS[name])
    H, HV = stage.heads(8, 16)
    D = stage.head(128)
    tensors = stage.rule_inputs(1, sum(lengths), H, HV, D, D, DTYPES[dtype], states=len(lengths))
    table = prepare_chunk_table(bounds(*lengths), device=stage.device)
    check_rule(stage, tensors, cu_seqlens=table, use_qk_l2norm_in_kernel=True)


# Errors of early tokens stay to the end where nothing decays, and keys on one side make the solve's errors add up:
# bf16 is then three times further from float64 (measured on prototypes: 1.3e-2 for o).
NO_DECAY = {name: 4 * bound for name, bound in bounds_of(torch.bfloat16).items()}
EXTREMES = {
    "no decay": (dict(g=torch.zeros_like), NO_DECAY),
    "decay of exp(-50)": (dict(g=lambda g: torch.full_like(g, -50.0)), None),
    "resets of -1000 between slow decay": (
        dict(g=lambda g: torch.where(torch.arange(g.shape[1], device=g.device)[:, None] % 9 == 4, -1e3, g / 1e3)),
        NO_DECAY,
    ),
    "beta 0 and 1": (dict(beta=lambda b: (b > 0.5).to(b.dtype)), None),
    "identical keys": (dict(k=lambda k: k[:, :1].expand_as(k).clone()), NO_DECAY),
}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(stage, name, dtype):
    changes, bounds_of_bf16 = EXTREMES[name]
    tensors = inputs(stage, "128, grouped", 1000, dtype)
    tensors |= {key: change(tensors[key]) for key, change in changes.items()}
    if name == "decay of exp(-50)":
        # The gate's gradient is exp(-50) of the others, below what a sum of them can resolve.
        tensors["initial_state"].zero_()
        exact = exact_results(tensors, use_qk_l2norm_in_kernel=True)
        ours = results(chunk_gated_delta_rule, tensors, use_qk_l2norm_in_kernel=True, backend=stage.backend)
        for key in ("o", "final_state", "dq", "dk", "dv", "dbeta"):
            bound = bounds_of(tensors["q"].dtype)[key if key in ("o", "final_state") else key[1:]]
            stage.check(f"{dtype} {key}", ours[key], exact[key], bound)
        assert ours["dg"].abs().max() <= 1e-3 * exact["dbeta"].abs().max()
        return
    if dtype == "fp32" and bounds_of_bf16:
        bounds_of_bf16 = {key: 4 * bound for key, bound in bounds_of(torch.float32).items()}
    check_rule(stage, tensors, bounds_of_bf16, use_qk_l2norm_in_kernel=True)


def test_two_halves_with_the_carried_state_equal_the_whole(stage):
    tensors = inputs(stage, "128, grouped", 4096, "bf16")
    cut = tensors["q"].shape[1] // 2 + 7

    def halves(q, k, v, *, initial_state, output_final_state, **keywords):
        gates, state, outputs = {n: keywords.pop(n) for n in ("g", "beta")}, initial_state, []
        for part in (slice(0, cut), slice(cut, None)):
            o, state = chunk_gated_delta_rule(
                q[:, part],
                k[:, part],
                v[:, part],
                **{n: x[:, part] for n, x in gates.items()},
                initial_state=state,
                output_final_state=True,
                **keywords,
            )
            outputs.append(o)
        return torch.cat(outputs, 1), state

    exact = exact_results(tensors, use_qk_l2norm_in_kernel=True)
    ours = results(halves, tensors, use_qk_l2norm_in_kernel=True, backend=stage.backend)
    limits = bounds_of(torch.bfloat16)
    for name, expected in exact.items():
        stage.check(f"halves {name}", ours[name], expected, limits[name if name in limits else name[1:]])


@pytest.mark.parametrize("wanted", ["q", "k", "v", "g", "beta", "initial_state"])
def test_gradients_of_some_inputs_only(stage, wanted):
    """The same bits as when all are asked for."""
    tensors = inputs(stage, "128, grouped", 1000, "bf16")
    leaves = {name: x.clone().requires_grad_(name == wanted) for name, x in tensors.items()}
    every = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    for given in (leaves, every):
        o, _ = call_rule(chunk_gated_delta_rule, given, use_qk_l2norm_in_kernel=True, backend=stage.backend)
        o.float().square().sum().backward()
    assert [name for name, x in leaves.items() if x.grad is not None] == [wanted]
    assert torch.equal(leaves[wanted].grad, every[wanted].grad)
