"""Compile kernels for GPUs that are not here, and read what the assembler says of them.

Not in an interpreted process: TRITON_INTERPRET must not be set when Triton is imported.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_gdn.kernels.triton_support.configs import Config

# Most that a block may use: NVIDIA's CUDA programming guide, table of compute capabilities.
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel as it is launched.

    name: of the kernel, with the shapes that matter.
    kernel: the jitted function.
    signature: type of each argument that is not a constexpr, such as "*bf16", "fp32", "i32". Pointers and integers are
        taken to be divisible by 16, as torch's allocations and the usual strides are.
    constexprs: value of each constexpr that the configuration does not give.
    config: launch parameters.
    default: whether the default table launches it at K = V = 128: held to 0 spills on sm_90.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    config: Config
    default: bool = True


def strides(*names: str, of: str = "bth") -> dict[str, str]:
    """Types of the strides of tensors, for a signature."""
    return {f"stride_{name}{dimension}": "i32" for name in names for dimension in of}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one compiled kernel takes.

    registers: per thread.
    spilled_bytes: of stack per thread.
    shared_bytes: per block.
    wgmma, mma: tensor-core instructions in the PTX.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    wgmma: int
    mma: int


def compile_case(case: Case, arch: str) -> Report:
    """Compile for an architecture such as "sm_90".

    Raises:
        RuntimeError: the kernel does not compile, or its report cannot be read.
    """
    kernel = case.kernel
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    constexprs = case.constexprs | dict(case.config.block)
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constexprs:
            signature[name], constants[(i,)] = "constexpr", constexprs[name]
        else:
            signature[name] = case.signature[name]
            if signature[name] != "fp32":
                attributes[(i,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    launch = case.config.launch
    options = {name: launch[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump does not tell what {case.name} uses on {arch}: {usage[-500:]}")
    ptx = compiled.asm["ptx"]
    return Report(
        registers=int(found[1]),
        spilled_bytes=int(found[2]),
        shared_bytes=compiled.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async") + ptx.count("tcgen05.mma"),
        mma=ptx.count("mma.sync"),
    )
