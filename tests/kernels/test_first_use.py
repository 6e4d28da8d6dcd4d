"""Where Triton's faults are unproven, kernels are tried before their first results are used; in the interpreter."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from megatron_gdn.kernels import backend, chunk_gated_delta_rule, first_use, gated_delta_mixer, ssd
from megatron_gdn.kernels.gated_delta_rule import triton_chunk
from megatron_gdn.kernels.ssd import triton_ssd
from megatron_gdn.kernels.triton_support.guards import KNOWN, Miscompile
from tests.kernels.data import rule_inputs

FAULTS = tuple(fault for fault in KNOWN if fault.verdict == "unproven" and fault.architectures == ("sm_90",))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    """Two rows of two chunks are enough here; nothing of another test is remembered."""
    monkeypatch.setattr(first_use, "NUM_TOKENS", 66)
    monkeypatch.setattr(first_use, "BLOCKS", 12)
    cached = (first_use._try_rule, first_use._try_ssd, first_use.unproven_faults, backend._check_triton)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def unproven(monkeypatch):
    """The interpreter stands for a GPU with unproven faults."""
    monkeypatch.setattr(first_use, "unproven_faults", lambda device: FAULTS)


def try_rule(dtype=torch.float32, heads=(1, 2), *, has_state=True, eps=1e-6, negative=False, norms=False, maps=False):
    first_use._try_rule(FAULTS, CPU, dtype, heads, (16, 16), has_state, eps, negative, norms, maps)


def change(monkeypatch, module, name, how):
    """Replace a stage by one that changes its results."""
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **options: how(right(*args, **options)))


@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.float32, dict(heads=(2, 4), maps=True)),
        (torch.bfloat16, dict(has_state=False, norms=True)),
        (torch.float32, dict(eps=None, negative=True)),
    ],
)
def test_right_kernels_pass(dtype, options):
    try_rule(dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels_of_the_state_space_op_pass(dtype):
    first_use._try_ssd(FAULTS, CPU, dtype, (2, 4), (16, 12), True, dtype == torch.float32)


@pytest.mark.parametrize("dtype, factor", [(torch.float32, 1.002), (torch.bfloat16, 1.1)])
def test_a_wrong_gradient_is_an_error(monkeypatch, dtype, factor):
    change(monkeypatch, triton_chunk, "input_gradients", lambda grads: (grads[0], grads[1] * factor, *grads[2:]))
    with pytest.raises(
        RuntimeError,
        match=r"Triton \([\d.]+\) compiles the kernels of the gated delta rule \(1/2 heads of 16/16, .*\) to wrong "
        r"code for cpu: dk is off by \d.*e-0\d of its size\. Install another Triton \(reported for this one: "
        r"fla-org/flash-linear-attention#984, triton-lang/triton#10486\), or use backend 'torch'; python -m "
        "megatron_gdn.kernels.selfcheck",
    ):
        try_rule(dtype)
    if dtype == torch.float32:  # what failed is not remembered as right
        with pytest.raises(RuntimeError, match="dk is off by"):
            try_rule(dtype)


def test_a_wrong_state_space_gradient_is_an_error(monkeypatch):
    change(monkeypatch, triton_ssd, "group_gradients", lambda grads: (-grads[0], *grads[1:]))
    with pytest.raises(
        RuntimeError, match=r"the state-space op \(2 heads of 16/12, float32\) .*: dB is off by 2.0e\+00"
    ):
        first_use._try_ssd(FAULTS, CPU, torch.float32, (1, 2), (16, 12), True, False)


def test_races_are_errors(monkeypatch):
    with monkeypatch.context() as patch:
        change(patch, triton_chunk, "output", lambda o: o + 1e-6 * torch.rand(1))
        with pytest.raises(RuntimeError, match="two runs differ in o"):
            try_rule()
    change(monkeypatch, triton_chunk, "output", lambda o: o * torch.tensor([1, 1 + 1e-6]).view(-1, 1, 1, 1))
    with pytest.raises(RuntimeError, match="groups of heads with the same inputs differ in o"):
        try_rule()


def test_a_kernel_that_dies_is_named(monkeypatch):
    def die(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    change(monkeypatch, triton_chunk, "state_gradients", die)
    with pytest.raises(
        RuntimeError, match=r"to wrong code for cpu: CUDA error: an illegal .* was encountered\. Install"
    ):
        try_rule()


def call_rule():
    inputs = rule_inputs(1, 5, 1, 2, 16, 16)
    inputs.pop("initial_state")
    chunk_gated_delta_rule(**{n: x.float() for n, x in inputs.items()}, backend="triton")


def call_mixer():
    gated_delta_mixer(
        torch.randn(1, 5, 64),
        torch.randn(1, 5, 4),
        conv_weight=torch.randn(64, 4),
        norm_weight=torch.randn(16),
        A_log=torch.randn(2),
        dt_bias=torch.randn(2),
        num_key_heads=1,
        num_value_heads=2,
        key_head_dim=16,
        backend="triton",
    )


def call_ssd():
    B = torch.randn(1, 5, 1, 16)
    ssd(torch.randn(1, 5, 2, 12), dt=torch.rand(1, 5, 2), A=-torch.rand(2), B=B, C=B, D=None, backend="triton")


CALLS = {"rule": call_rule, "mixer": call_mixer, "ssd": call_ssd}


@pytest.mark.parametrize("name", CALLS)
def test_public_functions_try_their_kernels_first(unproven, monkeypatch, name):
    """Before the first results are used, once; a kernel that is wrong never gives any."""
    tried, compare = [], first_use._compare
    monkeypatch.setattr(first_use, "_compare", lambda what, *rest: (tried.append(what), compare(what, *rest)))
    with monkeypatch.context() as patch:
        if name == "ssd":
            change(patch, triton_ssd, "head_gradients", lambda grads: (grads[0] * 2, *grads[1:]))
        else:
            change(patch, triton_chunk, "input_gradients", lambda grads: (grads[0] * 2, *grads[1:]))
        with pytest.raises(RuntimeError, match=rf"to wrong code for cpu: d{'x' if name == 'ssd' else 'q'} is off by 1"):
            CALLS[name]()
    CALLS[name]()
    CALLS[name]()
    assert len(tried) == 2 and tried[0] == tried[1]


class Tried(Exception):
    """In place of a trial: its arguments."""


def tried(monkeypatch, call) -> tuple:
    def stop(faults, device, *arguments):
        raise Tried(*arguments)

    for name in ("_try_rule", "_try_ssd"):
        monkeypatch.setattr(first_use, name, stop)
    with pytest.raises(Tried) as caught:
        call()
    return caught.value.args


@pytest.mark.parametrize("l2norm, negative, has_state", [(True, False, True), (False, True, False)])
def test_the_rule_is_tried_as_it_is_called(unproven, monkeypatch, l2norm, negative, has_state):
    """Each of these makes another binary, which may be wrong while the others are right."""
    inputs = {
        n: x.to(torch.bfloat16 if n in "qkv" else torch.float32) for n, x in rule_inputs(1, 5, 1, 2, 16, 8).items()
    }
    tokens, gates = [inputs[n] for n in "qkv"], dict(g=inputs["g"], beta=inputs["beta"])
    options = dict(use_qk_l2norm_in_kernel=l2norm, allow_neg_eigval=negative)
    state, eps = inputs["initial_state"] if has_state else None, 1e-6 if l2norm else None
    found = tried(
        monkeypatch,
        lambda: chunk_gated_delta_rule(*tokens, **gates, **options, initial_state=state, backend="triton"),
    )
    assert found == (torch.bfloat16, (1, 2), (16, 8), has_state, eps, negative, False, False)
    mixed, gates, conv, norm = (torch.zeros(shape) for shape in ((1, 5, 64), (1, 5, 2), (48, 4), 8))
    options = dict(conv_weight=conv, norm_weight=norm, use_qk_l2norm=l2norm, allow_neg_eigval=negative)
    found = tried(
        monkeypatch,
        lambda: gated_delta_mixer(
            mixed, gates, num_key_heads=1, num_value_heads=2, key_head_dim=16, backend="triton", **options
        ),
    )
    # The norms come from the kernel before.
    assert found == (torch.float32, (1, 2), (16, 8), False, eps, negative, l2norm, False)


@pytest.mark.parametrize("has_D, has_state", [(True, False), (False, True)])
def test_the_state_space_op_is_tried_as_it_is_called(unproven, monkeypatch, has_D, has_state):
    x, B, D, state = (torch.randn(shape) for shape in ((1, 5, 4, 12), (1, 5, 2, 16), 4, (1, 4, 16, 12)))
    options = dict(D=D if has_D else None, initial_state=state if has_state else None, backend="triton")
    found = tried(monkeypatch, lambda: ssd(x, dt=torch.rand(1, 5, 4), A=-torch.rand(4), B=B, C=B, **options))
    assert found == (torch.float32, (2, 4), (16, 12), has_D, has_state)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_first_use_may_be_in_evaluation(unproven, mode):
    """The trial takes gradients all the same."""
    with mode():
        call_rule()


def test_a_trial_has_as_many_blocks_as_asked_for(monkeypatch):
    """Some faults came with a thousand blocks at once only. 130 tokens are three chunks."""
    monkeypatch.setattr(first_use, "NUM_TOKENS", 130)

    def stop_rule(q, k, v, *_, **__):
        raise Tried(v.shape)

    def stop_ssd(x, *_):
        raise Tried(x.shape)

    monkeypatch.setattr(triton_chunk, "run_forward", stop_rule)
    monkeypatch.setattr(triton_ssd, "TritonSSD", SimpleNamespace(apply=stop_ssd))
    for wanted in (12, 100):
        monkeypatch.setattr(first_use, "BLOCKS", wanted)
        for heads in ((1, 2), (2, 4)):
            for attempt in (
                lambda heads=heads: try_rule(heads=heads),
                lambda heads=heads: first_use._try_ssd(FAULTS, CPU, torch.float32, heads, (16, 12), True, True),
            ):
                with pytest.raises(Tried) as caught:
                    attempt()
                rows, _, num_heads, _ = caught.value.args[0]
                assert num_heads == heads[1] and wanted <= 3 * rows * num_heads < wanted + 3 * num_heads


def test_nothing_is_tried_without_a_reason(monkeypatch):
    assert first_use.unproven_faults(CPU) == ()
    monkeypatch.setattr(first_use, "_compare", lambda *_: pytest.fail("tried"))
    for call in CALLS.values():
        call()


@pytest.mark.parametrize(
    "capability, version, issues",
    [
        ((9, 0), "3.3.1", []),
        ((9, 0), "3.5.1", ["984"]),
        ((9, 0), "3.9.0", ["984", "10486"]),
        ((8, 0), "3.9.0", []),
        ((10, 0), "3.6.0", ["945", "913"]),
    ],
)
def test_where_kernels_are_tried(monkeypatch, capability, version, issues):
    import triton

    from megatron_gdn.kernels.triton_support import language

    monkeypatch.setattr(language, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton, "__version__", version)
    found = first_use.unproven_faults(torch.device("cuda", 0))
    assert [fault.issue.rpartition("#")[2] for fault in found] == issues


def test_a_fault_that_the_kernels_have_stops_every_public_function(monkeypatch):
    """No trial: what is known to be wrong is refused."""
    from megatron_gdn.kernels.triton_support import guards, language

    wrong = Miscompile(**dataclasses.asdict(FAULTS[0]) | dict(verdict="wrong", first=(0, 0, 0)))
    monkeypatch.setattr(language, "INTERPRETED", False)
    monkeypatch.setattr(guards.check_compiler, "__defaults__", ((wrong,),))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for resolve in (backend._check_triton, first_use.unproven_faults):
        with pytest.raises(RuntimeError, match=r"Triton \(.*\) on sm_90 compiles .* to wrong code .*: install another"):
            resolve(torch.device("cuda", 0))


def test_a_first_use_is_not_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        RuntimeError, match="the first use of x must not be captured in a CUDA graph: run the layer once"
    ):
        first_use._compare("x", FAULTS, torch.device("cuda", 0), torch.float32, dict, dict)
