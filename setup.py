"""Package metadata. Exact versions that are tested together stand in requirements.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="homodistil",
    version="0.1.0",
    description="HomoDistil (homotopic distillation): small Transformers out of big ones, in one DeepSpeed job",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["homodistil", "homodistil.*"]),
    package_data={"homodistil": ["config/recipes/*.yaml", "config/recipes/*/*.yaml"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19,<0.20",
        "transformers>=5.17,<6",
        "accelerate>=1.1",  # Hugging Face's Trainer needs it
        "datasets>=4",
        "tensorboard",
        "jsonargparse[signatures]>=4.40",
        "mwparserfromhell",
        "matplotlib",
        "tqdm",
        "filelock",
        "psutil",
        "pyyaml",
        "jinja2",
        "scikit-learn>=1.5",
        "scipy>=1.11",
        "ninja",
    ],
    extras_require={
        "gpu": ["triton>=3.6"],
        "data": ["datatrove>=0.10", "datasketch>=2", "aiohttp"],  # filters and URLs of launcher/prepare_data.py
        "dev": ["pytest", "pytest-timeout", "hypothesis", "torch-pruning", "ruff", "triton>=3.6"],
    },
)
