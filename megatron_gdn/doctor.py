"""Which provider serves which role of training on this machine, and why.

python -m megatron_gdn.doctor [--json]

Exit code 0. The evidence is what Megatron-Core bound when it was imported, not what is installed: a package that is
there but does not import serves nothing.
"""

import argparse
import contextlib
import json
import logging
import sys
import warnings
from dataclasses import asdict, dataclass

import torch

from megatron_gdn import optional
from megatron_gdn.parallel import cpu


@dataclass(frozen=True, kw_only=True)
class Role:
    """What serves a part of training.

    role: the part.
    provider: who serves it.
    why: the evidence, and what would serve it better.
    """

    role: str
    provider: str
    why: str


def examine() -> list[Role]:
    """The provider of every role; imports Megatron-Core and the optional packages that are installed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packages = optional.status()
    cpu.install()
    te = _problem(packages, "transformer_engine")
    apex = _problem(packages, "apex")
    return [
        Role(role="device", provider=_device_name(device), why=f"torch {torch.__version__} finds it"),
        _linear(te),
        Role(
            role="norm", provider="megatron_gdn.norms", why="own RMSNorm; Transformer Engine's with its linear layers"
        ),
        _attention(device),
        _kernels(device),
        _optimizer(device, te, apex),
        Role(
            role="Muon",
            provider="megatron_gdn.training.muon",
            why="optimizer.name=muon; own: PyTorch's and Megatron-Core's take a fused weight for one matrix",
        ),
        _clipping(te, apex),
        _accumulation(device),
        _fp8(device, te),
        Role(
            role="DeepSpeed engine",
            provider="none" if _problem(packages, "deepspeed") else f"deepspeed {packages['deepspeed']}",
            why=_problem(packages, "deepspeed") or "imports",
        ),
    ]


def _problem(packages: dict[str, str], name: str) -> str | None:
    """Why an optional package cannot be used; None when it can."""
    return packages[name] if packages[name].startswith("is ") else None


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu, gloo"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor}), NCCL"


def _linear(te: str | None) -> Role:
    if te is None:
        return Role(role="linear", provider="Transformer Engine or Megatron-Core", why="model.provider chooses")
    return Role(role="linear", provider="Megatron-Core", why=f"transformer_engine {te}")


def _attention(device: torch.device) -> Role:
    from megatron_gdn.kernels.sliding_window import resolve_attention_backend

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = resolve_attention_backend("auto", device.type, dtype=dtype, head_dims=(128, 128))
    return Role(role="attention", provider=chosen, why=f"attention_backend=auto on {device.type}, heads of 128")


def _kernels(device: torch.device) -> Role:
    from megatron_gdn.kernels.backend import resolve_backend

    try:
        return Role(
            role="kernels", provider=resolve_backend("auto", device), why=f"kernel_backend=auto on {device.type}"
        )
    except (ValueError, RuntimeError) as error:
        return Role(role="kernels", provider="none", why=str(error))


def _optimizer(device: torch.device, te: str | None, apex: str | None) -> Role:
    from megatron.core import optimizer

    bound = optimizer.Adam
    why = "Megatron-Core takes Transformer Engine's, then Apex's, then PyTorch's"
    if te is not None:
        why += f"; transformer_engine {te}"
        if apex is not None:
            why += f"; apex {apex}"
    if device.type == "cpu":
        why = "on a CPU, AdamW with the step count where fused optimizers have it"
    return Role(role="optimizer", provider=f"{bound.__module__}.{bound.__name__}", why=why)


def _clipping(te: str | None, apex: str | None) -> Role:
    from megatron.core.optimizer import clip_grads

    module = clip_grads.l2_norm_impl.__module__ or "amp_C"  # compiled functions have no module
    why = (
        "fused norm and scale" if te is None or apex is None else "Megatron-Core's Python loop: neither package imports"
    )
    return Role(role="clipping", provider=module, why=why)


def _accumulation(device: torch.device) -> Role:
    from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available

    from megatron_gdn.providers import fuses_weight_gradients

    role, extension, hooks = "gradient accumulation", "fused_weight_gradient_mlp_cuda", "Megatron-Core's hooks"
    if fuses_weight_gradients(device):
        why = "Apex's extension imports: engine megatron adds weight gradients to float32 buffers inside the product"
        return Role(role=role, provider=extension, why=why)
    if _grad_accum_fusion_available:
        return Role(role=role, provider=hooks, why=f"Apex's extension {extension} imports, and runs on CUDA only")
    return Role(
        role=role,
        provider=hooks,
        why=f"Apex's extension {extension} is not there; megatron_gdn/fp8/README.md says how to build it",
    )


def _fp8(device: torch.device, te: str | None) -> Role:
    if device.type == "cpu":
        return Role(
            role="FP8", provider="emulated", why="no GPU: fp8.backend=emulated rounds and multiplies in float32"
        )
    if torch.cuda.get_device_capability() < (8, 9):
        return Role(role="FP8", provider="emulated", why=f"{torch.cuda.get_device_name()} has no FP8 tensor cores")
    if te is None:
        return Role(role="FP8", provider="te, scaled_mm, emulated", why="fp8.backend chooses")
    return Role(role="FP8", provider="scaled_mm, emulated", why=f"transformer_engine {te}")


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description="Which provider serves which role of training here, and why.")
    parser.add_argument("--json", action="store_true", help="for scripts")
    arguments = parser.parse_args()
    logging.getLogger("megatron_gdn").setLevel(logging.ERROR)  # what the warnings say is in the table
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed talks to stdout when it is imported
        roles = examine()
    if arguments.json:
        json.dump([asdict(role) for role in roles], sys.stdout, indent=1)
        print()
        return
    widths = [max(len(getattr(role, name)) for role in roles) for name in ("role", "provider")]
    for role in roles:
        print(f"{role.role:<{widths[0]}}  {role.provider:<{widths[1]}}  {role.why}")


if __name__ == "__main__":
    main()
