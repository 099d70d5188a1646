"""Packaging. ``kernels/`` is installed as ``fastbf.kernels``; nothing else goes to the top level."""

from pathlib import Path

from setuptools import setup

PACKAGES = ("distributed", "kernels", "modules", "torch_backend", "triton_backend")
here = Path(__file__).parent
version = {}
exec((here / "fastbf" / "version.py").read_text(encoding="utf-8"), version)

setup(
    name="fastbf",
    version=version["__version__"],
    description="BatchFormer (CVPR 2022) at speed: batch-axis attention and the shared classifier for PyTorch",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        "fastbf",
        "fastbf.kernels",
        "fastbf.distributed",
        "fastbf.modules",
        "fastbf.torch_backend",
        "fastbf.triton_backend",
    ],
    package_dir={"fastbf": "fastbf", "fastbf.kernels": "kernels"},
    package_data={"fastbf": ["py.typed"]},
    install_requires=["torch>=2.10", "triton>=3.6; platform_system == 'Linux'"],
    extras_require={
        "demo": ["matplotlib", "scikit-learn", "tqdm"],
        "bench": ["matplotlib", "pytest", "pytest-benchmark", "tqdm"],
        "test": [
            "expecttest",
            "numpy",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "ruff",
            "build",
            "matplotlib",
            "scikit-learn",
            "tqdm",
        ],
        "timm": ["timm"],
        "ecosystem": ["accelerate", "lightning", "torchmetrics"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
