"""``gmail-lightning doctor``: what is installed and what this machine can do; works offline."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlparse

PACKAGES = (
    "gmail_lightning", "torch", "torchvision", "lightning", "torchmetrics", "open_clip_torch", "transformers",
    "diffusers", "pycocoevalcap", "jsonargparse", "pyarrow",
)  # fmt: skip


def report() -> str:
    """Lines about packages, devices, Java, disk, the embedded data and the hub."""
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    for package in PACKAGES:
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package}: NOT INSTALLED")
    return "\n".join([*lines, _torchvision(), *_devices(), _java(), _disk(), _embedded(), _hub()])


def _torchvision() -> str:
    try:
        import torchvision

        torchvision.ops.nms  # noqa: B018  a build for another torch fails here
    except (ImportError, RuntimeError, AttributeError) as error:
        return f"torchvision does not work with this torch: {error} (install both from one index)"
    return "torchvision works with this torch"


def _devices() -> list[str]:
    import torch

    lines = [f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        lines.append(f"cuda:{i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        lines.append("mps: available")
    return lines if len(lines) > 1 else [*lines, "no accelerator"]


def _java() -> str:
    java = shutil.which("java")
    if java is None:
        return "java: none (needed by METEOR, SPICE and the PTB tokenizer only)"
    try:
        answer = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"java: {java} does not answer ({error})"
    return f"java: {(answer.stderr or answer.stdout).splitlines()[0]}"


def _disk() -> str:
    usage = shutil.disk_usage(Path.cwd())
    return f"disk: {usage.free / 2**30:.0f} of {usage.total / 2**30:.0f} GiB free here"


def _embedded() -> str:
    here = Path(__file__).parent
    found = {
        "emoji images": (here / "datasets/emoji_pack/concepts.parquet").exists(),
        "emoji CLIP": (here / "models/emoji_clip/open_clip_model.safetensors").exists(),
    }
    return "embedded: " + ", ".join(f"{name} {'present' if there else 'MISSING'}" for name, there in found.items())


def _hub() -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return "hub: HF_HUB_OFFLINE is set; pretrained names must be local paths or in the cache"
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or "huggingface.co"
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError as error:
        return f"hub: {host} not reachable ({error}); give local paths, and set HF_HUB_OFFLINE=1 to fail at once"
    return f"hub: {host} reachable"
