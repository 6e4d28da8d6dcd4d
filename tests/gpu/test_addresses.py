"""Views, tensors beyond 2^31 elements, and the same bits in every run."""

import pytest
import torch

from megatron_gdn.kernels import causal_conv1d, chunk_gated_delta_rule, prepare_chunk_table, rms_norm_gated
from tests.gpu.stage import call_rule, check_rule, results
from tests.kernels.data import bounds

RUNS = 10


@pytest.mark.parametrize("layout", ["one projection", "head by head", "time by batch"])
def test_strided_views(stage, layout):
    """q, k, v as the layer has them: slices of one tensor; or transposed, as other hosts have them."""
    B, T, (H, HV), D = 2, stage.tokens(1000), stage.heads(4, 8), stage.head(128)
    tensors = stage.rule_inputs(B, T, H, HV, D, D, torch.bfloat16, states=B)
    if layout == "one projection":
        wide = torch.cat([tensors[n].flatten(2) for n in ("q", "k", "v")] + [stage.normal(B, T, 24).bfloat16()], -1)
        parts = wide.split([H * D, H * D, HV * D, 24], -1)
        tensors |= {n: x.unflatten(-1, (-1, D)) for n, x in zip(("q", "k", "v"), parts, strict=False)}
        gates = torch.cat([tensors["g"], tensors["beta"]], -1)
        tensors |= dict(g=gates[..., :HV], beta=gates[..., HV:])
    else:
        dims = (1, 2) if layout == "head by head" else (0, 1)
        names = ("q", "k", "v", "g", "beta")
        tensors |= {n: tensors[n].transpose(*dims).contiguous().transpose(*dims) for n in names}
    # A clone keeps the strides of a transposed tensor and packs a slice: compare slices of one leaf with packed ones.
    check_rule(stage, tensors, use_qk_l2norm_in_kernel=True)
    if layout == "one projection":
        call_options = dict(use_qk_l2norm_in_kernel=True, backend=stage.backend)
        found = []
        for change in (lambda x: x, torch.Tensor.contiguous):
            leaf, gate_leaf = wide.clone().requires_grad_(), gates.clone().requires_grad_()
            parts = leaf.split([H * D, H * D, HV * D, 24], -1)[:3]
            given = {n: change(x).unflatten(-1, (-1, D)) for n, x in zip("qkv", parts, strict=True)}
            given |= dict(g=change(gate_leaf[..., :HV]), beta=change(gate_leaf[..., HV:]))
            o, _ = call_rule(chunk_gated_delta_rule, given, **call_options)
            found.append([o, *torch.autograd.grad(o.float().square().sum(), [leaf, gate_leaf])])
        for view, packed in zip(*found, strict=True):
            assert torch.equal(view, packed)


@pytest.mark.parametrize("packed", [False, True])
def test_same_bits_in_every_run(stage, packed):
    """Races show here first: a missing barrier gives other numbers once in a while."""
    T, (H, HV), D = stage.tokens(8192), stage.heads(16, 32), stage.head(128)
    options = dict(use_qk_l2norm_in_kernel=True, backend=stage.backend)
    if packed:
        lengths = [T // 3, 0, T // 2, 1, T - T // 3 - T // 2 - 1]
        options["cu_seqlens"] = prepare_chunk_table(bounds(*lengths), device=stage.device)
    tensors = stage.rule_inputs(1, T, H, HV, D, D, torch.bfloat16, states=5 if packed else 1)
    first = results(chunk_gated_delta_rule, tensors, **options)
    for _ in range(RUNS if not stage.rehearsal else 1):
        again = results(chunk_gated_delta_rule, tensors, **options)
        assert [name for name, x in first.items() if not torch.equal(x, again[name])] == []


def slow_start(stage, T, H, HV, D):
    """Inputs whose state forgets everything within a thousand tokens: sums of g pass -500."""
    inputs = stage.rule_inputs(1, T, H, HV, D, D, torch.bfloat16)
    return inputs | dict(g=inputs["g"].sub_(0.5))


@pytest.mark.plain_memory
def test_a_million_tokens(stage):
    """v has 2^32 elements, S 2^33: the last tokens equal those of a slice, which no 32-bit address reaches."""
    stage.need_gib(72)
    T, (H, HV), D = (2**20, (16, 32), 128) if not stage.rehearsal else (384, (1, 2), 16)
    tail = 8192 if not stage.rehearsal else 128
    tensors = slow_start(stage, T, H, HV, D)
    options = dict(use_qk_l2norm_in_kernel=True, output_final_state=True, backend=stage.backend)
    with torch.no_grad():
        o, state = call_rule(chunk_gated_delta_rule, tensors, **options)
        end = o[:, -tail // 2 :].clone()
        middle = o[:, T // 2 - tail // 2 : T // 2].clone()
        del o
        slices = {"end": slice(T - tail, T), "middle": slice(T // 2 - tail, T // 2)}
        for name, expected in (("end", end), ("middle", middle)):
            part, part_state = call_rule(
                chunk_gated_delta_rule, {n: x[:, slices[name]] for n, x in tensors.items()}, **options
            )
            # The same chunks with the same state but for what is left of exp(-1000): equal bits are expected.
            stage.check(f"long {name}", part[:, -tail // 2 :], expected, 1e-6)
            if name == "end":
                stage.check("long state", part_state, state, 1e-6)


@pytest.mark.plain_memory
def test_gradients_beyond_32_bit_addresses(stage):
    """dv has 2.3e9 elements; gradients of the first tokens equal those of a slice that ends a little later."""
    stage.need_gib(72)
    T, (H, HV), D = (2**19 + 2**15, (16, 32), 128) if not stage.rehearsal else (192, (1, 2), 16)
    part = 8192 if not stage.rehearsal else 128
    tensors = slow_start(stage, T, H, HV, D)
    options = dict(use_qk_l2norm_in_kernel=True, backend=stage.backend)

    def gradients(given, weight_at):
        leaves = {n: x.detach().requires_grad_() for n, x in given.items()}
        o, _ = call_rule(chunk_gated_delta_rule, leaves, **options)
        weight = torch.zeros_like(o)
        weight[:, weight_at] = (o.detach()[:, weight_at] * 4).round() / 4  # of some tokens, so that a slice has all
        return dict(zip(leaves, torch.autograd.grad(o, list(leaves.values()), weight), strict=True))

    # Tokens part/2 .. part of the last `part`; what came before them matters only through a forgotten state.
    slice_of = {n: x[:, T - part :] for n, x in tensors.items()}
    expected = gradients(slice_of, slice(part // 2, part))
    found = gradients(tensors, slice(T - part // 2, T))
    for name, value in expected.items():
        got = found[name][:, T - part // 2 :]
        stage.check(f"long d{name}", got, value[:, part // 2 :], 1e-4)


@pytest.mark.plain_memory
def test_convolution_and_norm_beyond_32_bit_addresses(stage):
    stage.need_gib(60)
    T, D = (2**19, 8192) if not stage.rehearsal else (300, 16)
    x, weight = stage.normal(1, T, D, dtype=torch.bfloat16), stage.normal(D, 4, seed=1, dtype=torch.bfloat16)
    with torch.no_grad():
        y, _ = causal_conv1d(x, weight, backend=stage.backend)
        part, _ = causal_conv1d(x[:, -200:], weight, backend=stage.backend)
        assert torch.equal(y[:, -197:], part[:, 3:])
        x, y = x.view(-1, min(D, 128)), y.view(-1, min(D, 128))
        scale = stage.normal(x.shape[1], seed=2, dtype=torch.bfloat16)
        found = rms_norm_gated(x, scale, y, backend=stage.backend)
        assert torch.equal(found[-1000:], rms_norm_gated(x[-1000:], scale, y[-1000:], backend=stage.backend))
