"""What tests of maps and programs need of the machine."""

import os

import pytest

from knet.bpf import kernel
from knet.bpf.kernel import ARRAY, BpfError, BpfMap
from knet.bpf.objectfile import MapSpec


@pytest.fixture(scope="package")
def bpf() -> None:
    """Skips what needs bpf(2) where it can't be had."""
    if not kernel.is_known_machine():
        pytest.skip(f"no number of bpf(2) known for {os.uname().machine}")
    kernel.allow_memory()
    try:
        BpfMap.make("probe", MapSpec(ARRAY, 4, 4, 1, 0)).close()
    except BpfError as error:
        pytest.skip(f"the kernel makes no map (needs root, or CAP_BPF): {error.strerror}")
