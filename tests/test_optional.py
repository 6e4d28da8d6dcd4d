"""Broken optional packages do not break Megatron-Core, and missing ones are explained."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_gdn import optional
from megatron_gdn.optional import MissingPackageError, require, status

# As the wheel without a compiled part behaves.
META_TRANSFORMER_ENGINE = {
    "transformer_engine/__init__.py": "raise RuntimeError('Found empty `transformer-engine` meta package.\\nmore')",
}
# The base package imports, its torch part does not.
HALF_TRANSFORMER_ENGINE = {
    "transformer_engine/__init__.py": "import transformer_engine.common",
    "transformer_engine/common.py": "",
    "transformer_engine/pytorch/__init__.py": "raise OSError('libcudnn.so: cannot open shared object file')",
}
WHOLE_TRANSFORMER_ENGINE = {
    "transformer_engine/__init__.py": "__version__ = '2.11.0'",
    "transformer_engine/pytorch/__init__.py": "",
}
WEB_APEX = {"apex/__init__.py": "import pyramid.config"}
WEB_APEX_THAT_IMPORTS = {"apex/__init__.py": "print('code of the web toolkit ran')", "apex/models.py": ""}
CLONE_OF_APEX = {"apex/setup.py": "", "apex/apex/__init__.py": ""}  # as a folder in the current one
PYTHON_ONLY_APEX = {"apex/__init__.py": "", "apex/optimizers/fused_adam.py": ""}
BUILT_APEX = PYTHON_ONLY_APEX | {"amp_C.py": ""}


def write_packages(folder: Path, *packages: dict[str, str]) -> Path:
    """A folder for sys.path with these files."""
    for name, text in {key: value for package in packages for key, value in package.items()}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Put fake packages in front of sys.path; the modules of this process are as before afterwards."""
    names = ("transformer_engine", "apex", "amp_C")
    monkeypatch.setattr(optional, "_hidden", {})
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in names}

    def install(*packages):
        monkeypatch.syspath_prepend(write_packages(tmp_path, *packages))

    yield install
    for name in [name for name in sys.modules if name.split(".")[0] in names]:
        del sys.modules[name]
    sys.modules.update(kept)


BUILD_GPT = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "guarded":
    from megatron_gdn.optional import hide_broken_packages
    hide_broken_packages()
    hide_broken_packages()
from megatron_gdn.parallel import cpu
if sys.argv[2] == "bare":
    sys.meta_path[:] = [finder for finder in sys.meta_path if "BeforeMegatron" not in type(finder).__name__]
cpu.install()
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, use_cpu_initialization=True)
model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=32, max_sequence_length=8)
tokens = torch.arange(8)[None]
mask = torch.ones(1, 1, 8, 8).triu(1).bool()
print("logits", tuple(model(tokens, tokens, mask).shape))
"""


def test_megatron_imports_beside_broken_packages_and_only_with_the_guard(tmp_path):
    te, apex = (write_packages(tmp_path / str(i), each) for i, each in enumerate([META_TRANSFORMER_ENGINE, WEB_APEX]))
    foreign = write_packages(tmp_path / "foreign", WEB_APEX_THAT_IMPORTS)
    both = write_packages(tmp_path / "both", META_TRANSFORMER_ENGINE, WEB_APEX_THAT_IMPORTS)
    processes = [
        subprocess.Popen([sys.executable, "-c", BUILD_GPT, path, mode], stdout=-1, stderr=subprocess.STDOUT, text=True)
        for path, mode in ((both, "guarded"), (te, "bare"), (foreign, "bare"))
    ]
    guarded, without_te_guard, without_apex_guard = (process.communicate(timeout=120)[0] for process in processes)
    assert "logits (1, 8, 32)" in guarded and "code of the web toolkit ran" not in guarded
    assert guarded.count("WARNING transformer_engine is installed but does not import (RuntimeError: Found empty") == 1
    assert guarded.count("WARNING apex is a package of this name that is not NVIDIA Apex") == 1
    assert "RuntimeError: Found empty" in without_te_guard and "logits" not in without_te_guard
    assert "Apex must be installed to use FusedLayerNorm" in without_apex_guard and "logits" not in without_apex_guard


@pytest.mark.parametrize(
    "packages, hidden",
    [
        ([META_TRANSFORMER_ENGINE], {"transformer_engine"}),
        ([HALF_TRANSFORMER_ENGINE], {"transformer_engine"}),
        ([WHOLE_TRANSFORMER_ENGINE], set()),
        ([WEB_APEX], {"apex"}),
        ([WEB_APEX_THAT_IMPORTS], {"apex"}),
        ([CLONE_OF_APEX], {"apex"}),
        ([PYTHON_ONLY_APEX], {"apex"}),
        ([BUILT_APEX, META_TRANSFORMER_ENGINE], {"transformer_engine"}),
        ([], set()),
    ],
)
def test_which_packages_are_hidden(installed, caplog, capsys, packages, hidden):
    installed(*packages)
    optional._hide_now()
    optional._hide_now()
    names = ("transformer_engine", "apex")
    assert {name for name in names if sys.modules.get(name, "not loaded") is None} == hidden
    assert [record.message.split()[0] for record in caplog.records] == sorted(hidden)  # each once
    assert capsys.readouterr().out == ""  # no code of a foreign package ran
    for name in hidden:
        for part in ("", ".pytorch", ".common"):
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module(f"{name}{part}")
        with pytest.raises(MissingPackageError, match=re.escape(caplog.messages[0].split(" ", 1)[1].split(":")[0])):
            require(name, extra="te", purpose="that setting")


CHEAP = """
import sys
from megatron_gdn.optional import _BeforeMegatron, hide_broken_packages
hide_broken_packages()
hide_broken_packages()
print(sum(isinstance(finder, _BeforeMegatron) for finder in sys.meta_path))
print(sorted({"torch", "megatron.core", "transformer_engine"} & set(sys.modules)))
"""


def test_the_guard_itself_imports_nothing(tmp_path):
    write_packages(tmp_path, WHOLE_TRANSFORMER_ENGINE)
    output = subprocess.run([sys.executable, "-c", CHEAP], env={"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert output.stdout == b"1\n[]\n", output.stderr


def test_require_gives_the_module_or_value_rule_and_remedy(installed):
    installed(META_TRANSFORMER_ENGINE, WEB_APEX)
    assert require("json", extra="te", purpose="anything").loads("1") == 1
    with pytest.raises(
        MissingPackageError,
        match=r"^no_such_package is needed for e=x and is not installed: run pip install -e '.\[deepspeed\]' in",
    ):
        require("no_such_package", extra="deepspeed", purpose="e=x")
    with pytest.raises(ImportError, match=r"engine for fp8 and .* \(RuntimeError: Found empty .* package\.\): run pip"):
        require("transformer_engine", extra="te", purpose="engine for fp8")
    with pytest.raises(ImportError, match="apex is needed for x and is a package .* never pip install apex"):
        require("apex", extra=None, purpose="x")


def test_status_names_every_package(installed):
    installed(WHOLE_TRANSFORMER_ENGINE, PYTHON_ONLY_APEX)
    report = status()
    assert report["transformer_engine"] == "2.11.0"
    assert report["apex"].startswith("is NVIDIA Apex without its CUDA extensions (amp_C): build NVIDIA/apex")
    assert set(report) == set(optional._EXTRAS) and all(report.values())


def test_every_extra_exists():
    setup = (Path(optional.__file__).parents[1] / "setup.py").read_text()
    extras = set(re.findall(r'^        "(\w+)": \[', setup, flags=re.M))
    assert {extra for extra in optional._EXTRAS.values() if extra} <= extras
