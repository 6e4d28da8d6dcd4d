"""Which settings of a Hugging Face `config.json` a format reads, and which it may meet without reading them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tools.convert.errors import ConvertError

HfConfig = dict[str, Any]

# Of every model: read by the converter itself, or of training, tokens and file formats only.
_OF_EVERY_MODEL = {
    *("architectures", "model_type", "vocab_size", "tie_word_embeddings", "max_position_embeddings", "dtype"),
    *("torch_dtype", "transformers_version", "use_cache", "initializer_range", "bos_token_id", "eos_token_id"),
    *("pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id", "tokenizer_class", "return_dict"),
    *("output_hidden_states", "output_attentions", "torchscript", "use_bfloat16", "chunk_size_feed_forward"),
    *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "prefix", "pruned_heads"),
    *("is_decoder", "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder"),
    *("attention_dropout", "tf_legacy_loss", "remove_invalid_values", "exponential_decay_length_penalty"),
    # Of generation, which transformers 4 kept here.
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "forced_bos_token_id"),
    *("forced_eos_token_id", "return_dict_in_generate", "suppress_tokens", "begin_suppress_tokens"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a format.

    used: those that `read_config` reads.
    only: those that must have one of these values where they are there, because this project has no other.
    without_effect: those that change nothing of what the model computes.
    """

    used: Collection[str]
    only: Mapping[str, Collection[Any]]
    without_effect: Collection[str] = field(default_factory=tuple)

    def check(self, config: HfConfig, ignored: Collection[str] = ()) -> None:
        """Raise ConvertError for a setting that this project has no equal of, and for one that nobody knows.

        Args:
            config: what `config.json` holds.
            ignored: names that the user takes the responsibility for.
        """
        for name, possible in self.only.items():
            value = config.get(name, possible[0])
            unset = value is None and not possible[0]  # as false as false
            if name not in ignored and value not in possible and not unset:
                values = " or ".join(str(found) for found in possible)
                raise ConvertError(f"{name} ({value}) must be {values}: this project has no equal of it.")
        known = _OF_EVERY_MODEL | {*self.used, *self.only, *self.without_effect, *ignored}
        if unknown := sorted(name for name in config if name not in known and not name.startswith("_")):
            named = ", ".join(f"{name} ({config[name]})" for name in unknown)
            raise ConvertError(
                f"config.json has settings that no version of this format has: {named}. They may change the model; "
                f"--ignore-setting {unknown[0]} if this one does not."
            )
