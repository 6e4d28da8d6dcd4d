"""Tokenizers and engines: ids equal to each library's own, and a fast engine only where it gives the same ids."""

import base64
import json
from pathlib import Path

import numpy as np
import psutil
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.tools.test_tokenize_corpus import changed_tokenizer
from tests.tools.texts import TEXTS, dataset_bytes, json_lines, manifest_of, tokenize
from tools.preprocess import inspect_dataset, shards, tokenize_corpus
from tools.preprocess.characters import AlikeCharacters, byte_letters
from tools.preprocess.difficult_texts import difficult_texts
from tools.preprocess.encode import Gigatoken, SpecialTokens, choose_engine
from tools.preprocess.libraries import open_tokenizer

# Llama 3's and GPT-4's, which many tokenizers use.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|eot|>"]


def ids_of(prefix) -> list[int]:
    return np.fromfile(f"{prefix}.bin", manifest_of(prefix)["dtype"]).tolist()


@pytest.fixture(scope="module")
def llama3_like(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama3")
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>", "<|eot|>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("[tool]", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> Path:
    """As Llama 2's: BPE, byte fallback, digits apart, a space before the text."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text").write_text("\n".join(" ".join(text.split()) for text in TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=500, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=True, character_coverage=0.999, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def tiktoken_folder(llama3_like, tmp_path_factory) -> Path:
    """The vocabulary of the Hugging Face tokenizer as a rank file."""
    folder = tmp_path_factory.mktemp("tiktoken")
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    vocabulary = json.loads((llama3_like / "tokenizer.json").read_text())["model"]["vocab"]
    plain = {token: i for token, i in vocabulary.items() if not token.startswith("<|")}
    ranks = sorted((i, bytes(letters[letter] for letter in token)) for token, i in plain.items())
    (folder / "x.tiktoken").write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % (i - 2) for i, token in ranks))
    settings = {"ranks": "x.tiktoken", "pattern": PATTERN, "special_tokens": {"<|endoftext|>": 600}}
    (folder / "tiktoken.json").write_text(json.dumps(settings))
    return folder


def test_characters_of_new_unicode_versions(llama3_like, tmp_path):
    """gigatoken 0.10 and tokenizers 0.23 know different versions of Unicode, so they split U+A7CF differently, which a
    vocabulary that has it with a quote before it shows."""
    tokenizer = Tokenizer.from_file(str(llama3_like / "tokenizer.json"))
    texts = [f'x "{chr(c)} ({chr(c)}a{chr(c)}" 1{chr(c)}' for c in range(0xA7C0, 0xA7FF)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), min_frequency=1
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    reference = open_tokenizer(str(tmp_path))
    found = Gigatoken(reference).encode([*texts, "plain"])
    assert [list(ids) for ids in found] == [tokenizer.encode(text).ids for text in [*texts, "plain"]]


def test_cache_of_the_fast_engine_is_bounded(tokenizer):
    """New words for ever, as the web has them; without a limit they take a gigabyte here."""
    engine = Gigatoken(open_tokenizer(str(tokenizer)))
    generator, process, peak = np.random.default_rng(0), psutil.Process(), 0
    before = process.memory_info().rss
    for _ in range(8):
        words = generator.integers(97, 123, (400_000, 9), dtype=np.uint8)
        words[:, 0] = 32
        engine.encode([words.tobytes().decode()])
        peak = max(peak, process.memory_info().rss)
    assert (peak - before) / 1e6 < 180


def test_gigatoken_equals_tokenizers(tokenizer, llama3_like):
    for folder in (tokenizer, llama3_like):
        reference = open_tokenizer(str(folder))
        texts = TEXTS + difficult_texts(reference.added_tokens)
        expected = [reference.model.encode(text, add_special_tokens=False).ids for text in texts]
        found = Gigatoken(reference).encode(texts)
        assert [list(ids) for ids in found] == expected
        assert choose_engine(reference, "auto", TEXTS)[0] == "gigatoken"


@pytest.mark.parametrize("kind", ["llama3_like", "sentencepiece_model", "tiktoken_folder"])
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_datasets_hold_the_ids_of_the_library(kind, engine, tmp_path, request):
    folder = request.getfixturevalue(kind)
    texts = TEXTS + [text for text in difficult_texts([]) if text.strip()][:150]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    assert tokenize(tmp_path / "a.jsonl", folder, tmp_path / "out", "--engine", engine) == 0
    if kind == "sentencepiece_model":
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        expected = [[*model.encode(text), model.eos_id()] for text in texts]
    elif kind == "tiktoken_folder":
        model = open_tokenizer(str(folder)).model
        expected = [[*model.encode_ordinary(text), 600] for text in texts]
        huggingface = Tokenizer.from_file(str(request.getfixturevalue("llama3_like") / "tokenizer.json"))
        assert [i + 2 for i in expected[0][:-1]] == huggingface.encode(texts[0]).ids
    else:
        model = Tokenizer.from_file(str(folder / "tokenizer.json"))
        expected = [[*model.encode(text).ids, 0] for text in texts]
    assert ids_of(tmp_path / "out") == sum(expected, [])
    if engine == "auto":
        chosen = {"llama3_like": "gigatoken", "tiktoken_folder": "tiktoken"}
        assert manifest_of(tmp_path / "out")["engine"].split()[0] == chosen.get(kind, "gigatoken")


@pytest.mark.parametrize("kind", ["llama3_like", "sentencepiece_model", "tiktoken_folder"])
def test_documents_are_shown_again(kind, tmp_path, request, capsys):
    folder = request.getfixturevalue(kind)
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS[3:6]))
    assert tokenize(tmp_path / "a.jsonl", folder, tmp_path / "out") == 0
    assert inspect_dataset.main([str(tmp_path / "out"), "--tokenizer", str(folder), "--verify"]) == 0
    printed = capsys.readouterr().out
    end = "</s>" if kind == "sentencepiece_model" else "<|endoftext|>"
    for text in TEXTS[3:6]:
        assert f"\n{text}{end}\n" in printed


def test_special_tokens_of_sentencepiece(sentencepiece_model, tmp_path, capsys):
    """SentencePiece reads "</s>" as text, and a fast engine must not read it as the end."""
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one", "a</s>b", "three"]))
    model = sentencepiece_model / "tokenizer.model"
    assert tokenize(tmp_path / "a.jsonl", model, tmp_path / "out") == 1
    assert "line 2: the text contains the special token </s>" in capsys.readouterr().err
    for engine in ("auto", "reference"):
        options = ["--special-in-text", "escape", "--engine", engine]
        assert tokenize(tmp_path / "a.jsonl", model, tmp_path / engine, *options) == 0
        assert ids_of(tmp_path / engine).count(2) == 3
    assert dataset_bytes(tmp_path / "auto") == dataset_bytes(tmp_path / "reference")
    assert tokenize(tmp_path / "a.jsonl", model, tmp_path / "out", "--special-in-text", "allow") == 2
    assert "SentencePiece never reads special tokens" in capsys.readouterr().err


def test_special_tokens_of_tiktoken(tiktoken_folder, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one", "a<|endoftext|>b"]))
    for policy, ends in (("escape", 2), ("allow", 3)):
        options = ["--special-in-text", policy]
        assert tokenize(tmp_path / "a.jsonl", tiktoken_folder, tmp_path / policy, *options) == 0
        assert ids_of(tmp_path / policy).count(600) == ends


def single_word(settings):
    """An added token that counts only between word boundaries; gigatoken finds it inside words too."""
    settings["added_tokens"].append(
        {"id": 400, "content": "over", "single_word": True, "lstrip": False, "rstrip": False, "normalized": False,
         "special": False}
    )  # fmt: skip


def lower_case(settings):
    """A normalizer that gigatoken does not have."""
    settings["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize("change", [single_word, lower_case])
def test_engine_that_differs_or_refuses_is_not_used(corpus, tokenizer, tmp_path, capsys, change):
    other = changed_tokenizer(tokenizer, tmp_path / "tokenizer", change)
    assert tokenize(corpus, other, tmp_path / "out") == 0
    why = "other ids than tokenizers for" if change is single_word else "it refuses this tokenizer"
    assert f"(gigatoken: {why}" in capsys.readouterr().out
    assert manifest_of(tmp_path / "out")["engine"].startswith("tokenizers ")
    model = Tokenizer.from_file(str(other / "tokenizer.json"))
    assert ids_of(tmp_path / "out") == sum(([*model.encode(text).ids, 0] for text in TEXTS), [])
    assert tokenize(corpus, other, tmp_path / "out", "--engine", "gigatoken") == 2
    assert f"error: --engine gigatoken: {why}" in capsys.readouterr().err


def test_missing_engine(corpus, tokenizer, dataset, tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert tokenize(corpus, tokenizer, tmp_path / "out") == 0
    assert "engine: tokenizers" in capsys.readouterr().out
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(dataset)
    assert tokenize(corpus, tokenizer, tmp_path / "out", "--engine", "gigatoken") == 2
    assert "gigatoken is needed for --engine gigatoken and is not installed" in capsys.readouterr().err


def test_engine_that_errs_later_is_caught(corpus, tokenizer, tmp_path, capsys, monkeypatch):
    """The beginning of a text in every few MB is compared with the reference during the whole run."""

    class Wrong(Gigatoken):
        def encode(self, texts):
            return [np.where(ids == ids[0], 5, ids) for ids in super().encode(texts)]

    monkeypatch.setattr(shards, "Gigatoken", Wrong)
    shards._encoder.cache_clear()
    assert tokenize(corpus, tokenizer, tmp_path / "out") == 1
    shards._encoder.cache_clear()
    assert "gigatoken gives other ids than tokenizers for the text that begins" in capsys.readouterr().err
    assert not (tmp_path / "out.bin").exists()


def test_tokenizer_that_changes_meanwhile(corpus, tokenizer, tmp_path, capsys, monkeypatch):
    """Between the main process, which writes its hash, and one that tokenizes with it."""
    other = changed_tokenizer(tokenizer, tmp_path / "tokenizer", lambda settings: None)

    def choose(*arguments):
        (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
        return choose_engine(*arguments)

    monkeypatch.setattr(tokenize_corpus, "choose_engine", choose)
    assert tokenize(corpus, other, tmp_path / "out") == 1
    assert f"{other} changed while it was used: start again" in capsys.readouterr().err
    assert not (tmp_path / "out.bin").exists()


def test_special_tokens_are_found_as_by_search():
    for tokens in (["<|a|>", "<|b|>", "</s>", "[x]", "Z"], ["<|a|>", "<|b|>"], ["</s>", "<s>"], ["Z"], []):
        finder = SpecialTokens(tokens)
        for text in ("", "<|", "a <|b|> c", "</s", "x</s>", "[x", "[x]", "plain", "Zebra", "<|a|b|>"):
            assert (finder.find(text) is not None) == any(token in text for token in tokens), text


def test_wrong_tiktoken_folder(corpus, tmp_path, capsys):
    (tmp_path / "tiktoken.json").write_text('{"ranks": "none.tiktoken", "pattern": "x", "special_tokens": {}}')
    assert tokenize(corpus, tmp_path, tmp_path / "out") == 2
    assert "is no encoding of tiktoken" in capsys.readouterr().err
    (tmp_path / "bad.model").write_bytes(b"\x00nothing")
    assert tokenize(corpus, tmp_path / "bad.model", tmp_path / "out") == 2
    assert "bad.model cannot be read as a SentencePiece model" in capsys.readouterr().err


def test_engine_that_splits_at_other_characters(tokenizer):
    """One that differs at a letter of ASCII is refused, at another character its texts are told apart."""
    settings = open_tokenizer(str(tokenizer)).split_settings()

    def reference(_):
        return lambda text: [ord(letter) for letter in text]

    def engine_that_differs_at(character):
        return lambda _: lambda text: [ord(c) + (c == character) for c in text]

    characters = AlikeCharacters(settings, reference, engine_that_differs_at("\u00e9"))
    texts = ["plain", *(text.encode() for text in ("caf\u00e9", "na\u00efve", "\u00e9", "\u4f60")), ""]
    assert characters.others(texts) == characters.others(texts) == [1, 3]
    # Also in a group of characters that were not seen before, and texts with what is known and what is not.
    assert characters.others(["".join(map(chr, range(0xC0, 0x300))).encode(), "\u00eb\u4f60\u00ea".encode()]) == [0]
    with pytest.raises(ValueError, match=r"it splits text at \['q'\] in another way"):
        AlikeCharacters(settings, reference, engine_that_differs_at("q"))
