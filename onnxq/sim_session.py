"""What evaluation functions receive: a session of onnxruntime's face."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from onnxq.errors import ModelError, did_you_mean
from onnxq.signature import TensorSpec
from onnxq.spool import Spool

__all__ = ["Argument", "Runs", "SimSession"]


class Runs(Protocol):
    """What computes: a Session, or what has its face."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name."""


@dataclass(frozen=True)
class Argument:
    """An input or output, in the words of onnxruntime."""

    name: str
    shape: list[int | str | None]
    type: str


class SimSession:
    """What an evaluation function receives: it runs like an onnxruntime.InferenceSession.

    Args:
        session: What computes.
        spool: Where the feeds are kept while encodings are computed; None: nowhere.
    """

    def __init__(self, session: Runs, spool: Spool | None = None) -> None:
        self._session = session
        self._spool = spool

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: Any = None,
    ) -> list[np.ndarray]:
        """The outputs of these names, or all of them, in order.

        Args:
            output_names: The names; None for all.
            input_feed: Arrays by input name.
            run_options: Of onnxruntime; nothing of it changes results, so that it is not looked at.

        Raises:
            CalibrationError: The feed does not fit the model.
            ModelError: No output has such a name.
        """
        feed = {name: np.asarray(array) for name, array in input_feed.items()}
        found = self._session.run(feed)
        if self._spool is not None:
            self._spool.keep(feed)
        for name in output_names or ():
            if name not in found:
                hint = did_you_mean(name, found, f"outputs are {', '.join(found)}")
                raise ModelError(f"the model has no output {name!r}", fix=hint)
        return [found[name] for name in (output_names or found)]

    def get_inputs(self) -> list[Argument]:
        """The inputs: name, shape and type."""
        return [_argument(spec) for spec in self._session.inputs]

    def get_outputs(self) -> list[Argument]:
        """The outputs: name, shape and type."""
        return [_argument(spec) for spec in self._session.outputs]

    def get_providers(self) -> list[str]:
        """Where it runs."""
        return ["CPUExecutionProvider"]


def _argument(spec: TensorSpec) -> Argument:
    names = {"float32": "float", "float64": "double"}
    kind = "?" if spec.dtype is None else names.get(spec.dtype.name, spec.dtype.name)
    return Argument(spec.name, list(spec.shape or ()), f"tensor({kind})")
