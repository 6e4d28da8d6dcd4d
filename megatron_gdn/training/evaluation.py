"""What a trained model knows: loss at several lengths, and single needles in a haystack (S-NIAH of RULER).

    task  haystack                               needle
    1     one sentence of noise, over and over   a number of seven digits
    2     text                                   a number of seven digits
    3     text                                   a UUID

The tasks are those of arXiv 2404.06654, which the paper's table 2 reports; a sample is right when greedy decoding gives
the whole needle. That is read off one pass over prompt and needle: every token of the needle must be the likeliest.
"""

import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TASKS = (1, 2, 3)
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
_HEAD = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
_QUESTION = (
    "\nWhat is the special magic {kind} for {key} mentioned in the provided text? "
    "The special magic {kind} for {key} mentioned in the provided text is"
)
_KEYS = ("lantern", "harbor", "violet", "meadow", "copper", "falcon", "orchard", "winter")

Encode = Callable[[str], list[int]]


@torch.no_grad()
def loss_at_length(
    model: torch.nn.Module, tokens: np.ndarray, length: int, *, batch_size: int, device: torch.device
) -> float:
    """Nats per token over the stretches of a text, each read from its start.

    Args:
        model: a GPTModel.
        tokens: `[n]`, more than `length`; what fills no whole stretch is left out.
        length: tokens of a stretch.
        batch_size: stretches of one pass.
        device: of the model.

    Raises:
        ValueError: too few tokens.
    """
    count = (len(tokens) - 1) // length
    if count == 0:
        raise ValueError(f"the text has {len(tokens)} tokens and a length of {length} needs {length + 1}.")
    total = 0.0
    for first in range(0, count, batch_size):
        size = min(batch_size, count - first)
        part = torch.from_numpy(tokens[first * length : (first + size) * length + 1].astype(np.int64)).to(device)
        inputs, labels = part[:-1].view(size, length), part[1:].view(size, length)
        positions = torch.arange(length, device=device).expand(size, -1)
        total += model(inputs, positions, None, labels=labels).double().sum().item()
    return total / (count * length)


@dataclass(frozen=True, kw_only=True)
class NeedleSample:
    """A prompt, and what must follow it; token ids."""

    prompt: list[int]
    needle: list[int]


def needle_samples(
    task: int, length: int, count: int, *, encode: Encode, text: str | None, seed: int
) -> Iterator[NeedleSample]:
    """Samples whose prompt and needle fill up to `length` tokens.

    Args:
        task: one of `TASKS`.
        length: most tokens of prompt and needle.
        count: samples.
        encode: text to token ids, without special tokens.
        text: haystack of tasks 2 and 3; each sample takes another stretch of it.
        seed: of needles, places and stretches.

    Raises:
        ValueError: an unknown task, no text, too little of it, or a length that holds no haystack.
    """
    if task not in TASKS:
        raise ValueError(f"task ({task}) must be one of {', '.join(map(str, TASKS))}.")
    if task != 1 and not text:
        raise ValueError(f"task {task} needs a text to hide needles in.")
    sentences = [
        part.strip() for part in (_NOISE if task == 1 else text).replace("\n", " ").split(". ") if part.strip()
    ]
    for i in range(count):
        yield _sample(task, length, sentences, encode, random.Random(f"{seed}/{task}/{length}/{i}"))


def _sample(task: int, length: int, sentences: Sequence[str], encode: Encode, rng: random.Random) -> NeedleSample:
    kind = "uuid" if task == 3 else "number"
    value = str(uuid.UUID(int=rng.getrandbits(128))) if task == 3 else str(rng.randrange(10**6, 10**7))
    key, place, start = rng.choice(_KEYS), rng.random(), rng.randrange(len(sentences))
    needle = encode(f" {value}")

    def prompt(size: int) -> list[int]:
        hay = [sentences[(start + i) % len(sentences)].rstrip(".") + "." for i in range(size)]
        hay.insert(round(place * size), _NEEDLE.format(kind=kind, key=key, value=value))
        return encode(_HEAD.format(kind=kind) + " ".join(hay) + _QUESTION.format(kind=kind, key=key))

    low, high = 0, 1
    while len(prompt(high)) + len(needle) <= length:
        low, high = high, 2 * high
        if task != 1 and low > len(sentences):
            raise ValueError(f"the text has {len(sentences)} sentences, too few for {length} tokens: give more text.")
    while high - low > 1:  # prompt(low) fits, prompt(high) does not
        middle = (low + high) // 2
        low, high = (middle, high) if len(prompt(middle)) + len(needle) <= length else (low, middle)
    if low == 0:
        raise ValueError(f"length ({length}) holds no haystack beside needle and question ({len(prompt(0))} tokens).")
    return NeedleSample(prompt=prompt(low), needle=needle)


@torch.no_grad()
def finds_needle(model: torch.nn.Module, sample: NeedleSample, *, device: torch.device) -> bool:
    """Whether greedy decoding continues the prompt with the whole needle.

    Args:
        model: a GPTModel.
        sample: from `needle_samples`.
        device: of the model.
    """
    tokens = torch.tensor(sample.prompt + sample.needle[:-1], device=device)
    logits: Tensor = model(tokens[None], torch.arange(len(tokens), device=device)[None], None)
    likeliest = logits[0, len(sample.prompt) - 1 :].argmax(-1)
    return likeliest.tolist() == sample.needle
