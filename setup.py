"""Package description of megatron-solopo.

Only lower bounds that the code needs, and megatron-core's minor version: a container that brings its own
torch (NVIDIA's NGC images) keeps it. The exact versions the tests run with are in constraints.txt.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """The version, from the one place that states it."""
    text = (ROOT / "megatron_solopo" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE).group(1)


def long_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    name="megatron-solopo",
    version=version(),
    description="SoLoPO, short-to-long preference optimization for long-context language models, on Megatron Core",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_solopo", "megatron_solopo.*"]),
    package_data={"megatron_solopo": ["**/*.jinja", "**/*.yaml"]},
    install_requires=[
        "megatron-core>=0.19,<0.20",
        "torch>=2.6",
        "transformers>=5.0",
        "tokenizers>=0.22",
        "safetensors>=0.4.3",
        "sentencepiece>=0.2",
        "datasets>=3.0",
        "pyarrow>=15.0",
        "bm25s>=0.2.5",
        "openai>=1.98",
        "pydantic>=2.7",
        "rich>=13.0",
        "numpy>=1.26",
        "jinja2>=3.1",
        "markupsafe>=2.1",
        "pyyaml>=6.0",
        "tqdm>=4.66",
        "psutil>=5.9",
        "tensorboard>=2.14",
        "matplotlib>=3.8",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch,core_cu13]>=2.20"],
        "wandb": ["wandb>=0.17"],
        "tiktoken": ["tiktoken>=0.7"],
        "serve": ["transformers[serving]>=5.0"],
        "test": [
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "trl>=1.0",
            "wandb>=0.17",
            "kubernetes-validate>=1.31",
            "tiktoken>=0.7",
            "transformers[serving]>=5.0",
        ],
        # `make lint`; basedpyright is pyright with its own node, which PyPI's pyright would download when it runs.
        "dev": ["ruff>=0.14", "basedpyright>=1.31"],
    },
    entry_points={"console_scripts": ["solopo = megatron_solopo.cli:main"]},
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
