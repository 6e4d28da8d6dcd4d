"""How each kernel is launched on each architecture: one table, no tuning at run time.

Numbers come from offline compiles (registers, spills, shared memory; kernels/README.md) until a committed GPU run has
measured better ones with `python -m tests.bench.tune`.
"""

from dataclasses import dataclass

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Launch parameters of a kernel.

    num_warps, num_stages: of Triton.
    block: further block sizes by the kernel's parameter names.
    """

    num_warps: int
    num_stages: int = 2
    block: tuple[tuple[str, int], ...] = ()

    @property
    def launch(self) -> dict[str, int]:
        """Keyword arguments of a launch; what an environment variable would set otherwise is set here."""
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=True, **dict(self.block))


def architecture(device: torch.device) -> str:
    """Row of the table for a device: the newest architecture that is not newer; sm_90 in the interpreter.

    Raises:
        ValueError: a GPU older than sm_80.
    """
    if device.type != "cuda":
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(
            f"device ({device}) has capability {major}.{minor} and the kernels need 8.0: use backend 'torch'."
        )
    return "sm_80" if major == 8 else "sm_90" if major == 9 else "sm_100"


TABLE: dict[str, dict[str, list[tuple[tuple[int, int], Config]]]] = {}
"""kernel -> architecture -> [((largest K, largest V), configuration)], the first that fits counts. Sections follow."""


def config(kernel: str, arch: str, K: int = 0, V: int = 0) -> Config:
    """Configuration of a kernel for head sizes K and V (0 where the kernel has none).

    Raises:
        ValueError: head sizes beyond the table.
    """
    for (largest_K, largest_V), found in TABLE[kernel][arch]:
        if K <= largest_K and V <= largest_V:
            return found
    raise ValueError(
        f"head sizes ({K}, {V}) of {kernel} must be at most {TABLE[kernel][arch][-1][0]}: use backend 'torch'."
    )


def config_name(kernel: str, dtype: torch.dtype) -> str:
    """Row of the table of configurations: float32 tiles are twice as large as those of 16 bits."""
    return f"{kernel} float32" if dtype == torch.float32 else kernel


# Gated delta rule, forward.
TABLE["prepare"] = {
    arch: [((256, 0), Config(num_warps=4, num_stages=2, block=(("BK", 64),)))] for arch in ARCHITECTURES
}
TABLE["prepare float32"] = {
    arch: [((256, 0), Config(num_warps=4, num_stages=2, block=(("BK", 32),)))] for arch in ARCHITECTURES
}
TABLE["state"] = {
    arch: [((256, 512), Config(num_warps=4, num_stages=2, block=(("BV", 32),)))] for arch in ARCHITECTURES
}
TABLE["state float32"] = TABLE["state"]
TABLE["affine_map"] = TABLE["affine_map float32"] = TABLE["state"]
TABLE["output"] = {
    arch: [((256, 512), Config(num_warps=4, num_stages=2, block=(("BK", 64), ("BV", 64))))] for arch in ARCHITECTURES
}
TABLE["output float32"] = TABLE["output"]
TABLE["recurrent"] = {
    arch: [
        ((128, 512), Config(num_warps=1, num_stages=1, block=(("BV", 32),))),
        ((256, 512), Config(num_warps=2, num_stages=1, block=(("BV", 32),))),
    ]
    for arch in ARCHITECTURES
}

# Gated delta rule, backward.

TABLE["scores"] = {
    arch: [
        ((64, 512), Config(num_warps=4, num_stages=1, block=(("BK", 64),))),
        ((256, 512), Config(num_warps=4, num_stages=2, block=(("BK", 64),))),
    ]
    for arch in ARCHITECTURES
}
TABLE["scores float32"] = {
    arch: [((256, 512), Config(num_warps=4, num_stages=1, block=(("BK", 32),)))] for arch in ARCHITECTURES
}
TABLE["state_gradients"] = {
    arch: [((256, 512), Config(num_warps=4, num_stages=2, block=(("BV", 32),)))] for arch in ARCHITECTURES
}
TABLE["state_gradients float32"] = {
    arch: [((256, 512), Config(num_warps=4, num_stages=1, block=(("BV", 32),)))] for arch in ARCHITECTURES
}
TABLE["input_gradients"] = {
    arch: [((256, 512), Config(num_warps=8, num_stages=1, block=(("BV", 64),)))] for arch in ARCHITECTURES
}
TABLE["input_gradients float32"] = {
    arch: [((256, 512), Config(num_warps=8, num_stages=1, block=(("BV", 32),)))] for arch in ARCHITECTURES
}

# State-space op; K is the size of the state, N, and V that of a head, P.
TABLE["ssd_prepare"] = {
    arch: [((256, 0), Config(num_warps=4, num_stages=2, block=(("BN", 64), ("BH", 16))))] for arch in ARCHITECTURES
}
TABLE["ssd_prepare float32"] = TABLE["ssd_prepare"]
TABLE["ssd_state"] = {
    arch: [((256, 512), Config(num_warps=4, num_stages=2, block=(("BP", 32),)))] for arch in ARCHITECTURES
}
TABLE["ssd_state float32"] = {
    arch: [((256, 512), Config(num_warps=8, num_stages=2, block=(("BP", 32),)))] for arch in ARCHITECTURES
}
TABLE["ssd_output"] = {
    arch: [((256, 512), Config(num_warps=4, num_stages=2, block=(("BN", 64), ("BP", 64))))] for arch in ARCHITECTURES
}
TABLE["ssd_output float32"] = TABLE["ssd_output"]
TABLE["ssd_state_gradients"] = TABLE["ssd_state"]
TABLE["ssd_state_gradients float32"] = TABLE["ssd_state float32"]
# BH heads of a group are summed in registers.
TABLE["ssd_group_gradients"] = {
    arch: [
        ((128, 512), Config(num_warps=8, num_stages=1, block=(("BP", 64), ("BH", 8)))),
        ((256, 512), Config(num_warps=8, num_stages=1, block=(("BP", 32), ("BH", 8)))),
    ]
    for arch in ("sm_90", "sm_100")
}
# Spills least of what was tried: 400 bytes at N 128.
TABLE["ssd_group_gradients"]["sm_80"] = [((256, 512), Config(num_warps=8, num_stages=1, block=(("BP", 16), ("BH", 8))))]
TABLE["ssd_group_gradients float32"] = {
    arch: [((256, 512), Config(num_warps=8, num_stages=1, block=(("BP", 16), ("BH", 8))))] for arch in ARCHITECTURES
}
TABLE["ssd_head_gradients"] = {
    arch: [((256, 512), Config(num_warps=8, num_stages=1, block=(("BP", 64),)))] for arch in ARCHITECTURES
}
TABLE["ssd_head_gradients float32"] = {
    arch: [((256, 512), Config(num_warps=8, num_stages=1, block=(("BP", 16),)))] for arch in ARCHITECTURES
}

# Convolution, norms, gate.


def _by_size(launches: dict[int, tuple[int, int]]) -> dict[str, list[tuple[tuple[int, int], Config]]]:
    """The same launches on all architectures: largest V -> (num_warps, rows that a program takes at a time)."""
    entries = [
        ((0, V), Config(num_warps=num_warps, num_stages=1, block=(("BLOCK_R", rows), ("BLOCK_D", V))))
        for V, (num_warps, rows) in launches.items()
    ]
    return {arch: entries for arch in ARCHITECTURES}


TABLE["l2norm_forward"] = _by_size({64: (4, 32), 128: (4, 16), 256: (4, 8), 512: (4, 4)})
TABLE["l2norm_backward"] = _by_size({64: (4, 32), 128: (4, 16), 256: (4, 8), 512: (4, 4)})
TABLE["gated_rms_norm_forward"] = _by_size({64: (4, 32), 128: (4, 16), 256: (4, 8), 512: (4, 4)})
TABLE["gated_rms_norm_backward"] = _by_size({64: (4, 16), 128: (4, 8), 256: (4, 4), 512: (4, 2)})
# V is the number of heads of a rank.
TABLE["gates_forward"] = _by_size({16: (4, 64), 32: (4, 32), 64: (4, 16), 128: (4, 8), 512: (4, 2)})
TABLE["gates_backward"] = _by_size({16: (4, 64), 32: (4, 32), 64: (4, 16), 128: (4, 8), 512: (4, 2)})


def _everywhere(num_warps: int, **block: int) -> dict[str, list[tuple[tuple[int, int], Config]]]:
    """One launch on all architectures, for kernels without a head size."""
    return {
        arch: [((0, 0), Config(num_warps=num_warps, num_stages=1, block=tuple(block.items())))]
        for arch in ARCHITECTURES
    }


# BLOCK_I * RUN is the 64 tokens of a chunk; a thread has RUN neighbouring tokens.
TABLE["causal_conv1d_forward"] = _everywhere(4, BLOCK_I=16, RUN=4, BLOCK_D=64)
TABLE["causal_conv1d_backward"] = _everywhere(4, BLOCK_I=16, RUN=4, BLOCK_D=32)
TABLE["causal_conv1d_final_state"] = _everywhere(1, BLOCK_D=128)
TABLE["causal_conv1d_initial_state_backward"] = _everywhere(1, BLOCK_D=128)
TABLE["causal_conv1d_update"] = _everywhere(1, BLOCK_D=128)
# Convolution, norms and gates together: a program has a whole head of q or k in BLOCK_D columns.
TABLE["inputs"] = {
    arch: [
        ((128, 512), Config(num_warps=4, num_stages=1, block=(("BLOCK_I", 16), ("RUN", 4), ("BLOCK_V", 64)))),
        ((256, 512), Config(num_warps=8, num_stages=1, block=(("BLOCK_I", 16), ("RUN", 4), ("BLOCK_V", 128)))),
    ]
    for arch in ARCHITECTURES
}
