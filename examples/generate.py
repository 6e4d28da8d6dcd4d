"""Text from a training checkpoint.

    python examples/generate.py --checkpoint runs/mine --prompt "The server" --max-new-tokens 60

Every token runs the whole model over the text so far: right at any length, and meant to look at a model. For serving,
convert with tools.convert.megatron_to_hf. --temperature 0 takes the most likely token. Ends with 2 for wrong arguments.
"""

import argparse
import logging
import math
import sys
from pathlib import Path

if __name__ == "__main__":
    from megatron_gdn.interrupt import end_in_one_line

    end_in_one_line()

import torch
from torch import Tensor

from megatron_gdn.config import ConfigError
from megatron_gdn.training.inference import inference_config, load_model
from megatron_gdn.training.restricted import UnsafeCheckpointError
from megatron_gdn.training.setup import Launch, choose_device, ignore_host_warnings, init_distributed, shutdown
from megatron_gdn.training.tokenizer import tokenizer_beside
from tools.convert.checkpoint import MegatronCheckpoint
from tools.convert.errors import ConvertError
from tools.preprocess.libraries import load_tokenizer
from tools.preprocess.sources import ArgumentError


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    eod_id: int | None,
    temperature: float,
    top_k: int,
    seed: int,
) -> Tensor:
    """Continue `[n]` token ids; stops after `eod_id`.

    Args:
        model: a GPTModel.
        tokens: of the prompt, at least one.
        max_new_tokens: most to add.
        eod_id: id that ends a document, or None.
        temperature: divides the logits; 0 takes the largest.
        top_k: choose among this many; 0 among all.
        seed: of the choice.
    """
    rng = torch.Generator(tokens.device).manual_seed(seed)
    for _ in range(max_new_tokens):
        positions = torch.arange(len(tokens), device=tokens.device)
        logits = model(tokens[None], positions[None], None)[0, -1].float()
        if temperature == 0:
            choice = logits.argmax()
        else:
            values, ids = logits.topk(min(top_k, len(logits))) if top_k else (logits, None)
            drawn = torch.multinomial((values / temperature).softmax(-1), 1, generator=rng)[0]
            choice = drawn if ids is None else ids[drawn]
        tokens = torch.cat([tokens, choice[None]])
        if eod_id is not None and int(choice) == eod_id:
            break
    return tokens


def main(argv: list[str] | None = None) -> int:
    """Run the script; 2 for arguments that cannot work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="step folder, checkpoints folder, or folder of a run")
    add("--tokenizer", type=Path, help="folder with tokenizer.json; default: the one beside the checkpoint")
    add("--prompt", required=True, help="text to continue")
    add("--max-new-tokens", type=int, default=64, help="most tokens to add; an end of document stops before")
    add("--temperature", type=float, default=0.8, help="divides the logits; 0 takes the likeliest token")
    add("--top-k", type=int, default=40, help="choose among this many tokens; 0 among all")
    add("--seed", type=int, default=0, help="of the choice")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    try:
        checkpoint = MegatronCheckpoint(arguments.checkpoint)
        folder = arguments.tokenizer or tokenizer_beside(checkpoint.path)
        if arguments.tokenizer is None and not folder.is_dir():
            raise ArgumentError(
                f"--tokenizer is required: there is none in {folder}, where training puts it with data.tokenizer."
            )
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode(arguments.prompt, add_special_tokens=False).ids
        if not ids:
            raise ArgumentError(f"--prompt ({arguments.prompt!r}) must hold at least one token: write some text.")
        if not 0 <= arguments.temperature < math.inf or arguments.top_k < 0 or arguments.max_new_tokens < 1:
            raise ArgumentError("--temperature and --top-k must be at least 0, --max-new-tokens at least 1.")
        if not 0 <= arguments.seed < 2**63:
            raise ArgumentError(f"--seed ({arguments.seed}) must be from 0 to 2**63 - 1.")
        if max(ids) >= checkpoint.vocab_size:
            raise ArgumentError(
                f"--tokenizer ({folder}) has ids up to {max(ids)} and the model {checkpoint.vocab_size}: "
                "give the one that made its data."
            )
        config = inference_config(
            checkpoint.model,
            sequence_length=checkpoint.sequence_length,
            dtype=checkpoint.weights_dtype,
            device=arguments.device,
        )
        ignore_host_warnings()
        device = choose_device(config, Launch(rank=0, world_size=1, local_rank=0))
    except (ArgumentError, ConfigError, ConvertError, UnsafeCheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from megatron_gdn.training.checkpoint import CheckpointError  # imports Megatron-Core, which takes seconds

    init_distributed(config, Launch(rank=0, world_size=1, local_rank=0), device)
    try:
        tokens = generate(
            load_model(checkpoint.path, config, vocab_size=checkpoint.vocab_size, device=device),
            torch.tensor(ids, device=device),
            max_new_tokens=arguments.max_new_tokens,
            eod_id=checkpoint.eod_id,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            seed=arguments.seed,
        )
    except (CheckpointError, UnsafeCheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        shutdown()
    print(tokenizer.decode(tokens.tolist(), skip_special_tokens=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
