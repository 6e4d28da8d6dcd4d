"""Models of Transformer Engine's modules, whose classes are stood in for: Megatron's wrappers need its wheel and CUDA.

The stand-ins have the signatures of Megatron's wrappers, which a test reads from their source, and compute what they
compute. What this cannot show is Transformer Engine's own numerics.
"""

import ast
import inspect
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_gdn.config import ConfigError
from tests.ranks import RankError, pool
from tests.training.test_engine import VOCABULARY, run_config, sample, stored_weights

H2 = dict(
    pattern="M-G-SG*-",
    mamba_num_heads=4,
    mamba_head_dim=8,
    mamba_state_dim=12,
    sliding_attention=dict(window=20, qk_norm=True),
    full_attention=dict(output_gate=True),
    zero_centered_norm=True,
)


def stand_ins() -> dict[str, type]:
    """Classes of Megatron's wrappers by name, on its local linear layers."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from megatron_gdn.norms import RMSNorm, ZeroCenteredRMSNorm

    class TENorm(torch.nn.Module):
        def __new__(cls, config, hidden_size, eps=1e-5):
            return (ZeroCenteredRMSNorm if config.layernorm_zero_centered_gamma else RMSNorm)(config, hidden_size, eps)

    class TEColumnParallelLinear(ColumnParallelLinear):
        def __init__(
            self,
            input_size,
            output_size,
            *,
            config,
            init_method,
            gather_output,
            bias,
            skip_bias_add,
            is_expert,
            skip_weight_param_allocation=False,
            tp_comm_buffer_name=None,
            tp_group=None,
            stride=1,
            name=None,
        ):
            super().__init__(
                input_size,
                output_size,
                config=config,
                init_method=init_method,
                gather_output=gather_output,
                bias=bias,
                skip_bias_add=skip_bias_add,
                is_expert=is_expert,
                tp_group=tp_group,
            )

    class TELayerNormColumnParallelLinear(TEColumnParallelLinear):
        __init__ = signature_of(TEColumnParallelLinear.__init__)

        def forward(self, x):
            scale = self.layer_norm_weight + (1 if self.config.layernorm_zero_centered_gamma else 0)
            return super().forward(torch.nn.functional.rms_norm(x, scale.shape, scale, self.config.layernorm_epsilon))

    class TERowParallelLinear(RowParallelLinear):
        def __init__(
            self,
            input_size,
            output_size,
            *,
            config,
            init_method,
            bias,
            input_is_parallel,
            skip_bias_add,
            is_expert,
            tp_comm_buffer_name=None,
            tp_group=None,
            name=None,
        ):
            super().__init__(
                input_size,
                output_size,
                config=config,
                init_method=init_method,
                bias=bias,
                input_is_parallel=input_is_parallel,
                skip_bias_add=skip_bias_add,
                is_expert=is_expert,
                tp_group=tp_group,
            )

    made = (TENorm, TEColumnParallelLinear, TELayerNormColumnParallelLinear, TERowParallelLinear)
    return {cls.__name__: cls for cls in made}


def signature_of(init):
    """An __init__ like another, that adds the weight of a norm."""

    def with_norm(self, input_size, output_size, *, config, **options):
        init(self, input_size, output_size, config=config, **options)
        start = 0.0 if config.layernorm_zero_centered_gamma else 1.0
        self.layer_norm_weight = torch.nn.Parameter(torch.full((input_size,), start, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    with_norm.__signature__ = inspect.signature(init)
    return with_norm


def with_transformer_engine():
    """Megatron's wrappers replaced, as if the wheel were there."""
    from megatron.core.extensions import transformer_engine as te

    patches = [mock.patch.object(te, name, cls) for name, cls in stand_ins().items()]
    return [*patches, mock.patch("megatron_gdn.providers.require")]


def test_stand_ins_have_the_signatures_of_megatrons_wrappers():
    from megatron.core.extensions import transformer_engine as te

    tree = ast.parse(Path(te.__file__).read_text())
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for name, cls in stand_ins().items():
        function = "__new__" if name == "TENorm" else "__init__"
        body = next(n for n in classes[name].body if isinstance(n, ast.FunctionDef) and n.name == function)
        # What later hosts add must be optional: Megatron's own modules use it, ours do not.
        taken = list(inspect.signature(getattr(cls, function)).parameters)
        arguments, keywords = body.args.args, body.args.kwonlyargs
        optional = arguments[len(arguments) - len(body.args.defaults) :]
        optional += [x for x, default in zip(keywords, body.args.kw_defaults, strict=True) if default is not None]
        theirs = [x.arg for x in arguments + keywords if x not in optional or x.arg in taken]
        assert [x for x in taken if x != "name" or x in theirs] == theirs, name  # `name` is of 0.18


def models_of_both(config, folder):
    """Weights on disk, logits and modules of a local model, and of one of the other provider that reads its weights."""
    from contextlib import ExitStack

    from megatron_gdn.hybrid.model import build_model, padded_vocab_size, transformer_config
    from megatron_gdn.training import torch_dist

    if torch.distributed.get_rank() == 0:
        folder.mkdir()
    torch.distributed.barrier()
    rows = padded_vocab_size(VOCABULARY, config.model.vocab_multiple)
    tokens = torch.stack([sample(i)["tokens"] for i in range(2)])
    found = {}
    for provider in ("local", "te"):
        config.model.provider = provider
        with ExitStack() as stack:
            for patch in with_transformer_engine():
                stack.enter_context(patch)
            host = transformer_config(config.model, config.parallel)
            gpt = build_model(host, config.model, vocab_size=rows, max_sequence_length=72, seed=len(provider))
        if provider == "local":
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for name, param in gpt.named_parameters():
                    if "norm" in name:
                        param.add_(torch.rand(param.shape, generator=generator) - 0.5)
            torch_dist.write(gpt.sharded_state_dict(), folder)
        else:
            gpt.load_state_dict(torch_dist.read(gpt.sharded_state_dict(), folder))
        logits = gpt.eval()(tokens, torch.arange(72).expand(2, -1), None).detach()
        modules = {name: type(module).__name__ for name, module in gpt.named_modules()}
        found[provider] = (stored_weights(gpt), logits, modules)
    return found


@pytest.mark.parametrize("tensor, sequence", [(1, False), (2, True)])
def test_providers_share_checkpoints_and_logits(tmp_path, tensor, sequence):
    config = run_config(parallel=dict(tensor=tensor, sequence=sequence), **H2)
    groups = dict(tensor_model_parallel_size=tensor)
    for found in pool(tensor).run(models_of_both, config, tmp_path / "model", groups=groups):
        (local_weights, local_logits, _), (weights, logits, modules) = found["local"], found["te"]
        assert weights.keys() == local_weights.keys()
        for key, weight in local_weights.items():
            assert torch.equal(weights[key], weight), key
        # The norm's scale is 1 + weight in float32 in both; the order of operations differs.
        assert (logits - local_logits).abs().max() < 2e-6 * local_logits.abs().max()
        layers = "decoder.layers."
        expected = {
            "0.input_layernorm": "ZeroCenteredRMSNorm",  # TENorm's stand-in makes it
            "0.self_attention.in_proj": "TEColumnParallelLinear",
            "0.self_attention.in_proj_dt": "ColumnParallelLinear",
            "0.self_attention.out_proj": "TERowParallelLinear",
            "0.pre_mlp_layernorm": "IdentityOp",
            "0.mlp.linear_fc1": "TELayerNormColumnParallelLinear",
            "0.mlp.linear_fc2": "TERowParallelLinear",
            "1.self_attention.in_proj": "TEColumnParallelLinear",
            "1.self_attention.in_proj_ba": "ColumnParallelLinear",
            "2.input_layernorm": "IdentityOp",
            "2.self_attention.linear_qkv": "TELayerNormColumnParallelLinear",
            "2.self_attention.linear_proj": "TERowParallelLinear",
            "2.self_attention.q_layernorm": "HeadRMSNorm",
            "2.mlp": "IdentityOp",
        }
        assert {name: modules[layers + name] for name in expected} == expected
        assert modules["decoder.final_layernorm"] == "ZeroCenteredRMSNorm"


def build_with_te():
    from megatron_gdn.hybrid.model import build_model, transformer_config

    config = run_config("G-", provider="te")
    host = transformer_config(config.model, config.parallel)
    build_model(host, config.model, vocab_size=256, max_sequence_length=8, seed=1)


def test_missing_transformer_engine_is_an_error():
    with pytest.raises(
        RankError, match=r"transformer_engine is needed for provider 'te' and is not installed: run pip"
    ):
        pool(1).run(build_with_te, groups={})
    with pytest.raises(ConfigError, match=r"model.provider \('apex'\): input should be 'local' or 'te'"):
        run_config("G-", provider="apex")
