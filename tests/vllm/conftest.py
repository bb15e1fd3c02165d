"""Tests of the plug-in, in vLLM's own environment (`make test-vllm`); skipped where vLLM is not installed."""

import importlib.util
import os

import pytest

HAS_VLLM = (found := importlib.util.find_spec("vllm")) is not None and found.origin is not None
if HAS_VLLM:  # one engine after another in this process, without threads of its own on chosen cores
    os.environ |= {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_VLLM:
        mark = pytest.mark.skip(reason="vLLM has an environment of its own: bash scripts/vllm_env.sh; make test-vllm")
        for item in items:
            if item.path.parent.name == "vllm":
                item.add_marker(mark)
