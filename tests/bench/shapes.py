"""Shapes of the benchmarks: why each is there, and the least work that it takes."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class RuleShape:
    """One call of the gated delta rule.

    documents: packed documents of equal length; 1 for a plain batch.
    l2norm: q and k are normalised inside.
    """

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    dtype: str = "float32"
    documents: int = 1
    l2norm: bool = False

    def flops(self, chunk_size: int = 64) -> float:
        """Forward and backward with saved states, every multiplication of the chunkwise form, without the solve."""
        forward = 6 * self.K * self.V + 4 * chunk_size * (self.K + self.V)
        backward = 12 * self.K * self.V + 12 * chunk_size * self.K + 8 * chunk_size * self.V
        return self.B * self.T * self.HV * float(forward + backward)

    def bytes(self) -> float:
        """Inputs, output and their gradients, each moved once per direction that needs it."""
        size = {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]
        per_token = (2 * self.H * self.K + self.HV * self.V) * 3 + self.HV * self.V * 2
        return self.B * self.T * (per_token * size + self.HV * 2 * 3 * 4.0)

    def describe(self) -> dict:
        return asdict(self)


GATED_DELTA_RULE_CPU = {
    # The shape of the project's goal; keys are normalised outside, so that all three implementations can run it.
    "rule": RuleShape(B=1, T=2048, H=4, HV=4, K=128, V=128),
    # What a layer calls.
    "rule with l2norm": RuleShape(B=1, T=2048, H=4, HV=4, K=128, V=128, l2norm=True),
    # A tail that fills no chunk, and grouped value heads.
    "T 2000, HV 2 H": RuleShape(B=1, T=2000, H=2, HV=4, K=128, V=128),
    # Small heads, where calls cost more than multiplications: the demo's kind of model.
    "small heads": RuleShape(B=8, T=256, H=4, HV=4, K=32, V=32),
    "bfloat16": RuleShape(B=1, T=2048, H=4, HV=4, K=128, V=128, dtype="bfloat16"),
    # Few long and many short documents in one packed row; only ours can pack.
    "2 documents": RuleShape(B=1, T=2048, H=4, HV=4, K=128, V=128, documents=2),
    "32 documents": RuleShape(B=1, T=2048, H=4, HV=4, K=128, V=128, documents=32),
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Work per token and value head: bytes moved to and from device memory, floating-point operations."""

    bytes: float
    flops: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(bytes=self.bytes + other.bytes, flops=self.flops + other.flops)


def kernel_costs(H: int, HV: int, K: int, V: int, *, C: int = 64, size: int = 2) -> dict[str, Cost]:
    """What each kernel of the chunked rule does at least, each tensor moved once; without the solve (2.7 kFLOP).

    q and k count once per key head: its value heads find them in the L2 cache. `size` is bytes per element.
    """
    key, value, state, solved = size * K * H / HV, size * V, size * K * V / C, size * C
    gates = 4.0
    return {
        "prepare": Cost(bytes=2 * key + 3 * gates + solved, flops=2 * C * K),
        "states": Cost(bytes=key + 2 * value + solved + state + 2 * gates, flops=4 * K * V + 2 * C * V),
        "output": Cost(bytes=2 * key + 2 * value + state + gates, flops=2 * K * V + 2 * C * K + 2 * C * V),
        "state_gradients": Cost(
            # With the scores, a launch of its own, which reads q and k and writes what is read here.
            bytes=4 * key + 2 * value + 3 * solved + state + 2 * gates,
            flops=6 * K * V + 2 * C * K + 4 * C * V,
        ),
        "input_gradients": Cost(
            # dP and E are written, and read again from the cache.
            bytes=4 * key + 5 * value + 2 * solved + 2 * state + 5 * gates,
            flops=6 * K * V + 8 * C * K + 4 * C * V,
        ),
    }


FORWARD_KERNELS = ("prepare", "states", "output")
# S and U are computed again; G and T are saved.
BACKWARD_KERNELS = ("states", "state_gradients", "input_gradients")


def least_costs(H: int, HV: int, K: int, V: int, *, C: int = 64, size: int = 2) -> dict[str, Cost]:
    """The roofline of forward and backward: inputs and results moved once, nothing in between."""
    key, value, gates = size * K * H / HV, size * V, 8.0
    return {
        "forward": Cost(bytes=2 * key + 2 * value + gates, flops=6 * K * V + 4 * C * (K + V)),
        "backward": Cost(bytes=4 * key + 3 * value + 2 * gates, flops=16 * K * V + 10 * C * K + 10 * C * V),
    }


# name -> shapes of the rule on a GPU, bfloat16, keys normalised inside.
RULE_GPU = {
    f"{H}/{HV} heads of {K}/{V}, T {T}" + (f", {documents} documents" if documents > 1 else ""): RuleShape(
        B=1, T=T, H=H, HV=HV, K=K, V=V, dtype="bfloat16", documents=documents, l2norm=True
    )
    for H, HV, K, V, T, documents in [
        # Qwen3-Next's heads, and as many keys as values; few and many tokens, one sequence: the sequential kernels
        # have HV programs per slice of V, whatever T is.
        *((16, 32, 128, 128, T, 1) for T in (4096, 8192, 16384, 32768, 65536)),
        *((32, 32, 128, 128, T, 1) for T in (4096, 16384, 65536)),
        # Packed: more programs, and tails.
        *((16, 32, 128, 128, 32768, documents) for documents in (4, 32)),
        # The paper's kind of heads: K and V of 3 and 6 times 64; no power of two.
        (4, 8, 192, 384, 16384, 1),
        (4, 8, 200, 400, 16384, 1),
        (6, 6, 256, 512, 16384, 1),
    ]
}
