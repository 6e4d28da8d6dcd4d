"""Inputs of the kernels and the measure of their error."""

import torch
from torch import Tensor

NAMES = ("q", "k", "v", "g", "beta", "initial_state")


def rms_error(ours: Tensor, reference: Tensor, smallest: float = 0.0) -> float:
    """Root mean square of the difference over that of the reference, or over `smallest` if that is larger."""
    assert ours.shape == reference.shape
    difference = (ours.double() - reference.double()).square().mean().sqrt()
    return (difference / reference.double().square().mean().sqrt().clamp(min=smallest)).item()


def rule_inputs(
    B: int, T: int, H: int, HV: int, K: int, V: int, *, num_states: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Signed float64 inputs of the rule with states that are not zero; beta in (0, 1), g from almost 0 to about -4."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    return dict(
        q=normal(B, T, H, K),
        # Keys lean to one side, as after SiLU: independent ones would be almost orthogonal.
        k=torch.nn.functional.normalize(normal(B, T, H, K) + 0.5, dim=-1),
        v=normal(B, T, HV, V),
        g=torch.nn.functional.logsigmoid(2 * normal(B, T, HV) + 1),
        beta=normal(B, T, HV).sigmoid(),
        initial_state=normal(B if num_states is None else num_states, HV, K, V),
    )


def bounds(*lengths: int) -> Tensor:
    """cu_seqlens of documents with these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0)


def loss_weights(*outputs: Tensor) -> list[Tensor]:
    """Fixed random numbers in float64 with 8 significant bits: exact in every dtype, so that no gradient is rounded."""
    rng = torch.Generator().manual_seed(7)
    return [(torch.randn(x.shape, generator=rng, dtype=torch.float64) * 64).round() / 64 for x in outputs]


def loss(*outputs: Tensor) -> Tensor:
    """All outputs, each element with a weight of its own."""
    return sum((x.double() * w).sum() for x, w in zip(outputs, loss_weights(*outputs), strict=True))


def run(function, inputs: dict[str, Tensor], **options) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs (o, final_state) and gradients (by input) of a rule, each in the dtype it comes in."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    keywords = {name: x for name, x in leaves.items() if name not in ("q", "k", "v")}
    o, final = function(leaves["q"], leaves["k"], leaves["v"], **keywords, output_final_state=True, **options)
    grads = torch.autograd.grad(loss(o, final), list(leaves.values()), materialize_grads=True)
    return dict(o=o.detach(), final_state=final.detach()), dict(zip(leaves, grads, strict=True))


def assert_equal(ours: tuple[dict, dict], reference: tuple[dict, dict], forward: float, backward: float) -> None:
    """Outputs and gradients agree within these relative errors (root mean square).

    What is 1e-12 of the largest output or gradient and below, as the gradient of a gate of exp(-50), counts as 0.
    """
    for got, expected, tolerance in zip(ours, reference, (forward, backward), strict=True):
        largest = max(x.double().square().mean().sqrt().item() for x in expected.values() if x.numel())
        for name, value in expected.items():
            error = rms_error(got[name], value, smallest=1e-12 * largest) if value.numel() else 0.0
            assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.1e}"
