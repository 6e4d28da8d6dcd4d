"""Triton compilers that are known to produce wrong code, and whether our kernels are concerned.

A wrong compiler gives wrong gradients without an error, so every report that could touch these kernels has a row here,
with the reason for its verdict. Needs no Triton.
"""

import re
from dataclasses import dataclass

OLDEST_TRITON = (3, 2, 0)
"""Kernels build tuples of tiles, which older compilers do not know. Run so far: 3.9.0, interpreted and offline."""


@dataclass(frozen=True, kw_only=True)
class Miscompile:
    """A reported fault of the compiler.

    first, fixed: versions, the first that has the fault and the first without it; fixed None: not known to be fixed.
    architectures: rows of the launch table that it hits.
    pattern: the code that it hits.
    issue: where it is described.
    verdict: "wrong": our kernels contain the pattern, the combination is refused; "avoided": they do not.
    reason: for the verdict.
    """

    first: tuple[int, int, int]
    fixed: tuple[int, int, int] | None
    architectures: tuple[str, ...]
    pattern: str
    issue: str
    verdict: str
    reason: str


KNOWN = (
    Miscompile(
        first=(3, 4, 0),
        fixed=(3, 7, 1),
        architectures=("sm_90",),
        pattern="a dot whose operand is the transpose of another dot's result",
        issue="fla-org/flash-linear-attention#640",
        verdict="avoided",
        reason="only loaded tiles are transposed; every offline compile counts transposes of products in the kernel's "
        "code and fails on one (offline.py)",
    ),
    Miscompile(
        first=(3, 4, 0),
        fixed=None,
        architectures=("sm_90",),
        pattern="the backward pass of the WY form: dA built up over loops of dots on 64 tokens with 4 warps, then "
        "multiplied by A from both sides",
        issue="fla-org/flash-linear-attention#984",
        verdict="avoided",
        reason="the solve form has no dA of this kind: T^T dU is one product with a loaded T, and dA is only an "
        "elementwise factor; num_warps is fixed, so what was tested is what runs",
    ),
)


def parse_version(version: str) -> tuple[int, int, int]:
    """ "3.7.1" or "3.8.0+git1a2b3c" as numbers; what is missing is 0."""
    numbers = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", version)
    if numbers is None:
        raise RuntimeError(f"Triton's version ({version}) cannot be read: install a release from PyPI.")
    return tuple(int(part or 0) for part in numbers.groups())


def check_version(version: str) -> None:
    """Raise RuntimeError for a Triton that is too old for the kernels.

    Args:
        version: `triton.__version__`.
    """
    if parse_version(version) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        raise RuntimeError(
            f"Triton ({version}) must be {oldest} or newer for backend triton: upgrade torch and Triton, or use "
            "backend 'torch'."
        )


def check_compiler(arch: str, version: str, known: tuple[Miscompile, ...] = KNOWN) -> list[Miscompile]:
    """Raise RuntimeError for a combination that gives wrong results; returns the faults that it has and ours avoid.

    Args:
        arch: row of the launch table, such as "sm_90".
        version: `triton.__version__`.
        known: faults of compilers.
    """
    check_version(version)
    numbers, avoided = parse_version(version), []
    for fault in known:
        hit = arch in fault.architectures and fault.first <= numbers and (fault.fixed is None or numbers < fault.fixed)
        if hit and fault.verdict == "avoided":
            avoided.append(fault)
        if hit and fault.verdict == "wrong":
            remedy = "another Triton"
            if fault.fixed is not None:
                remedy = f"Triton {'.'.join(map(str, fault.fixed))} or newer"
            raise RuntimeError(
                f"Triton ({version}) on {arch} compiles {fault.pattern} to wrong code ({fault.issue}): install "
                f"{remedy}, or use backend 'torch'."
            )
    return avoided
