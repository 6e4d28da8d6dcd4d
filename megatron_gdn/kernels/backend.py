"""Kernel backends by name: chosen once per call, never exchanged behind the caller's back."""

import functools
import logging
from importlib.util import find_spec

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BACKENDS = ("torch", "triton", "fla")
_PACKAGES = {"triton": "triton", "fla": "fla-core"}  # import name -> what pip installs


@functools.cache
def _log_choice(backend: str, requested: str, device_type: str) -> None:
    logger.info("kernel backend %s on %s (requested: %s)", backend, device_type, requested)


def resolve_backend(requested: str, device: torch.device, offered: tuple[str, ...] = ("torch", "triton")) -> str:
    """The backend that `requested` means on `device`; the first choice of each kind is logged.

    Args:
        requested: "torch"; "triton", on GPUs, and on other devices where Triton is interpreted; "fla", the package
            flash-linear-attention, for the rule; "auto": triton on GPUs, torch elsewhere.
        device: of the inputs.
        offered: backends of the operation.

    Raises:
        ValueError: an unknown backend, one that the operation does not offer, whose package is missing, or that does
            not run on the device.
        RuntimeError: a Triton that is too old, or known to compile our kernels to wrong code for this GPU.
    """
    if requested not in ("auto", *BACKENDS):
        raise ValueError(
            f"backend ({requested}) must be one of {', '.join(('auto', *BACKENDS))}: 'auto' suits the device."
        )
    backend = requested
    if requested == "auto":
        backend = "triton" if device.type == "cuda" else "torch"
    if backend not in offered:
        reason = "is offered for chunk_gated_delta_rule only" if backend == "fla" else "is not offered here"
        remedy = " or ".join(f"'{name}'" for name in offered)
        raise ValueError(f"backend ({backend}) {reason}: use {remedy}.")
    if backend in _PACKAGES and find_spec(backend) is None:
        raise ValueError(
            f"backend ({backend}) needs the package {_PACKAGES[backend]}, which is not installed: "
            f"pip install {_PACKAGES[backend]}, or use backend 'torch'."
        )
    if backend == "triton":
        _check_triton(device)
    _log_choice(backend, requested, device.type)
    return backend


@functools.cache
def _check_triton(device: torch.device) -> None:
    """Raise unless Triton, which is installed, can run our kernels on the device."""
    import triton

    from megatron_gdn.kernels.triton_support import guards

    # Before modules that an old Triton may not even import.
    guards.check_version(triton.__version__)
    from megatron_gdn.kernels.triton_support.configs import architecture
    from megatron_gdn.kernels.triton_support.language import INTERPRETED

    if INTERPRETED:
        return
    if device.type != "cuda":
        raise ValueError(
            f"backend (triton) does not run on {device}: move the tensors to a GPU, use backend 'torch', or set "
            "TRITON_INTERPRET=1 before Triton is imported (for tests; slow)."
        )
    arch = architecture(device)
    for fault in guards.check_compiler(arch, triton.__version__):
        logger.info(
            "Triton %s on %s miscompiles %s (%s); %s by these kernels: %s",
            triton.__version__,
            arch,
            fault.pattern,
            fault.issue,
            "avoided" if fault.verdict == "avoided" else "tried on first use",
            fault.reason,
        )


def check_triton_dtypes(**tensors: Tensor | None) -> None:
    """Raise ValueError for float64, which the Triton kernels do not compute in; None is passed over."""
    for name, x in tensors.items():
        if x is not None and x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name} ({x.dtype}) must be float32, bfloat16 or float16 for backend triton: use backend 'torch'."
            )


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic on inputs of `dtype`: float64 for float64, otherwise float32."""
    return torch.promote_types(dtype, torch.float32)


def check_floats(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all have a float dtype and the device of the first; None is passed over."""
    device = next(iter(tensors.values())).device
    for name, x in tensors.items():
        if x is None:
            continue
        if not x.is_floating_point():
            raise ValueError(f"{name} ({x.dtype}) must have a float dtype: convert it.")
        if x.device != device:
            raise ValueError(
                f"{name} ({x.device}) must be on the device of {next(iter(tensors))} ({device}): move it there."
            )
