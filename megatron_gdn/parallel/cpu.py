"""Megatron-Core on a machine without CUDA, over gloo.

Megatron-Core 0.16 to 0.19 names CUDA in its data path: `torch.cuda.current_device()` for buffers, `device="cuda"`
literals for scalars, comparisons with `"torch.cuda.FloatTensor"`. `install()` answers those calls on the CPU and
changes nothing else; where CUDA exists it does nothing. It belongs at the start of a process, before any model is
built, and is called by our launcher and our tests, never on import.
"""

import logging
import warnings

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed: list[TorchFunctionMode] = []


def _names_cuda(device) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


class _CudaLiteralsOnCpu(TorchFunctionMode):
    """`device="cuda"`, `.cuda()`, `.to("cuda")` and pinned memory stay plain; `Tensor.type()` gives CUDA's name.

    A function mode is the one mechanism that reaches literals and `Tensor.type()` without editing the host.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


class _NoStream:
    """Stands in for `torch.cuda.Stream`: a CPU has one order of execution."""

    device = _CPU

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, *args):
        pass

    wait_event = record_event = synchronize = wait_stream

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


class AdamW(torch.optim.Optimizer):
    """AdamW with its step count in the parameter group, as TE's and Apex's FusedAdam have it.

    DistributedOptimizer takes other branches for `torch.optim.AdamW`, and those cannot reload a `fully_reshardable`
    checkpoint (megatron-core 0.16.1, distrib_optimizer.py:940). With this class the CPU runs production's branches.

    Args:
        params: parameters or groups of them; float32.
        lr: step size.
        betas, eps, weight_decay: as in arXiv 1711.05101.
        adam_w_mode: True for decoupled decay; False adds the decay to the gradient.
        capturable: for CUDA graphs, which a CPU does not have; since megatron-core 0.17 the host names it.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True, capturable=False
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.adam_w_mode = adam_w_mode

    def initialize_state(self, param, *_):
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[param][name] = torch.zeros_like(param, dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = step = group.get("step", 0) + 1
            (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                if not self.state[param]:
                    self.initialize_state(param)
                mean, square = self.state[param]["exp_avg"], self.state[param]["exp_avg_sq"]
                grad = param.grad.float()
                if self.adam_w_mode:
                    param.mul_(1 - lr * decay)
                else:
                    grad = grad.add(param, alpha=decay)
                mean.lerp_(grad, 1 - beta1)
                square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                denominator = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
                param.addcdiv_(mean, denominator, value=-lr / (1 - beta1**step))


def install() -> bool:
    """Answer Megatron-Core's CUDA calls on the CPU.

    Returns:
        True when this call installed the answers; False when CUDA exists or they were there already.
    """
    if torch.cuda.is_available() or _installed:
        return False
    # Two facts of a CPU that the host warns of on import.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    warnings.filterwarnings("ignore", message="full scope is deprecated", module="megatron.core")
    _answer_torch_cuda()
    _share_gloo_device()
    mode = _CudaLiteralsOnCpu()
    mode.__enter__()
    _installed.append(mode)
    _keep_in_backward(mode)
    _answer_rng_tracker()
    _use_group_step_adam()
    return True


def _keep_in_backward(mode: TorchFunctionMode) -> None:
    """Recomputed layers run inside the backward pass, where torch has set the mode aside."""
    run = torch.autograd._engine_run_backward

    def run_under_mode(*args, **kwargs):
        with mode:
            return run(*args, **kwargs)

    torch.autograd._engine_run_backward = run_under_mode


def _share_gloo_device() -> None:
    """One event loop for all process groups of this process.

    Megatron-Core makes about twenty groups, torch gives each its own loop, and every loop wakes up a hundred times a
    second for as long as the process lives: idle groups would take a core of a small machine.
    """
    if not dist.is_gloo_available():
        return
    gloo = c10d.ProcessGroupGloo
    device = gloo.create_default_device()

    class _Type(type):
        def __instancecheck__(cls, instance):
            return isinstance(instance, gloo)

    class ProcessGroupGloo(metaclass=_Type):
        def __new__(cls, store, rank, size, timeout):
            options = gloo._Options()
            options._timeout, options._devices = timeout, [device]
            return gloo(store, rank, size, options)

    c10d.ProcessGroupGloo = ProcessGroupGloo


def _answer_torch_cuda() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.Stream = _NoStream  # a class, because annotations such as `torch.cuda.Stream | None` are evaluated
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _NoStream()
    cuda.stream = lambda stream: _NoStream()


def _answer_rng_tracker() -> None:
    import megatron.core.tensor_parallel.random as tracker

    tracker._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    tracker._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # Its fork() warns that the CPU state changed inside a CUDA context: here the two are the same generator.
    logging.getLogger(tracker.__name__).setLevel(logging.ERROR)


def _use_group_step_adam() -> None:
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    if getattr(optimizer, "USING_PYTORCH_OPTIMIZER", False):
        optimizer.Adam = distrib_optimizer.Adam = AdamW
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
