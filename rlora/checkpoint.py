"""What a run keeps on disk: adapters in PEFT's format, and the state to go on from."""

import os
import shutil
from pathlib import Path

from rlora.records import Adapter


def write_adapter(adapter: Adapter, directory: Path) -> Path:
    """Write `directory` in PEFT's format; it appears whole or not at all. Raises OSError where it can't be written."""
    half = directory.with_name(f".{directory.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    try:
        (half / "adapter_config.json").write_bytes(adapter.config)
        (half / "adapter_model.safetensors").write_bytes(adapter.weights)
        if directory.exists():
            shutil.rmtree(directory)
        os.rename(half, directory)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return directory
