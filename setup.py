"""Packaging. What is installed is `kdfast` alone: the folder kernels/ ships as `kdfast.kernels`.

A top-level `kernels` would hide the Hugging Face package of that name, which `transformers` probes; hence the
explicit list of packages instead of `find_packages()`.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "kdfast/_version.py").read_text()).group(1)


def long_description() -> str:
    """Return README as it reads away from the repository: without pictures, hidden code and links to files."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"<!--.*?-->\n*|!\[[^\]]*\]\([^)]*\)\n*", "", text, flags=re.S)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text)


TRAIN = [
    "transformers>=5.9",
    "datasets>=4",
    "accelerate>=1.10",
    "safetensors",
    "tokenizers",
    "pyyaml",
    "matplotlib",
    "pandas",
    "jinja2",
    "psutil",
    "tqdm",
]
LORA = ["peft>=0.20"]  # what transformers asks for
QUANTIZED = ["bitsandbytes>=0.46"]
EXAMPLES = ["trl", "lightning"]  # one example each; the others need TRAIN alone
BENCH = ["pytest", "pytest-benchmark", "trl", "liger-kernel", "fla-core", "cut-cross-entropy", "rouge-score"]
# `kernels` is Hugging Face's: one test shows that ours and theirs live side by side
TESTS = ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "rouge-score"]
DOCS = ["pdoc", "rich"]  # pages from the docstrings, pictures of terminals
DEV = [*TESTS, *EXAMPLES, *LORA, *QUANTIZED, *DOCS, "ruff", "mypy", "types-PyYAML", "kernels", "setuptools>=77"]

setup(
    name="kdfast",
    version=VERSION,
    description="Distill large-vocabulary language models whose logits don't fit: a fused loss, and a trainer",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="kdfast authors",
    keywords="knowledge-distillation distillation llm language-model triton loss cross-entropy kl-divergence lora",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        "kdfast",
        "kdfast.cli",
        "kdfast.demo",
        "kdfast.engines",
        "kdfast.frontend",
        "kdfast.ops",
        "kdfast.plan",
        "kdfast.report",
        "kdfast.training",
        "kdfast.training.cache",
        "kdfast.training.data",
        "kdfast.training.durable",
        "kdfast.training.initialization",
        "kdfast.training.on_policy",
        "kdfast.training.teachers",
        "kdfast.kernels",
    ],
    package_dir={"kdfast.kernels": "kernels"},
    package_data={"kdfast": ["py.typed"], "kdfast.report": ["page.html"], "kdfast.kernels": ["README.md"]},
    zip_safe=False,
    # PyTorch's CUDA build brings the Triton that belongs to it; its CPU build none, and the tests run the kernels there
    install_requires=["torch>=2.8", "numpy", "triton>=3.4; platform_system == 'Linux'"],
    extras_require={
        "train": TRAIN,
        "lora": LORA,
        "quantized": QUANTIZED,
        "examples": EXAMPLES,
        "bench": BENCH,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["kdfast=kdfast.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",  # no kernel has been timed on a GPU, and names have changed since 0.1
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: Microsoft :: Windows",
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: 3{minor}" for minor in ("", ".10", ".11", ".12", ".13")),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
