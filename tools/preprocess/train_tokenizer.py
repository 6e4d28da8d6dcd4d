"""Train a byte-level BPE tokenizer.

python -m tools.preprocess.train_tokenizer --input 'corpus/*.jsonl' --output tokenizer --vocab-size 32000
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    from megatron_gdn.interrupt import end_in_one_line

    end_in_one_line()

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.preprocess.readers import DamagedError, UnitReader
from tools.preprocess.sources import FORMATS, ArgumentError, InputError, Source, Unit, find_sources

END_OF_DOCUMENT, PADDING = "<|endoftext|>", "<|pad|>"
_MAX_DOCUMENT_BYTES = 2**27


def train(sources: list[Source], *, text_key: str, vocab_size: int, tar_field: str = "txt") -> Tokenizer:
    """Byte-level BPE without normalisation, so every text comes back exactly; deterministic.

    Args:
        sources: from `find_sources`.
        text_key: key of the text in JSON, column of parquet files.
        tar_field: of a WebDataset sample that holds the text; "json" takes `text_key` of it.
        vocab_size: ids, with the 256 bytes and two special tokens; a small corpus gives fewer.

    Raises:
        InputError: a record without usable text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(_texts(sources, text_key, tar_field), trainer)
    return tokenizer


def _texts(sources: list[Source], text_key: str, tar_field: str) -> Iterator[str]:
    for source in sources:
        unit = Unit(source=source, start=0, end=source.num_bytes)
        try:
            for batch in UnitReader(
                unit, text_key=text_key, tar_field=tar_field, max_document_bytes=_MAX_DOCUMENT_BYTES
            ):
                if batch.problems:
                    kind, number, message = batch.problems[0]
                    if kind == "too_long":  # the reader's message names an option of tokenize_corpus
                        message = f"longer than {_MAX_DOCUMENT_BYTES / 1e6:g} MB: cut it into documents."
                    raise InputError(f"{source.place(number)}: {message}")
                yield from batch.texts
        except DamagedError as error:
            raise InputError(f"{source.path}{error}: the file is cut or broken: fetch it again.") from error


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a Hugging Face tokenizer folder; tokenizer.json comes last and whole."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "pad_token": PADDING,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    aside = folder / ".tokenizer.json.writing"
    tokenizer.save(str(aside))
    os.replace(aside, folder / "tokenizer.json")


def main(argv: list[str] | None = None) -> int:
    """Run the script; 1 for data that cannot be used, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help=f"files or patterns: {FORMATS}")
    parser.add_argument("--output", type=Path, required=True, help="folder of the tokenizer, in Hugging Face's form")
    parser.add_argument("--vocab-size", type=int, required=True, help="ids, at least 258")
    parser.add_argument("--text-key", default="text", help="key of the text in JSON lines, column of parquet files")
    parser.add_argument("--tar-field", default="txt", help="of each tar sample: its text, or json with --text-key")
    arguments = parser.parse_args(argv)
    try:
        if arguments.vocab_size < 258:
            raise ArgumentError(
                f"--vocab-size ({arguments.vocab_size}) must be at least 258: 256 bytes, 2 special tokens."
            )
        if arguments.output.exists() and not arguments.output.is_dir():
            raise ArgumentError(f"--output ({arguments.output}) must be a folder: name another.")
        parent = next(path for path in (arguments.output.absolute() / "_").parents if path.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            raise ArgumentError(f"--output ({arguments.output}) cannot be made in {parent}: name another folder.")
        tokenizer = train(
            find_sources(arguments.input),
            text_key=arguments.text_key,
            vocab_size=arguments.vocab_size,
            tar_field=arguments.tar_field,
        )
        save(tokenizer, arguments.output)
    except (ArgumentError, InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    size = tokenizer.get_vocab_size()
    few = f"; the text has no more of the {arguments.vocab_size} asked for" if size < arguments.vocab_size else ""
    print(f"{arguments.output}: {size} ids{few}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
