"""The command line: a group of verbs, each a module of `onnxq.commands`.

Results go to stdout, progress to stderr.  Exit 0: done; 1: a known error, one line; 2: wrong usage;
130: interrupted.  A bug keeps its traceback.  Heavy imports live inside the commands, so that help
answers at once.
"""

from __future__ import annotations

import click

from onnxq.commands.analyze import analyze
from onnxq.commands.compare import compare
from onnxq.commands.compress import compress
from onnxq.commands.deploy import deploy
from onnxq.commands.doctor import doctor
from onnxq.commands.encodings import encodings
from onnxq.commands.group import Group
from onnxq.commands.inspect import inspect
from onnxq.commands.passes import passes
from onnxq.commands.quantize import quantize
from onnxq.commands.run import run
from onnxq.commands.zoo import zoo
from onnxq.version import __version__

__all__ = ["main"]


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Results go to stdout, progress to stderr. Exit codes: 0 done, 1 an error that the one"
    " line on stderr explains, 2 wrong usage, 130 interrupted.",
)
@click.version_option(__version__, prog_name="onnxq")
def main() -> None:
    """Model compression as passes over ONNX graphs.

    A first run, with a folder of typical inputs, then a look at what it did:
      onnxq quantize in.onnx out.onnx --calib samples/
      onnxq compare in.onnx out.onnx --data samples/

    `onnxq VERB --help` explains a verb with examples.
    """


for _verb in (
    *(quantize, compress, run, compare, analyze, inspect),
    *(doctor, encodings, deploy, zoo, passes),
):
    main.add_command(_verb)
