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

import gmail_lightning
from gmail_lightning.cache import cache_folder

PACKAGES = (
    "gmail_lightning", "torch", "torchvision", "lightning", "torchmetrics", "open_clip_torch", "transformers",
    "diffusers", "pycocoevalcap", "jsonargparse", "pyarrow",
)  # fmt: skip


def report() -> str:
    """Lines about packages, devices, Java and its tools, disk, the embedded data and the hub."""
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    for package in PACKAGES:
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package}: NOT INSTALLED")
    return "\n".join([*lines, _torchvision(), *_devices(), _java(), *_caption_metrics(), _disk(), _embedded(), _hub()])


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
    from gmail_lightning.metrics.captioning.java_tools import JavaError, find_java

    try:
        java = find_java()
        answer = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=20)
    except JavaError as error:
        return f"java: {error}; without it METEOR and SPICE are nan, and captions are split by the Python tokenizer"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"java: {java} does not answer ({error})"
    lines = (answer.stderr or answer.stdout).splitlines()
    if answer.returncode or not lines:
        return f"java: {java} does not work (exit code {answer.returncode}{f': {lines[-1]}' if lines else ''})"
    return f"java: {lines[0]}"


def _caption_metrics() -> list[str]:
    """Whether the Java tools have their files; they run only where Java does."""
    from gmail_lightning.metrics.captioning import java_tools, meteor

    lines = []
    for name, files in (
        ("PTB tokenizer", (java_tools.PTB_JAR,)),
        ("METEOR", (java_tools.METEOR_JAR, meteor.PARAPHRASES)),
        ("SPICE", (java_tools.SPICE_JAR, *java_tools.SPICE_MODELS)),
    ):
        try:
            for file in files:
                java_tools.packaged(file)
            lines.append(f"{name}: present")
        except java_tools.JavaError as error:
            lines.append(f"{name}: {error}")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    lines[-1] += f" (its heap may grow to {java_tools.SPICE_HEAP_GB} GB; this machine has {memory:.0f} GiB)"
    return [*lines, f"caption cache: {_cache(cache_folder())}"]


def _cache(folder: Path) -> str:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        return f"{folder} cannot be written; METEOR takes some seconds longer in each evaluation"
    made = any(folder.glob("meteor-*.arrow"))
    return f"{folder}, {'with' if made else 'without'} METEOR's table{'' if made else ', made at its first use'}"


def _disk() -> str:
    usage = shutil.disk_usage(Path.cwd())
    return f"disk: {usage.free / 2**30:.0f} of {usage.total / 2**30:.0f} GiB free here"


def _embedded() -> str:
    package = Path(gmail_lightning.__file__).parent
    found = {
        "emoji images": (package / "datasets/emoji/concepts.parquet").exists(),
        "emoji CLIP": (package / "models/emoji_clip/open_clip_model.safetensors").exists(),
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
