"""Bytes that context-parallel ranks send, counted on four processes and calculated for a large model.

    python -m tests.bench.context_traffic [--save]

Counts wrap torch.distributed's collectives around a layer's forward and backward pass, at small widths. --save appends
to results/context_traffic.json and writes megatron_gdn/parallel/context_traffic.md.
"""

import argparse
import datetime
from pathlib import Path

from megatron_gdn.config import Config, load_config
from megatron_gdn.cost import model_cost
from megatron_gdn.layer_cost import head_exchange_bytes
from tests.bench.run import append, commit, machine
from tests.parallel.layer_traffic import all_layers
from tests.parallel.test_cost_of_context import NAMES, RANKS, config_of
from tests.ranks import close_pools, pool

LENGTHS = (256, 1024, 4096)
LARGE = {"32k": 2**15, "128k": 2**17, "1M": 2**20}
TABLE = Path("megatron_gdn/parallel/context_traffic.md")


def counted(case: str) -> list[dict]:
    """A row per length and layer: what the rank that sends most sends, forward and backward."""
    groups = dict(context_parallel_size=RANKS)
    ranks = pool(RANKS).run(all_layers, [config_of(case, n) for n in LENGTHS], "GMS*", groups=groups, timeout_s=600)
    rows = []
    for i, length in enumerate(LENGTHS):
        for symbol in ranks[0][i]:
            forward, backward = (max(rank[i][symbol][way] for rank in ranks) for way in range(2))
            rows.append(dict(case=case, tokens=length, layer=symbol, forward=forward, backward=backward))
    return rows


def calculated(ranks: int) -> list[dict]:
    """The same of the 7B recipe's Gated DeltaNet layer by cost.py, bf16."""
    rows = []
    for name, length in LARGE.items():
        overrides = [f"training.sequence_length={length}", f"parallel.context={ranks}", "training.train_tokens=1e15"]
        config: Config = load_config(Path("examples/recipes/qwen3_next_style_7b.yaml"), overrides)
        config.parallel.context_layout = "contiguous"
        layer = next(x for x in model_cost(config, vocab_size=32000).layers if x.name == NAMES["G"])
        forward, backward = layer.context_bytes
        rows.append(
            dict(tokens=name, ranks=ranks, forward=forward, backward=backward, heads=head_exchange_bytes(config))
        )
    return rows


def markdown(result: dict) -> str:
    """The tables."""
    names = NAMES | {"heads": "Gated DeltaNet by heads"}
    lines = [
        "# Bytes between context-parallel ranks",
        "",
        "Made by `python -m tests.bench.context_traffic --save`; `tests/parallel/test_cost_of_context.py` holds the",
        "cost model to the counts. Per sequence and layer, of the rank that sends most; an all-gather sends a rank's",
        "part to all others.",
        "",
        f"## Counted: {RANKS} processes, small widths, float32",
        "",
        "H = 4, HV = 8, K = 8, V = 12; Mamba2 with 4 heads of 16 x 8; attention with 4 heads of 8 and a window of 30.",
        '"By heads" is what Megatron-Core 0.18 does: every rank gets all tokens of a part of the heads.',
        "",
        "| layout | layer | pass | " + " | ".join(f"T = {length}" for length in LENGTHS) + " |",
        "|---|---|---|" + "---|" * len(LENGTHS),
    ]
    rows = {(row["case"], row["layer"], row["tokens"]): row for row in result["counted"]}
    for case, layer in dict.fromkeys((case, layer) for case, layer, _ in rows):
        for way in ("forward", "backward"):
            cells = " | ".join(f"{rows[case, layer, length][way]:,}" for length in LENGTHS)
            lines.append(f"| {case} | {names[layer]} | {way} | {cells} |")
    lines += [
        "",
        "## Calculated: a Gated DeltaNet layer of qwen3_next_style_7b, bf16 activations, float32 states",
        "",
        "| tokens | ranks | states forward | states backward | by heads, each pass |",
        "|---|---|---|---|---|",
    ]
    for row in result["calculated"]:
        sizes = " | ".join(f"{row[name] / 1e6:,.1f} MB" for name in ("forward", "backward", "heads"))
        lines.append(f"| {row['tokens']} | {row['ranks']} | {sizes} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write the results and the table")
    arguments = parser.parse_args()
    rows = [row for case in ("contiguous", "zigzag") for row in counted(case)]
    close_pools()
    large = [row for ranks in (8, 64) for row in calculated(ranks)]
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    result = dict(date=date, commit=commit(), machine=machine(1), counted=rows, calculated=large)
    print(markdown(result))
    if arguments.save:
        append("context_traffic", [result])
        TABLE.write_text(markdown(result))


if __name__ == "__main__":
    main()
