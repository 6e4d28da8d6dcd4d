"""Reasons why no Hugging Face format of others can hold a model."""

from tools.convert.architecture import Architecture


def common_obstacles(architecture: Architecture) -> list[str]:
    """Of every format of Gated DeltaNet."""
    model, layers = architecture.model, architecture.layers
    found = []
    if not any(layer.symbol == "G" for layer in layers):
        found.append("it has Gated DeltaNet layers only beside others")
    if any(layer.symbol == "M" for layer in layers):
        found.append("it has no Mamba2 layers")
    if not all(layer.mlp for layer in layers):
        found.append("every layer has an MLP there")
    if not model.use_decay:
        found.append("its state always decays (use_decay is false)")
    if not model.use_qk_l2norm:
        found.append("it always normalises q and k (use_qk_l2norm is false)")
    return found
