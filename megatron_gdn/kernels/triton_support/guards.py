"""Triton compilers that are known to produce wrong code, and whether our kernels are concerned.

A wrong compiler gives wrong gradients without an error, so every report that could touch these kernels has a row here,
with the reason for its verdict. A pattern that the kernels contain is refused; one that a look at every compiled kernel
shows to be absent is not; what nobody has explained is tried on the device before it is trusted. Needs no Triton.
"""

import re
from dataclasses import dataclass

OLDEST_TRITON = (3, 3, 0)
"""3.2.0, of torch 2.6, ends with an LLVM error on the first kernel for sm_90 ("Failed to emit transfer")."""


@dataclass(frozen=True, kw_only=True)
class Miscompile:
    """A reported fault of the compiler.

    first, fixed: versions, the first that has the fault and the first without it; fixed None: not known to be fixed.
    architectures: rows of the launch table that it hits.
    pattern: the code that it hits.
    issue: where it is described.
    verdict: "wrong": our kernels contain the pattern, the combination is refused; "avoided": they do not;
        "unproven": nobody knows what exactly goes wrong, so the first results are checked (`first_use.py`).
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
        pattern="the backward pass of the WY form on 64 tokens with 4 warps",
        issue="fla-org/flash-linear-attention#984",
        verdict="unproven",
        reason="right with 2 warps, which cannot use wgmma, wrong or an illegal access with 4, the report does not say "
        "why; the solve form has no such dA, but our kernels too multiply tiles of 64 rows with 4 warps",
    ),
    Miscompile(
        first=(3, 6, 0),
        fixed=None,
        architectures=("sm_90",),
        pattern="several dots, some of blocks of 32, with 4 warps: now and then an illegal access to shared memory",
        issue="triton-lang/triton#10486",
        verdict="unproven",
        reason="our sequential kernels have such blocks; seen with 3.7.1 and not with 3.5.1 (also triton#11366, and "
        "#10573 with 3.6.0), closed without naming what ended it",
    ),
    Miscompile(
        first=(3, 6, 0),
        fixed=None,
        architectures=("sm_100",),
        pattern="dots that carry a state from chunk to chunk, or with 8 warps: other bits in every run",
        issue="fla-org/flash-linear-attention#945",
        verdict="unproven",
        reason="our sequential kernels are such a loop with 4 warps (also fla#1228); fla waits for 3.8 to look again",
    ),
    Miscompile(
        first=(3, 6, 0),
        fixed=None,
        architectures=("sm_100",),
        pattern="the solve of a chunk: NaN from 1024 blocks on, misaligned addresses",
        issue="fla-org/flash-linear-attention#913",
        verdict="unproven",
        reason="our solve is another one, but the cause is not known",
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
    """Raise RuntimeError for a combination that gives wrong results; returns the other faults that it has.

    Args:
        arch: row of the launch table, such as "sm_90".
        version: `triton.__version__`.
        known: faults of compilers.
    """
    check_version(version)
    numbers, others = parse_version(version), []
    for fault in known:
        hit = arch in fault.architectures and fault.first <= numbers and (fault.fixed is None or numbers < fault.fixed)
        if hit and fault.verdict != "wrong":
            others.append(fault)
        elif hit:
            remedy = "another Triton"
            if fault.fixed is not None:
                remedy = f"Triton {'.'.join(map(str, fault.fixed))} or newer"
            raise RuntimeError(
                f"Triton ({version}) on {arch} compiles {fault.pattern} to wrong code ({fault.issue}): install "
                f"{remedy}, or use backend 'torch'."
            )
    return others
