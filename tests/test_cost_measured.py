"""Bytes of a step as they are counted, against the cost model: what ranks send to each other, keep, and save."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_gdn.cost import model_cost
from tests.ranks import pool
from tests.training.test_engine import VOCABULARY, run_config

# Wide enough for what the model leaves out to be small: sums of the loss, of norms and of replicated weights.
WIDE = dict(
    hidden_size=128,
    ffn_hidden_size=192,
    linear_key_head_dim=32,
    linear_value_head_dim=48,
    mamba_num_heads=4,
    mamba_head_dim=64,
    mamba_state_dim=64,
    sliding_attention=dict(window=40),
)
TRAINING = dict(sequence_length=128, micro_batch_size=2, global_batch_size=8)


class _Sent(TorchDispatchMode):
    """Adds up what this rank sends to each process group, with ring algorithms, from torch's own collectives."""

    def __init__(self, names: dict[str, str]):
        super().__init__()
        self.names, self.bytes = names, dict.fromkeys([*names.values(), "other"], 0.0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("c10d::")
        if name != function.name() and not name.startswith(("recv", "barrier")):
            group = next(
                torch.distributed.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject)
            )
            size = group.size()
            tensors = args[1] if "reduce_scatter" in name else args[0]  # a scatter's input, else the output
            tensors = tensors if isinstance(tensors, list) else [tensors]
            whole = sum(x.numel() * x.element_size() for x in tensors)
            share = 1.0 if name == "send" else (2 if name.startswith("allreduce") else 1) * (size - 1) / size
            self.bytes[self.names.get(group.group_name, "other")] += share * whole
        return function(*args, **(kwargs or {}))


def one_step(config):
    """Bytes sent, and bytes of weights, gradients and optimizer states, of a step on this rank."""
    from megatron.core import parallel_state

    from megatron_gdn.training.engine import MegatronEngine

    engine = MegatronEngine.build(config, vocab_size=VOCABULARY, device=torch.device("cpu"))
    names = {
        parallel_state.get_tensor_model_parallel_group().group_name: "tensor",
        parallel_state.get_pipeline_model_parallel_group().group_name: "pipeline",
        parallel_state.get_data_parallel_group().group_name: "data",
        parallel_state.get_data_parallel_group(with_context_parallel=True).group_name: "data",
    }
    if parallel_state.is_rank_in_embedding_group():
        names[parallel_state.get_embedding_group().group_name] = "pipeline"
    training = config.training
    count = training.global_batch_size // training.micro_batch_size // parallel_state.get_data_parallel_world_size()
    shape = (training.micro_batch_size, training.sequence_length)
    text = torch.randint(VOCABULARY, shape)
    batch = dict(
        tokens=text, labels=text, loss_mask=torch.ones(shape), position_ids=torch.arange(shape[1]).expand(shape)
    )
    with _Sent(names) as sent:
        engine.forward_backward(iter([batch] * count), count)
        engine.update()
    adam = [x for x in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])]
    groups = [param for x in adam for group in x.optimizer.param_groups for param in group["params"]]
    states = [value for x in adam for state in x.optimizer.state.values() for value in state.values()]
    masters = groups if training.precision == "bf16" else []
    kept = {
        "weights": engine.model.parameters(),
        "gradients": [buffer.grad_data for buffer in engine.wrapped.buffers],
        "optimizer": [x for x in states + masters if torch.is_tensor(x)],
    }
    return sent.bytes, {name: sum(x.numel() * x.element_size() for x in tensors) for name, tensors in kept.items()}


LAYOUTS = {
    "tensor": dict(tensor=2),
    "tensor, sequence": dict(tensor=2, sequence=True),
    "pipeline": dict(pipeline=2),
    "data": dict(),
    "data, optimizer not sharded": dict(distributed_optimizer=False),
}


@pytest.mark.parametrize(
    "layout, training, model",
    [
        *((name, {}, {}) for name in LAYOUTS),
        ("tensor, sequence", dict(recompute="full"), {}),
        ("tensor", dict(recompute="full"), {}),
        ("pipeline", {}, dict(tie_embeddings=True)),
        ("data", dict(precision="bf16"), {}),
    ],
    ids=str,
)
def test_what_a_step_sends_and_keeps(layout, training, model):
    parallel = dict(overlap=False) | LAYOUTS[layout]
    config = run_config("M-G-S-*-", parallel=parallel, training=TRAINING | training, **(WIDE | model))
    tensor, pipeline = parallel.get("tensor", 1), parallel.get("pipeline", 1)
    groups = dict(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    cost = model_cost(config, vocab_size=VOCABULARY, data_parallel=2 // (tensor * pipeline))
    check(config, cost, groups)


def check(config, cost, groups: dict) -> None:
    """What each of two processes sends and keeps in a step, against the costs of its pipeline stage."""
    for rank, (sent, kept) in enumerate(pool(2).run(one_step, config, groups=groups)):
        stage = rank if config.parallel.pipeline > 1 else 0
        for name, expected in cost.communication_bytes(stage).items():
            assert sent.get(name, 0) == pytest.approx(expected, rel=0.02), name
        assert sent["other"] < 0.01 * sum(sent.values())
        expected = cost.memory_bytes(stage)
        for name, found in kept.items():
            assert found == pytest.approx(expected[name], rel=0.02), name


@pytest.mark.parametrize(
    "parallel, precision",
    [(dict(tensor=2), "fp32"), (dict(tensor=2, sequence=True), "bf16"), (dict(distributed_optimizer=False), "bf16")],
    ids=["tensor", "tensor, sequence, bf16", "data, bf16, not sharded"],
)
def test_what_a_step_of_muon_sends_and_keeps(parallel, precision):
    """Parts of matrices to tensor-parallel ranks; momentum in place of two moments."""
    check(*muon(parallel, precision), dict(tensor_model_parallel_size=parallel.get("tensor", 1)))


def muon(parallel: dict, precision: str, **model):
    """A run of two processes, and its costs."""
    training = TRAINING | dict(precision=precision)
    config = run_config("M-G-S-*-", parallel=dict(overlap=False) | parallel, training=training, **(WIDE | model))
    config.optimizer.name = "muon"
    return config, model_cost(config, vocab_size=VOCABULARY, data_parallel=2 // parallel.get("tensor", 1))


@pytest.mark.parametrize(
    "precision, model",
    [("fp32", {}), ("bf16", {}), ("bf16", dict(vocab_multiple=8192, tie_embeddings=True))],
    ids=["fp32", "bf16", "an embedding larger than a share"],
)
def test_what_data_parallel_ranks_of_muon_send_and_keep(precision, model):
    """Gradients to all, updated weights from their owners; states of whole parameters, together those of one rank."""
    config, cost = muon({}, precision, **model)
    alone = model_cost(config, vocab_size=VOCABULARY).memory_bytes(0)["optimizer"]
    found = pool(2).run(one_step, config, groups={})
    for sent, _ in found:
        assert sent["data"] == pytest.approx(cost.communication_bytes(0)["data"], rel=0.02)
    kept = [kept["optimizer"] for _, kept in found]
    assert sum(kept) == pytest.approx(alone, rel=0.02)
    expected = cost.memory_bytes(0)["optimizer"]
    assert 0.99 * expected < max(kept) < 8 / 7 * expected  # parameters are not cut, see tests/training/test_owners.py


def saved_bytes(config):
    """Bytes that autograd keeps after a forward pass, parameters left out, each storage once; its loss, and without
    the fused SwiGLU."""
    from megatron_gdn.training.engine import MegatronEngine

    engine = MegatronEngine.build(config, vocab_size=VOCABULARY, device=torch.device("cpu"))
    shape = (config.training.micro_batch_size, config.training.sequence_length)
    text = torch.randint(VOCABULARY, shape)
    arguments = (text, torch.arange(shape[1]).expand(shape), None)
    assert not engine.model.config.bias_activation_fusion
    plain = engine.model(*arguments, labels=text).mean().item()
    engine.model.config.bias_activation_fusion = True  # as on a GPU: the SwiGLU keeps its input only
    own = {param.untyped_storage().data_ptr() for param in engine.model.parameters()}
    storages = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # held, so that its address is not used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = engine.model(*arguments, labels=text)
    return sum(storage.nbytes() for storage in storages.values()), loss.mean().item(), plain


@pytest.mark.parametrize("pattern", ["G", "M", "S", "*", "M-G-S-"])
def test_what_autograd_keeps(pattern):
    config = run_config(pattern, training=TRAINING, **WIDE)
    [(found, loss, plain)] = pool(1).run(saved_bytes, config, groups={})
    assert loss == pytest.approx(plain, rel=1e-6)
    expected = model_cost(config, vocab_size=VOCABULARY).memory_bytes(0)["activations"]
    # The torch backend keeps U and the states at the chunks, which the Triton kernels compute again.
    model = config.model
    states = model.linear_num_value_heads * model.linear_value_head_dim * (1 + model.linear_key_head_dim / 64)
    # On a CPU torch's rms_norm keeps what it multiplies with the weight, beside its input.
    num_norms = len(pattern) + 1
    expected += 4 * (pattern.count("G") * states + num_norms * model.hidden_size) * 2 * 128
    assert found == pytest.approx(expected, rel=0.1)
