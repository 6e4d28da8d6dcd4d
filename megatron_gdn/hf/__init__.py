"""This project's own transformers model, for layouts that no public format holds, such as H2 and mixed windows.

    import megatron_gdn.hf
    model = AutoModelForCausalLM.from_pretrained("runs/mine/hf")

Importing it registers `MegatronGDNConfig` and `MegatronGDNForCausalLM` with the Auto classes. It needs transformers,
and no Megatron, Triton (on a CPU) or flash-linear-attention.
"""

from megatron_gdn.optional import require

require("transformers", extra="convert", purpose="megatron_gdn.hf")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402 - behind the guard

from megatron_gdn.hf.configuration import MegatronGDNConfig  # noqa: E402
from megatron_gdn.hf.modeling import HybridCache, MegatronGDNForCausalLM  # noqa: E402

AutoConfig.register(MegatronGDNConfig.model_type, MegatronGDNConfig)
AutoModelForCausalLM.register(MegatronGDNConfig, MegatronGDNForCausalLM)

__all__ = ["HybridCache", "MegatronGDNConfig", "MegatronGDNForCausalLM"]
