import importlib
import os
import subprocess
import sys

import numba
import numpy as np
import pytest

from onnxq.kernels import _jit, observe, ranges

pytestmark = pytest.mark.skipif(numba.config.DISABLE_JIT, reason="kernels run as Python")


def dispatchers(module):
    return [k for k in _jit._kernels if k.__module__ == module.__name__]


@pytest.mark.parametrize("module", [observe, ranges])
def test_kernels_call_only_kernels_of_their_own_file(module):
    # Numba's cache does not notice an edit of a function in another file
    for kernel in dispatchers(module):
        for name in kernel.py_func.__code__.co_names:
            called = kernel.py_func.__globals__.get(name)
            if isinstance(called, numba.core.dispatcher.Dispatcher):
                assert called.__module__ == kernel.__module__, (kernel, name)


def test_kernels_release_the_lock():
    for kernel in dispatchers(observe):
        assert kernel.targetoptions["nogil"]
        assert not kernel.targetoptions["parallel"]


def test_compiled_kernels_are_ready():
    observe.moments(np.ones(3, np.float32))
    assert all(_jit._ready(k) for k in dispatchers(observe) if k.signatures)
    assert not _jit.needs_compilation()


def test_fresh_kernels_are_not_ready(monkeypatch, tmp_path):
    file = tmp_path / "fresh.py"
    file.write_text(
        "from onnxq.kernels._jit import kernel\n\n\n@kernel\ndef double(x: float) -> float:\n"
        "    return 2 * x\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(_jit, "_kernels", [])
    monkeypatch.setattr(_jit, "_CACHE", True)
    module = importlib.import_module("fresh")
    assert _jit.needs_compilation(module)
    assert module.double(2.0) == 4
    assert not _jit.needs_compilation(module)
    importlib.reload(module)  # loads it from the disk
    assert not _jit.needs_compilation(module)
    assert not module.double.signatures
    os.utime(file, ns=(2**62, 2**62))  # an edit retires it
    assert _jit.needs_compilation(module)


def test_no_folder_for_the_cache(monkeypatch):
    njit = numba.njit

    def refuses(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(_jit, "_CACHE", True)
    monkeypatch.setattr(_jit, "_kernels", [])
    monkeypatch.setattr(numba, "njit", refuses)
    double = _jit.kernel(lambda x: 2 * x)
    assert not _jit._ready(double)
    assert double(2) == 4
    assert _jit._ready(double)


def test_switches():
    code = (
        "import numpy as np\nfrom onnxq.kernels import _jit, observe\n"
        "print(observe.moments(np.ones(3, np.float32)).total, _jit._CACHE)\n"
    )
    switches = {"ONNXQ_NUMBA_CACHE": "0", "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | switches,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["3.0", "False"]
