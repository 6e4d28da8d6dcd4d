"""Checkpoints of Megatron-Core's own Gated DeltaNet: read here, and written here for it to read."""

import argparse
import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.gdn_layer import l2norm_in_torch, replace_in_megatrons_layer
from tests.ranks import pool
from tests.tools import checkpoints
from tools.convert import hf_to_megatron, megatron_to_hf, verify
from tools.convert.errors import ConvertError
from tools.convert.megatron_lm import architecture_of_args, args_of_architecture, read_args

TOKENS = 130
ARGS = dict(
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    group_query_attention=True,
    num_query_groups=2,
    kv_channels=16,
    experimental_attention_variant="gated_delta_net",
    linear_attention_freq=3,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    linear_conv_kernel_dim=4,
    attention_output_gate=True,
    qk_layernorm=True,
    rotary_percent=0.25,
    rotary_base=5000,
    normalization="RMSNorm",
    apply_layernorm_1p=True,
    norm_epsilon=1e-5,
    swiglu=True,
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
    vocab_size=checkpoints.VOCABULARY,
    max_position_embeddings=128,
    params_dtype=torch.float32,
)


def tokens() -> torch.Tensor:
    return torch.randint(checkpoints.VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def host_model():
    """GPTModel of Megatron's own layers and its own Gated DeltaNet."""
    import megatron.core.ssm.gated_delta_net as gdn
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    from megatron_gdn.norms import ZeroCenteredRMSNorm

    # Without fla it refuses to build; its deterministic mode then uses its own PyTorch code.
    replace_in_megatrons_layer(HAVE_FLA=True, l2norm=l2norm_in_torch)
    names = [name for name in ARGS if name.startswith(("linear_num", "linear_key", "linear_value", "linear_conv"))]
    config = TransformerConfig(
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        **{name: ARGS[name] for name in names},
        experimental_attention_variant="gated_delta_net",
        linear_attention_freq=3,
        attention_output_gate=True,
        qk_layernorm=True,
        layernorm_epsilon=1e-5,
        layernorm_zero_centered_gamma=True,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=0.2,
        use_cpu_initialization=True,
        deterministic_mode=True,
        hetereogenous_dist_checkpoint=True,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
    )

    def layer(mixer: ModuleSpec, linear: str) -> ModuleSpec:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        return ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=ZeroCenteredRMSNorm,
                self_attention=mixer,
                self_attn_bda=get_bias_dropout_add,
                pre_mlp_layernorm=ZeroCenteredRMSNorm,
                mlp=ModuleSpec(module=MLP, submodules=linears),
                mlp_bda=get_bias_dropout_add,
                # The names of Transformer Engine's fused norms, as Megatron's local spec stores them.
                sharded_state_dict_keys_map={
                    "input_layernorm.": f"self_attention.{linear}.layer_norm_",
                    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
                },
            ),
        )

    rule = ModuleSpec(
        module=gdn.GatedDeltaNet,
        submodules=gdn.GatedDeltaNetSubmodules(ColumnParallelLinear, ZeroCenteredRMSNorm, RowParallelLinear),
    )
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=DotProductAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=ZeroCenteredRMSNorm,
            k_layernorm=ZeroCenteredRMSNorm,
        ),
    )
    layers = [layer(rule, "in_proj"), layer(rule, "in_proj"), layer(attention, "linear_qkv")]
    return GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=layers, layer_norm=ZeroCenteredRMSNorm),
        vocab_size=checkpoints.PADDED,
        max_sequence_length=TOKENS,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_percent=0.25,
        rotary_base=5000,
    ).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    found = model(tokens(), torch.arange(TOKENS)[None], torch.ones(1, 1, TOKENS, TOKENS).triu(1).bool())
    return found[..., : checkpoints.VOCABULARY]


def written(folder: Path, common_object: bool = False):
    """Megatron's layout of folders and arguments, these in common.pt or in an object; the logits of the model."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megatron_gdn.training import torch_dist

    model = host_model()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() == 1:
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                param.add_(torch.rand(param.shape, generator=generator) - 0.5)
    (folder / "iter_0000007").mkdir(parents=True)
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    common = {"args": argparse.Namespace(**ARGS), "iteration": 7}
    if common_object:
        common = {"common": ShardedObject("common_state", common, (1,), (0,))}
    torch_dist.write(model.sharded_state_dict(metadata=groups) | common, folder / "iter_0000007")
    if common_object:
        (folder / "iter_0000007/common.pt").unlink()
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return logits(model)


def loaded(folder: Path):
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing import load

    model = host_model()
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    found = load(model.sharded_state_dict(metadata=groups), str(folder))
    assert found.pop("args").linear_attention_freq == [1, 1, 0]
    del found["iteration"], found["checkpoint_version"]
    model.load_state_dict(found)
    return logits(model)


@pytest.mark.parametrize("wanted, release", [("qwen3_next", "0.16"), ("qwen3_5_text", "0.16"), ("qwen3_next", "0.19")])
def test_checkpoint_of_megatrons_own_layer(tmp_path, wanted, release, capsys):
    [theirs] = pool(1).run(written, tmp_path / "megatron", common_object=release == "0.19", groups={})
    folder = tmp_path / "hf"
    arguments = ["--checkpoint", str(tmp_path / "megatron"), "--output", str(folder), "--format", wanted]
    assert megatron_to_hf.main(arguments) == 0
    *_, found = verify.transformers_hidden_states(folder, wanted, tokens())
    assert theirs.std() > 0.1
    assert (found - theirs).abs().max() < 1e-4  # two programs in float32
    assert verify.main([str(tmp_path / "megatron"), str(folder)]) == 0


def test_megatrons_own_layer_reads_what_is_written_for_it(tmp_path):
    described = checkpoints.architecture(checkpoints.QWEN)
    ours = checkpoints.write(tmp_path / "ours", described, checkpoints.random_weights(described))
    arguments = ["--checkpoint", str(ours), "--output", str(tmp_path / "hf"), "--format", "qwen3_next"]
    assert megatron_to_hf.main(arguments) == 0
    arguments = ["--hf", str(tmp_path / "hf"), "--output", str(tmp_path / "megatron"), "--for", "megatron_lm"]
    assert hf_to_megatron.main(arguments) == 0
    # The vocabulary of the file is not padded, that of the model is; Megatron's default strictness.
    [found] = pool(1).run(loaded, tmp_path / "megatron" / "release", groups={})
    *_, theirs = verify.transformers_hidden_states(tmp_path / "hf", "qwen3_next", tokens())
    assert (found - theirs).abs().max() < 1e-4 * theirs.abs().max()  # two programs in float32


class _Member:
    """A member of an enumeration as Python 3.11.0 to 3.11.3 write it."""

    def __reduce__(self):
        from megatron.core.transformer.enums import AttnBackend

        return getattr, (AttnBackend, "flash")


def test_arguments_that_an_early_python_3_11_wrote(tmp_path):
    torch.save({"args": argparse.Namespace(num_layers=3, attention_backend=_Member())}, tmp_path / "common.pt")
    found = read_args((tmp_path / "common.pt").read_bytes(), tmp_path / "common.pt")
    assert found == {"num_layers": 3}  # what is no plain value is not there


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_layers=10**30), r"num_layers \(10+\) must be a whole number from 1 to 10000"),
        (dict(num_layers="3"), r"num_layers \(3\) must be a whole number"),
        (dict(num_layers=0), "(?s)describe a model that cannot be built: .*pattern"),
        (dict(num_experts=10**9), r"num_experts \(10+\) must be a whole number from 1 to 10000"),
        (dict(linear_attention_freq=0), "describe a model that cannot be built"),
        (dict(linear_attention_freq="x"), "a list of layers|describe a model that cannot be built"),
        (dict(window_size=7), "describe a model that cannot be built"),
        (dict(window_size=["x", 0]), "describe a model that cannot be built"),
        (dict(spec=1), r"spec \(1 \) must be megatron_gdn.hybrid.layer_specs with one of gdn, "),
        (dict(spec=["megatron_gdn.hybrid.layer_specs", ["gdn"]]), "must be megatron_gdn.hybrid.layer_specs with one"),
    ],
)
def test_damaged_arguments_are_refused(change, message):
    with pytest.raises(ConvertError, match=message):
        architecture_of_args(ARGS | change)


def null_tokenizer(**options) -> tuple[dict, int, int]:
    """Arguments of this Megatron-Core for its tokenizer without a file, the tokenizer's size and end of a document."""
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    args = {"vocab_size": checkpoints.VOCABULARY, "tokenizer_type": "NullTokenizer"}
    if "eod_id" in inspect.signature(NullTokenizer).parameters:
        args["null_tokenizer_eod_id"] = options.get("eod_id")
    made = NullTokenizer(checkpoints.VOCABULARY, **options)
    return args, made.vocab_size, made.eod


@pytest.mark.parametrize(
    "args, size, eod",
    [
        null_tokenizer(),
        (dict(vocab_size=50, tokenizer_type="NullTokenizer"), 51, 50),  # up to 0.17
        (dict(vocab_size=50, tokenizer_type="NullTokenizer", null_tokenizer_eod_id=None), 50, 49),  # from 0.18
        (dict(vocab_size=50, tokenizer_type="NullTokenizer", null_tokenizer_eod_id=3), 50, 3),
        (dict(vocab_size=50, tokenizer_type="NullMultimodalTokenizer", null_tokenizer_eod_id=None), 51, 50),
        (dict(vocab_size=50, tokenizer_type="HuggingFaceTokenizer"), 50, None),
        (dict(vocab_size=None, tokenizer_type="HuggingFaceTokenizer"), checkpoints.PADDED, None),
    ],
    ids=["this release", "0.17", "0.18", "0.18, named", "multimodal", "another", "no size"],
)
def test_the_end_of_a_document_is_exported(tmp_path, args, size, eod):
    described = checkpoints.architecture(checkpoints.QWEN | {"pattern": "G-G-*-"})
    weights = checkpoints.random_weights(described)
    step = checkpoints.write(tmp_path / "ours", described, weights) / "step_00000007"
    (step / "info.json").unlink()
    # The model of the fixture in Megatron-LM's arguments, with the tokenizer's.
    model = vars(args_of_architecture(described, 128))
    torch.save({"args": argparse.Namespace(**model | args)}, step / "common.pt")
    assert megatron_to_hf.main(["--checkpoint", str(step), "--output", str(tmp_path / "hf")]) == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["vocab_size"], config.get("eos_token_id")) == (size, eod)
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], weights["output_layer.weight"][:size])
    assert torch.equal(found["model.embed_tokens.weight"], weights["embedding.word_embeddings.weight"][:size])
