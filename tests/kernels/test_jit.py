import importlib
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import onnx
import pytest

import onnxq
from onnxq.kernels import _jit, observe
from onnxq.pass_manager import Changes
from onnxq.progress import Silent
from tests.models import feeds, parse

KERNELS = Path(__file__).parents[2] / "kernels"
MODULES = [f"onnxq.kernels.{file.stem}" for file in sorted(KERNELS.glob("[!_]*.py"))]

pytestmark = pytest.mark.skipif(numba.config.DISABLE_JIT, reason="kernels run as Python")


def dispatchers(*modules):
    for module in modules:
        importlib.import_module(module)
    return [k for k in _jit._kernels if k.__module__ in modules]


@pytest.mark.parametrize("module", MODULES)
def test_kernels_call_only_kernels_of_their_own_file(module):
    # Numba's cache does not notice an edit of a function in another file
    for kernel in dispatchers(module):
        for name in kernel.py_func.__code__.co_names:
            called = kernel.py_func.__globals__.get(name)
            if isinstance(called, numba.core.dispatcher.Dispatcher):
                assert called.__module__ == kernel.__module__, (kernel, name)


def test_kernels_release_the_lock():
    for kernel in dispatchers(observe.__name__):
        assert kernel.targetoptions["nogil"]
        assert not kernel.targetoptions["parallel"]


class Fresh:
    """A module with a kernel that no cache has seen."""

    def __init__(self, folder):
        self.file = folder / "fresh.py"
        self.file.write_text(
            "from onnxq.kernels._jit import kernel\n\n\n@kernel\ndef double(x: float) -> float:\n"
            "    return 2 * x\n"
        )

    def said(self):
        """What is said while a new process, as it were, calls the kernel twice."""
        said = []
        module = importlib.reload(importlib.import_module("fresh"))
        with _jit.announced(said.append):
            assert module.double(2.0) == 4
            assert module.double(3) == 6
        return said


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(_jit, "_kernels", [])
    monkeypatch.setattr(_jit, "_CACHE", True)
    yield Fresh(tmp_path)
    sys.modules.pop("fresh", None)


def test_compilation_is_announced_once(fresh):
    assert fresh.said() == ["compiling kernels, once for this installation..."]
    assert fresh.said() == []  # found on the disk
    text = fresh.file.read_text().replace("2 * x", "x + x  # edited")
    fresh.file.write_text(text)  # which retires it
    assert fresh.said() == ["compiling kernels, once for this installation..."]


def test_compilation_that_is_not_kept_is_announced_as_such(fresh, monkeypatch):
    njit = numba.njit

    def refuses(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", refuses)
    for _ in range(2):
        assert fresh.said() == ["compiling kernels, at every run, as no cache keeps them..."]


def test_passes_from_python_announce_it_too(fresh):
    class Doubling:
        name = "doubling"

        def apply(self, model, ctx):
            importlib.import_module("fresh").double(2.0)
            return Changes()

    class Listener(Silent):
        def say(self, line):
            said.append(line)

    said = []
    model = parse("g (float[1,2] x) => (float[1,2] y) { y = Relu(x) }")
    onnxq.PassManager(Doubling(), Doubling())(model, progress=Listener())
    assert said == ["compiling kernels, once for this installation..."]


def test_other_compilation_is_not_announced(fresh):
    said = []
    with _jit.announced(said.append):
        assert numba.njit(lambda x: 3 * x)(2) == 6
    assert said == []


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


GRAPHS = {
    "conv and gate": """g (float[N,4,6,6] x) => (float[] y) <float[8,2,3,3] w> {
        h = Conv<group=2, pads=[1,1,1,1], strides=[2,2]>(x, w)
        s = Sigmoid(h)
        y = Mul(h, s)
    }""",
    "rows": """g (float[N,6,12] x) => (float[] y)
        <float[4,6,3] w, float[4] b, float[10,5] v, float[5,7] u, float[7] c> {
        h = Conv(x, w, b)
        m = MatMul(h, v)
        r = ReduceMean<axes=[1], keepdims=0>(m)
        y = Gemm(r, u, c)
    }""",
}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("options", [{}, {"activations": "int8"}, {"method": "entropy"}])
def test_a_run_needs_each_kernel_in_one_form(graph, options, tmp_path):
    # else a second one would be compiled: to Numba a read-only array is of another type, say
    proto = parse(GRAPHS[graph])
    onnx.save(proto, tmp_path / "m.onnx")
    samples = [feeds(proto, seed=seed) for seed in range(4)]
    samples[0]["x"].flags.writeable = False
    _, report = onnxq.quantize(tmp_path / "m.onnx", None, samples, **options)
    assert any("rounded by output error" in done for p in report.passes for done in p.changes.done)
    kernels = dispatchers(*MODULES)
    assert sum(len(k.signatures) for k in kernels) > 3
    assert [(k, k.signatures) for k in kernels if len(k.signatures) > 1] == []


def test_arrays_that_must_not_be_written_are_no_other_type():
    array = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    view = _jit.read_only(array)
    assert np.shares_memory(array, view)
    assert array.flags.writeable
    assert numba.typeof(view) == numba.typeof(_jit.read_only(view)) != numba.typeof(array)
