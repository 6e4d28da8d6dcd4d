"""How the mixers of a hybrid fare: gates, states and attention of every layer, sampled now and then.

| tag | value |
|---|---|
| health/layer_03/alpha_{mean,p05,p50,p95} | decay exp(g) of Gated DeltaNet, exp(dt A) of Mamba2; 1 keeps, 0 forgets |
| health/layer_03/beta_{mean,p05,p50,p95} | strength of Gated DeltaNet's writes |
| health/layer_03/state_rms | root mean square of the state after the last token |
| health/layer_03/gate_{mean,p05,p50,p95} | output gate before its activation |
| health/layer_03/attention_entropy | nats, mean over heads of the last queries |
| health/layer_03/attention_max_logit | largest logit of the last queries |

Layers count from 1 over all pipeline stages. A sample is the first micro-batch of a step on every rank; means and
quantiles are averaged over tensor- and data-parallel ranks, each with the weight of its heads, and maxima are maxima.
Ghost heads are left out, and so is attention under context parallelism, where no rank has all keys. Mixers that can be
observed have an attribute `observer`, None unless a sample is wanted.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

_QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}
_MAX_VALUES = 2**14

Observer = Callable[[dict[str, Tensor]], None]


class HealthMonitor:
    """Samples the mixers of a model stage.

    Args:
        model: whose modules with an attribute `observer` are sampled.
    """

    def __init__(self, model: torch.nn.Module):
        self._mixers = [module for module in model.modules() if hasattr(module, "observer")]
        self._found: dict[str, tuple[Tensor, int]] = {}

    def start(self) -> None:
        """Sample the next forward pass of every mixer."""
        for mixer in self._mixers:
            mixer.observer = self._observer(mixer)

    def take(self) -> dict[str, float]:
        """What the ranks found since `start`, by tag; collective."""
        for mixer in self._mixers:
            mixer.observer = None
        # Waits for the device.
        mine = {name: (value.item(), weight) for name, (value, weight) in self._found.items()}
        self._found = {}
        everyone: list[dict[str, tuple[float, int]]] = [mine]
        if dist.is_initialized():
            everyone = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, mine)
        return _joined(everyone)

    def _observer(self, mixer) -> Observer:
        def observe(tensors: dict[str, Tensor]) -> None:
            mixer.observer = None  # the first micro-batch only, and not again when it is recomputed
            prefix = f"health/layer_{mixer.layer_number:02d}/"
            with torch.no_grad():
                for name, value in tensors.items():
                    if weight := value.numel():  # a rank may own no head
                        found = _summarize(name, value.detach())
                        self._found |= {prefix + tag: (number, weight) for tag, number in found}

        return observe


def _summarize(name: str, value: Tensor) -> Iterable[tuple[str, Tensor]]:
    if name == "state":
        yield "state_rms", value.float().square().mean().sqrt()
        return
    if name == "logits":
        finite = value.float().masked_fill(value == -math.inf, torch.finfo(torch.float32).min)
        log_probability = finite.log_softmax(-1)
        yield "attention_entropy", -(log_probability.exp() * log_probability).sum(-1).mean()
        yield "attention_max_logit", finite.amax()
        return
    values = value.flatten()
    step = max(1, math.ceil(len(values) / _MAX_VALUES))
    while math.gcd(step, len(values)) > 1:  # a step that heads divide would always meet the same head
        step += 1
    values = values[::step].float()
    yield f"{name}_mean", values.mean()
    quantiles = torch.quantile(values, torch.tensor(list(_QUANTILES.values()), device=values.device))
    for label, quantile in zip(_QUANTILES, quantiles, strict=True):
        yield f"{name}_{label}", quantile


def _joined(everyone: list[dict[str, tuple[float, int]]]) -> dict[str, float]:
    names = sorted({name for found in everyone for name in found})
    joined = {}
    for name in names:
        values, weights = zip(*(found[name] for found in everyone if name in found), strict=True)
        mean = sum(map(math.prod, zip(values, weights, strict=True))) / sum(weights)
        joined[name] = max(values) if name.endswith("max_logit") else mean
    return joined
