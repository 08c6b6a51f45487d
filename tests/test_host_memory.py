"""The allocator setting that makes large temporaries cheap on CPU."""

import platform
import resource

import numpy as np

from sif_jax.parallel.host_memory import keep_freed_memory


def page_faults_of_a_large_temporary() -> int:
    np.ones(2**23).sum()  # 64 MB; the first one may have to grow the heap
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**23).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_large_temporary_is_paged_in_only_once():
    kept = keep_freed_memory()
    assert kept == (platform.libc_ver()[0] == "glibc")
    if kept:
        assert page_faults_of_a_large_temporary() < 100  # 16384 pages of 4 kB without the setting
