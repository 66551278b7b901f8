"""Where models run: on a GPU if there is one, unless a user says otherwise. One answer for training, measuring and trying alike."""

import os

import torch

USE_CPU = "ACCELERATE_USE_CPU"
"""Environment variable that keeps everything on the CPU; `accelerate launch --cpu` sets it."""
YES = ("1", "true", "yes", "on", "y", "t")


def default_device() -> str:
    """Return "cuda" where PyTorch sees a GPU and ACCELERATE_USE_CPU does not say no, else "cpu"."""
    asked_for_cpu = os.environ.get(USE_CPU, "").lower() in YES
    return "cuda" if torch.cuda.is_available() and not asked_for_cpu else "cpu"
