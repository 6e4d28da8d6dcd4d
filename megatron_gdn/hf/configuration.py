"""The configuration of the transformers model: the `model` section of the recipe it was trained with."""

from typing import Any

from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedConfig

from megatron_gdn.config import ModelConfig
from megatron_gdn.hybrid.pattern import parse_pattern


class MegatronGDNConfig(PreTrainedConfig):
    """Configuration of `MegatronGDNForCausalLM`.

    Args:
        model: fields of `megatron_gdn.config.ModelConfig`; None for a configuration without a model, which transformers
            makes to compare with.
        vocab_size: rows of the embedding, without what training pads them to.
        kwargs: transformers' own, such as eos_token_id.

    Raises:
        ValueError: an unknown or a wrong field of `model`.
    """

    model_type = "megatron_gdn"

    def __init__(self, model: dict[str, Any] | None = None, vocab_size: int = 0, **kwargs):
        self.model, self.vocab_size = model, vocab_size
        if model is not None:
            settings = self.settings
            self.hidden_size = settings.hidden_size
            self.num_hidden_layers = len(parse_pattern(settings.pattern))
            kwargs.setdefault("tie_word_embeddings", settings.tie_embeddings)
        super().__init__(**kwargs)

    @property
    def settings(self) -> ModelConfig:
        """The `model` section, checked."""
        try:
            return TypeAdapter(ModelConfig).validate_python(self.model)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ValueError(f"model of config.json cannot be used: {problems}.") from None
