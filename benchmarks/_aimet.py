"""aimet-onnx's side of simulation.py, run by a Python that has it; needs nothing of onnxq.

    PYTHON benchmarks/_aimet.py FLOAT.onnx ENCODINGS SAMPLES.npz FOLDER THREADS

Prints a line of JSON: the ends of the range of every quantizer, with the encodings of the file.
Then, for each empty line that it reads, runs the first sample and prints how many milliseconds that
took. At the line "calibrate" it computes encodings from all the samples, writes FOLDER/theirs.onnx
and .encodings, and prints the ranges again.
"""

import json
import os
import sys
import time

# answers have a stream of their own: native code prints, too
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import numpy as np  # noqa: E402 - once nothing else goes to the answers
import onnx  # noqa: E402
from aimet_onnx import QuantizationSimModel  # noqa: E402
from aimet_onnx.quantsim import load_encodings_to_sim  # noqa: E402


def main(model, encodings, samples, folder, threads):
    options = {"intra_op_num_threads": int(threads)}
    sim = QuantizationSimModel(onnx.load(model), session_options_kwargs=options)
    load_encodings_to_sim(sim, encodings, strict=False)
    with np.load(samples) as arrays:
        feeds = {}
        for key in arrays:
            index, name = key.split("/", 1)
            feeds.setdefault(int(index), {})[name] = arrays[key]
    say(ranges(sim))
    for line in sys.stdin:
        if line.strip() == "calibrate":
            sim.compute_encodings([feeds[i] for i in sorted(feeds)])
            sim.export(folder, "theirs")
            say(ranges(sim))
        else:
            start = time.perf_counter()
            sim.session.run(None, feeds[0])
            say((time.perf_counter() - start) * 1e3)


def ranges(sim):
    """Name of each quantizer that is on -> the least and the greatest value of each scale."""
    found = {}
    for name, quantizer in sim.qc_quantize_op_dict.items():
        if quantizer.enabled:
            known = quantizer.get_encodings() or []
            found[name] = [[e.min for e in known], [e.max for e in known]]
    return found


def say(value):
    print(json.dumps(value), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
