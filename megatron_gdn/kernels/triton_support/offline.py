"""Compile kernels for GPUs that are not here, and read what the assembler says of them.

Not in an interpreted process: TRITON_INTERPRET must not be set when Triton is imported.
"""

import itertools
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
    transposed_products: transposes of what a dot computed; up to Triton 3.7.0 dots of them are wrong on Hopper.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    wgmma: int
    mma: int
    transposed_products: int = 0


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
        transposed_products=count_transposed_products(compiled.asm["ttir"]),
    )


_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")


def count_transposed_products(ttir: str) -> int:
    """Transposes in Triton's IR whose operand comes from a dot, through arithmetic, loops and branches, not memory."""
    sources: dict[str, set[str]] = {}  # value -> values that it is computed from
    products, transposed = set(), []
    # Regions that are open: what its operation gives and what it carries along; its names, which others use again.
    open_regions, scopes, numbers = [], [{}], itertools.count()

    def define(name: str) -> str:
        scopes[-1][name] = f"{name}@{next(numbers)}"
        return scopes[-1][name]

    def find(value: str) -> str:
        name, _, number = value.partition("#")
        known = next((scope[name] for scope in reversed(scopes) if name in scope), name)
        return f"{known}#{number or 0}"

    for line in ttir.splitlines():
        name, operation, rest = _split_line(line)
        used = [find(value) for value in _VALUE.findall(rest)]
        if operation == "scf.yield":
            results, carried = open_regions[-1]
            for i, value in enumerate(used):
                for target in [f"{results}#{i}", *carried[i : i + 1]]:
                    sources.setdefault(target, set()).add(value)
        elif "} else" in line:
            scopes[-1] = {}
        elif line.rstrip().split(" loc(")[0].endswith("{"):
            results = define(name) if name else ""
            pairs = re.findall(r"(%[\w$.-]+) = (%[\w$.#-]+)", rest.partition("iter_args(")[2].partition(")")[0])
            initial = [find(value) for _, value in pairs]
            scopes.append({})
            carried = [f"{define(argument)}#0" for argument, _ in pairs]
            for i, value in enumerate(initial):
                sources.setdefault(carried[i], set()).add(value)
                sources.setdefault(f"{results}#{i}", set()).add(value)
            if not operation.startswith("scf."):  # a reduction
                sources[f"{results}#0"] = set(used)
            open_regions.append((results, carried))
        elif line.strip().startswith("}") and open_regions:
            open_regions.pop()
            scopes.pop()
        elif name:
            target = f"{define(name)}#0"
            # What is loaded is not what a dot holds in registers.
            sources[target] = set() if operation == "tt.load" else set(used)
            if operation == "tt.dot":
                products.add(target)
            elif operation == "tt.trans":
                transposed.append(target)
    return sum(bool(products & _reached(target, sources)) for target in transposed)


def _split_line(line: str) -> tuple[str, str, str]:
    """Result, operation and the rest of a line of IR; the result without its number of values, or nothing."""
    found = re.match(r"\s*(?:(%[\w$.-]+)(?::\d+)? = )?\"?([\w.]+)\"?(.*)", line)
    return (found[1] or "", found[2], found[3]) if found else ("", "", "")


def _reached(value: str, sources: dict[str, set[str]]) -> set[str]:
    seen, waiting = set(), [value]
    while waiting:
        for source in sources.get(waiting.pop(), ()):
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return seen
