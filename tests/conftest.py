"""Shared fixtures. `talkingface` is imported first, so that torchvision loads beside a CPU-only torch."""
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")

import pytest

import talkingface  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    "The checkout."
    return ROOT


@pytest.fixture(autouse=True)
def one_thread():
    "Results do not depend on the number of threads of the machine."
    import torch
    torch.set_num_threads(1)
