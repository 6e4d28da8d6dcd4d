"""Memory and time of converting a model of 1.4 B parameters, in bfloat16, on a CPU:

    python -m tests.bench.convert --save

A synthetic model of the shape of flame's gated_deltanet_1B (1,387,348,732 parameters) is written to a temporary folder,
then converted by each way in a process of its own. Memory is the anonymous part of the resident size over what the
process had after its imports; mapped files, which the system can drop, are not counted.

    to_hf        tools.convert.megatron_to_hf (qwen3_5_text)
    naive        torch.distributed.checkpoint loads all tensors, safetensors saves them
    transformers from_pretrained and save_pretrained of the exported folder, in bfloat16
    to_megatron  tools.convert.hf_to_megatron of the exported folder
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.bench.run import _status_kb, append, commit, machine

WAYS = ("to_hf", "naive", "transformers", "to_megatron")
SHAPES = {
    "1B": dict(hidden_size=2048, ffn_hidden_size=5632, layers=21, heads=6, key_dim=256, value_dim=512, vocab=32000),
    "tiny": dict(hidden_size=64, ffn_hidden_size=128, layers=2, heads=2, key_dim=16, value_dim=32, vocab=500),
}


def write_synthetic(folder: Path, shape: dict) -> None:
    """A checkpoint of this project with the shape's weights, one tensor in memory at a time."""
    from dataclasses import asdict

    import torch

    from megatron_gdn.config import ModelConfig
    from tools.convert.architecture import Architecture, expected_shapes
    from tools.convert.safetensors_io import Planned
    from tools.convert.torch_dist_writer import CheckpointWriter

    model = ModelConfig(
        pattern=f"(G-)x{shape['layers']}",
        hidden_size=shape["hidden_size"],
        ffn_hidden_size=shape["ffn_hidden_size"],
        linear_num_key_heads=shape["heads"],
        linear_num_value_heads=shape["heads"],
        linear_key_head_dim=shape["key_dim"],
        linear_value_head_dim=shape["value_dim"],
        vocab_size=shape["vocab"],
        zero_centered_norm=True,
    )
    tensors = [
        Planned(name=key, shape=tuple(size or shape["vocab"] for size in found), dtype=torch.bfloat16)
        for key, found in expected_shapes(Architecture(model=model)).items()
    ]
    sizes = {tensor.name: tensor.shape for tensor in tensors}
    info = {
        "step": 1,
        "vocabulary": {"size": shape["vocab"], "eod_id": 0},
        "config": {"model": asdict(model), "training": {"sequence_length": 2048}},
    }
    writer = CheckpointWriter(folder=folder / "step_00000001", tensors=tensors, objects=[], common={}, info=info)
    writer.begin([], resume=False)
    writer.write(lambda key: torch.full(sizes[key], 0.25, dtype=torch.bfloat16))


def convert(way: str, root: Path) -> dict[str, float]:
    """Seconds and MiB of one way, in this process."""
    run = _prepare(way, root)
    base, peak, stop = _status_kb("RssAnon"), 0, threading.Event()

    def watch():
        nonlocal peak
        while not stop.wait(0.005):
            peak = max(peak, _status_kb("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    stop.set()
    thread.join()
    return {"seconds": round(seconds, 1), "peak_mib": round((max(peak, base) - base) / 1024)}


def _prepare(way: str, root: Path):
    """The conversion as a function, with everything imported."""
    if way == "to_hf":
        from tools.convert import megatron_to_hf

        command = ["--checkpoint", str(root / "ours"), "--output", str(root / "hf"), "--format", "qwen3_5_text"]
        return lambda: _expect_zero(megatron_to_hf.main(command))
    if way == "to_megatron":
        from tools.convert import hf_to_megatron

        command = ["--hf", str(root / "hf"), "--output", str(root / "again")]
        return lambda: _expect_zero(hf_to_megatron.main(command))
    if way == "transformers":
        import torch
        import transformers

        def through_transformers():
            model = transformers.AutoModelForCausalLM.from_pretrained(root / "hf", dtype=torch.bfloat16)
            model.save_pretrained(root / "transformers")

        return through_transformers
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    def naive():
        (folder,) = (root / "ours").glob("step_*")
        reader = dcp.FileSystemReader(folder)
        entries = reader.read_metadata().state_dict_metadata.items()
        found = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in entries
            if isinstance(entry, TensorStorageMetadata)
        }
        dcp.load(found, storage_reader=reader)
        (root / "naive").mkdir()
        save_file(found, root / "naive" / "model.safetensors")

    return naive


def _expect_zero(code: int) -> None:
    if code != 0:
        raise SystemExit(code)


def measure(shape_name: str) -> dict:
    """All ways, each in a fresh process."""
    shape, results = SHAPES[shape_name], {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_synthetic(root / "ours", shape)
        num_bytes = sum(path.stat().st_size for path in (root / "ours").rglob("*.distcp"))
        for way in WAYS:
            command = [sys.executable, "-m", "tests.bench.convert", "--of", way, "--root", folder]
            found = subprocess.run(command, capture_output=True, text=True, check=True)
            results[way] = json.loads(found.stdout.splitlines()[-1])
            print(way, results[way], flush=True)
    largest = 2 * shape["vocab"] * shape["hidden_size"]
    return dict(
        shape=shape_name, megabytes=round(num_bytes / 1e6, 1), largest_tensor_mib=round(largest / 2**20), ways=results
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="1B")
    parser.add_argument("--save", action="store_true", help="append to tests/bench/results/")
    parser.add_argument("--of", choices=WAYS, help="one way, in this process")
    parser.add_argument("--root", type=Path, help="folder for --of")
    arguments = parser.parse_args()
    if arguments.of:
        print(json.dumps(convert(arguments.of, arguments.root)))
        return
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    entry = dict(date=date, commit=commit(), machine=machine(1)) | measure(arguments.shape)
    if arguments.save:
        append("convert", [entry])


if __name__ == "__main__":
    main()
