"""Packages, dependencies and extras; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

REQUIRED = [
    "torch>=2.8",
    "transformers>=5.19,<5.24",  # tested with 5.23, and serving with vLLM, which asks for less, with 5.19
    "safetensors>=0.5",
    "pillow>=11",
    "numpy>=1.26",
    "jinja2>=3.1",
    "typer>=0.15",
    "rich>=13",
    "sentencepiece>=0.2",  # the tokenizer of LLaVA 1.5 and Vicuna, as they were released
    "tqdm>=4.66",
    "matplotlib>=3.9",
    "filelock>=3.12",
    # training
    "accelerate>=1.10,<2",
    "datasets>=4,<6",
    "peft>=0.18,<1",
    "psutil>=5.9",
    "pyyaml>=6",
    # evaluation
    "httpx>=0.27,<1",
    "openpyxl>=3.1",
    "scipy>=1.15",
    "tenacity>=9,<10",
    # the embedded data set
    "scikit-learn>=1.5",
    "tokenizers>=0.22",
]
TRAIN = ["deepspeed>=0.18,<0.20", "ninja>=1.11", "tensorboard>=2.18,<3", "wandb>=0.20,<1"]
GGUF = ["gguf>=0.17,<1"]
SERVE = ["fastapi>=0.115,<1", "openai>=1.98,<3", "starlette>=0.40,<2", "uvicorn>=0.30,<1"]  # of `transformers serve`
PROGRAMS = ("train", "eval", "serve", "playground")
DEV = ["mypy>=1.15", "pytest>=8", "pytest-xdist>=3.6,<4", "ruff>=0.11"]

setup(
    name="llava-skip",
    version="0.1.0",
    description="Skip-Vision for LLaVA: train and evaluate models whose visual tokens skip the FFN",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["llava_skip*", *PROGRAMS, *(f"{name}.*" for name in PROGRAMS)]),
    package_data={
        "llava_skip": ["templates/*.jinja"],
        "eval.showing": ["templates/*.jinja"],
        "train": ["recipes/*.yaml", "recipes/*.json"],
    },
    entry_points={
        "console_scripts": ["llava-skip = llava_skip_base.command:main"],
        "lmms_eval.models": ["llava_skip = eval.lmms_plugin:manifest"],
        "vllm.general_plugins": ["llava_skip = serve.vllm:register"],
    },
    install_requires=REQUIRED,
    extras_require={
        "train": TRAIN,
        "flash-attn": ["flash-attn>=2.7"],
        "liger": ["liger-kernel>=0.8,<0.9"],  # needs triton, which torch has for CUDA and ROCm
        "qlora": ["bitsandbytes>=0.46.1,<1"],
        "gguf": GGUF,
        "serve": SERVE,
        "trl": ["trl>=1.16,<2"],
        "demo": ["gradio>=6.31,<7"],  # not in "all": it asks for an older Pillow than constraints.txt has
        "lmms": ["lmms-eval>=0.7,<0.8"],  # never by default: it asks for other versions of wandb and torch's companions
        "vllm": ["vllm>=0.32,<0.33"],  # in an environment of its own: it asks for other versions, transformers' too
        "dev": DEV,
        "all": [*TRAIN, *GGUF, *SERVE, *DEV],
    },
)
