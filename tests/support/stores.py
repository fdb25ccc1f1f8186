"""Object stores to test on: memory, and a real S3 server on the loopback behind a proxy."""

from __future__ import annotations

import subprocess
import sys
import uuid
from typing import Any

import fsspec
import torch.distributed.checkpoint as dcp
from fsspec.implementations.memory import MemoryFileSystem

from tailor_dcp import LayerwisePlanner, LayerwiseReader, LayerwiseWriter
from tests.support.runs import L0, L1, LAYERS, MODEL, due
from tests.support.s3_proxy import Proxy
from tests.support.world import flat, state

BUCKET = "bucket"


class S3:
    """A server in a process of its own, and the proxy before it, which fsspec is configured to use."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.s3_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdout is not None
        self.proxy = Proxy(int(self._process.stdout.readline()))
        self.proxy.start()
        self.options: dict[str, Any] = {
            "endpoint_url": self.proxy.url,
            "key": "who",
            "secret": "what",
            "client_kwargs": {"region_name": "us-east-1"},
            # Few tries and no waiting: what must fail in a test should do so soon.
            "config_kwargs": {"retries": {"max_attempts": 0, "mode": "legacy"}, "s3": {"addressing_style": "path"}},
        }
        fsspec.config.conf["s3"] = self.options
        fsspec.filesystem("s3").call_s3("create_bucket", Bucket=BUCKET)

    def close(self) -> None:
        """Stop the server."""
        fsspec.config.conf.pop("s3", None)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def uploads(self) -> list[str]:
        """Return the keys of uploads that were begun and neither completed nor given up."""
        found = fsspec.filesystem("s3").call_s3("list_multipart_uploads", Bucket=BUCKET)
        return [upload["Key"] for upload in found.get("Uploads", ())]


def trained(group: Any, options: dict[str, Any], url: str) -> dict[str, Any]:
    """Save three times to a URL as one of several ranks, and return what our reader and torch's load, both whole."""
    fsspec.config.conf["s3"] = options
    for step, layers in ((100, LAYERS), (200, (L0,)), (300, (L1,))):
        how = {"storage_writer": LayerwiseWriter(f"{url}/step-{step}"), "planner": LayerwisePlanner(due(*layers))}
        dcp.save(state(MODEL, step, group), process_group=group, **how)
    found: dict[str, Any] = {}
    for name, reader in (
        ("ours", LayerwiseReader(f"{url}/step-300", verify=True, atomic=True, process_group=group)),
        ("torch", None),
    ):
        target = state(MODEL, 0, group, empty=True)
        dcp.load(target, checkpoint_id=f"{url}/step-300", storage_reader=reader, process_group=group)
        found[name] = flat(target)
    return found


def s3_run() -> str:
    """Return the URL of a run that nobody else has."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}/run"


def memory_run() -> str:
    """Return the URL of a run in memory."""
    return f"memory://{uuid.uuid4().hex[:8]}/run"


def empty_memory() -> None:
    """Forget what is stored in memory."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
