"""QuantizationSimModel: simulate, compute encodings, evaluate, export, as users of AIMET know it.

>>> sim = onnxq.QuantizationSimModel("in.onnx")  # doctest: +SKIP
>>> sim.compute_encodings(evaluate, 500)  # doctest: +SKIP
>>> evaluate(sim.session, 500)  # doctest: +SKIP
>>> sim.export("out/", "model")  # doctest: +SKIP
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from onnxq import encodings_json
from onnxq.api import check_outputs
from onnxq.arithmetic import Arithmetic, level_of, session
from onnxq.calibration import Calibration
from onnxq.completion import completed
from onnxq.encoding import DTYPES, Encodings, Format
from onnxq.errors import CalibrationError, RecipeError, did_you_mean
from onnxq.fitting import channels, constants, fit, lacking, share_moves, without_moves
from onnxq.formats import WORDS, LayerFormat
from onnxq.model import Model
from onnxq.observed_session import ObservedSession
from onnxq.pass_manager import Context, Pass, PassManager
from onnxq.passes import Calibrate, Clean, FoldBatchNorm, InsertQDQ
from onnxq.placement import place
from onnxq.progress import Progress
from onnxq.report import Report
from onnxq.runtime import Level
from onnxq.sim_session import SimSession
from onnxq.spool import Spool
from onnxq.statistics import Method, Statistics, needs_histogram
from onnxq.targets import Target, target_named

__all__ = ["Exported", "QuantizationSimModel"]

# How AIMET calls the ways to choose a range.
_SCHEMES: dict[Any, Method] = {
    "min_max": "minmax",
    "tf": "minmax",
    "tf_enhanced": "mse",
    "post_training_tf": "minmax",
    "post_training_tf_enhanced": "mse",
    "post_training_percentile": "percentile",
}


@dataclass(frozen=True)
class Exported:
    """The files of an export; None for those that were not wanted."""

    encodings: Path
    model: Path | None
    qdq: Path | None


class QuantizationSimModel:
    """A float model that computes as its quantized version does, to the bit.

    What is rounded is what the target rounds: `model` is the float model with constants folded and
    BatchNormalization in the weights, and `session` runs the Q/DQ model that `export` writes.

    With ``arithmetic="integer"`` it runs as it will be deployed: onnxruntime makes integer kernels
    of Q/DQ where it has some, and the rest, types without kernels among it, computes in floats
    between Q and DQ.  Outputs are those of the exported file in a session of onnxruntime's
    defaults, on the CPU of this machine, whose kernels decide: on x86-64 without VNNI, sums of two
    products saturate at 16 bits, and the session shows that, too.

    With ``arithmetic="float"`` everything computes in floats between Q and DQ, with every constant
    as the float that its integers stand for, on any machine alike: outputs are those of the
    exported file in a session without optimizations.

    Types that the target has no kernels for, from 2 to 16 bits, are exact in both; `simulated_only`
    names them.

    Attributes:
        model: The float model with its encodings.
        report: What the passes did, and declined.

    Args:
        model: The float model, a file, a ModelProto or a Model; never changed.
        param_type: Format of weights: int2 to int16, one scale per output channel; int8/tensor for
            one in all, int4/block=32 for blocks where activations are float.
        activation_type: Format of activations, int2 to int16, or float. Zero points are free, and
            the integers written unsigned, as AIMET exports them.
        quant_scheme: How ranges of activations are chosen: min_max or tf_enhanced, AIMET's names,
            or a method of `onnxq.passes.Calibrate`.
        exclude: Globs on node names and operator types that stay in float.
        target: What the model is to run on.
        arithmetic: "integer", as deployed, or "float", as ONNX defines Q/DQ.
        level: How far onnxruntime optimizes the session; none: all for integers, which also run at
            "extended", and disabled for floats. There "all" is faster, and the same but for ties.
        seed: Seed of every random choice.
        threads: Threads for onnxruntime; 0 for all cores.
        progress: Where progress is shown.

    Raises:
        OnnxqError: Anything that the user can mend.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | onnx.ModelProto | Model,
        *,
        param_type: str = "int8",
        activation_type: str = "int8",
        quant_scheme: str = "tf_enhanced",
        exclude: Sequence[str] = (),
        target: str | Target = "ort-cpu",
        arithmetic: Arithmetic = "integer",
        level: Level | None = None,
        seed: int = 0,
        threads: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self._target = target_named(target)
        self._settings: dict[str, Any] = {"seed": seed, "threads": threads, "progress": progress}
        self._arithmetic, self._level = arithmetic, level_of(arithmetic, level)
        activations = _activations(activation_type)
        self._calibrate = Calibrate(
            weights=str(_weights(param_type)),
            activations=str(activations),
            method=_method(quant_scheme),
            exclude=tuple(exclude),
            exits="tensor",  # as in AIMET, which has no activations with scales per channel
            weight_only="all",
        )
        self._target.any_width.check(_weights(param_type), activations)
        self._frozen = Encodings()
        self._session: SimSession | None = None
        self._state: Any = None  # the encodings that the session was made with
        self.model, self.report = PassManager(Clean(), FoldBatchNorm())(
            model, target=self._target.any_width, **self._settings
        )

    # ---------------------------------------------------------------------- what is rounded

    def set_precision(
        self, selector: str, *, weights: str | None = None, activations: str | None = None
    ) -> None:
        """Give some tensors a format of their own, for the next `compute_encodings`.

        Args:
            selector: The name of a tensor; or layers: a glob on node names and operator types, or
                first, last or depthwise.
            weights: Format of the weights of these layers; of a tensor that is a weight. "float"
                leaves the layers in float.
            activations: Format of what they put out, or of the tensor. "float" leaves the nodes in
                float.

        Raises:
            RecipeError: A format that means nothing, or nothing that is so called.
        """
        step = self._calibrate
        layers = [x.name for x in self.model.layers() if x.weight_tensor.name == selector]
        if weights is None and activations is None:
            raise RecipeError("no format is given", fix="give weights, activations or both")
        if "float" in (weights, activations):
            step = replace(step, exclude=(*step.exclude, *self._floats(selector)))
            place(self.model, self._target.any_width, step.exclude)  # which knows near misses
        if weights not in (None, "float"):
            texts = [f"{s}={_weights(str(weights))}" for s in layers or [selector]]
            for text in texts:
                LayerFormat.parse(text).layers(self.model)
            step = replace(step, formats=(*step.formats, *texts))
        if activations not in (None, "float"):
            text = f"{selector}={_activations(str(activations))}"
            placement = place(self.model, self._target.any_width, step.exclude)
            LayerFormat.parse(text).activations(self.model, placement)
            step = replace(step, activation_formats=(*step.activation_formats, text))
        self._calibrate, self._session = step, None
        self.model.encodings = Encodings()

    def _floats(self, selector: str) -> list[str]:
        """What is to be excluded for a tensor, or layers, to stay in float."""
        tensor = self.model.tensors().get(selector)
        if tensor is not None:
            return [node.name for node in (*tensor.inputs, *tensor.outputs)]
        if selector in WORDS:
            return sorted(LayerFormat(selector, Format("int8")).layers(self.model))
        return [selector]

    def freeze(self, *names: str) -> None:
        """Keep the encodings of these tensors, globs, whatever samples are still to come.

        Raises:
            RecipeError: No tensor with an encoding is so called.
        """
        for glob in names:
            found = [n for n in self.encodings if n == glob or fnmatch.fnmatchcase(n, glob)]
            if not found:
                hint = did_you_mean(glob, self.encodings, "compute or load encodings first")
                raise RecipeError(f"{glob!r} matches no tensor with an encoding", fix=hint)
            self._frozen.replace({n: self.encodings[n] for n in found})

    @property
    def encodings(self) -> Encodings:
        """How each tensor is written; may be edited, which the next use of `session` obeys."""
        return self.model.encodings

    # ---------------------------------------------------------------------- where ranges come from

    def compute_encodings(
        self,
        inputs: Any = None,
        forward_pass_callback_args: Any = ...,
        *,
        forward_pass_callback: Callable[..., Any] | None = None,
    ) -> Report:
        """Choose the scale and zero point of every tensor.

        Two ways to give samples, as in AIMET::

            sim.compute_encodings(samples)             # anything that Calibration takes
            sim.compute_encodings(evaluate, 500)       # evaluate(session, 500) feeds them

        A callback gets a session that runs the float model, and what runs through it is observed on
        the way: once, in constant memory.  For ``tf_enhanced``, what is fed is kept in a temporary
        file, as ranges of inputs take a second look.

        Args:
            inputs: The samples; or the callback.
            forward_pass_callback_args: What the callback gets behind the session; left out:
                nothing.
            forward_pass_callback: The callback.

        Returns:
            What was done and what was declined.

        Raises:
            OnnxqError: Anything that the user can mend.
        """
        callback = forward_pass_callback
        if callback is None and callable(inputs) and not isinstance(inputs, Iterable):
            inputs, callback = None, inputs
        if (inputs is None) == (callback is None):
            raise CalibrationError("give samples, or a callback that feeds them: one of the two")
        statistics = None
        if callback is not None:
            inputs, statistics = self._fed(callback, forward_pass_callback_args)
        elif forward_pass_callback_args is not ...:
            raise CalibrationError("arguments of a callback, but no callback")
        self.model.encodings, self._session = Encodings(), None
        self._run([self._calibrate], inputs, statistics=statistics)
        self._obey_frozen()
        return self.report

    def _fed(self, callback: Callable[..., Any], argument: Any) -> tuple[Spool | None, Statistics]:
        """What a callback feeds to the float model, if it is looked at again, and statistics."""
        step, model = self._calibrate, self.model.clone()
        if model.opset < 13:
            model.raise_opset(13)
        names = step.observed(model, self._target.any_width)
        spool = Spool(iter(())) if step.method == "mse" else None
        threads = self._settings["threads"]
        given = () if argument is ... else (argument,)
        histogram = needs_histogram(step.method)
        with ObservedSession(model, names, histogram=histogram, threads=threads) as observed:
            callback(SimSession(observed, spool), *given)
            if not observed.count:
                raise CalibrationError(
                    "the callback fed nothing to the session",
                    fix="let it call session.run(None, feed) for each sample",
                )
            return spool, observed.statistics()

    def _obey_frozen(self) -> None:
        """Give frozen tensors their encodings, and what is moved from or to them, too."""
        frozen = self._frozen.copy()
        share_moves(self.model, frozen, self._target)
        known = self.model.encodings
        known.replace({name: e for name, e in frozen.items() if name in known})

    def load_encodings(
        self,
        encodings: str | os.PathLike[str] | Encodings,
        *,
        strict: bool = True,
        freeze: bool = False,
    ) -> list[str]:
        """Take encodings of a file, AIMET's or onnxq's, in place of samples.

        Nodes of which the file leaves a tensor out stay in float.

        Args:
            encodings: The file, or encodings.
            strict: Whether names that the model does not have are an error.
            freeze: Whether `compute_encodings` is to keep them, so as to fill in what is missing.

        Returns:
            What was left out, added, or stays in float, one sentence each.

        Raises:
            OnnxqError: The file does not fit the model; nothing of it is taken then.
        """
        where: object = "the encodings"
        if not isinstance(encodings, Encodings):
            where, encodings = encodings, encodings_json.load(encodings, channels(self.model))
        if self.model.opset < 13:
            self.model.raise_opset(13)
        target = self._target.any_width
        found, notes = fit(self.model, encodings, target, where, strict=strict)
        self.model.encodings, self._session = found, None
        if freeze:
            self._frozen.replace(found)
        return [*notes, *(f"{node}: {why}" for node, why in lacking(self.model, target))]

    def apply(self, *steps: Pass, inputs: Any = None) -> Report:
        """Run passes on the model and its encodings, such as AdaRound() once they are computed.

        Args:
            *steps: The passes.
            inputs: Samples, for passes that need them.

        Returns:
            What was done and what was declined.
        """
        self._run(steps, inputs)
        self._session = None
        return self.report

    def _run(
        self, steps: Sequence[Pass], inputs: Any, statistics: Statistics | None = None
    ) -> None:
        data = None if inputs is None or isinstance(inputs, Calibration) else Calibration(inputs)
        self.model, self.report = PassManager(*steps)(
            self.model,
            data or inputs,
            target=self._target.any_width,
            statistics=statistics,
            **self._settings,
        )

    # ---------------------------------------------------------------------- what comes out

    @property
    def session(self) -> SimSession:
        """The simulation, to be run like an onnxruntime session.

        Raises:
            CalibrationError: There are no encodings yet.
        """
        known = self.model.encodings
        state = dict(known.tensors), dict(known.float_nodes)
        if self._session is None or self._state != state:
            self._state = state
            options = {} if self._arithmetic == "integer" else {"stored": "int8"}
            threads = self._settings["threads"]
            self._session = SimSession(
                session(self._written(**options), self._arithmetic, self._level, threads)
            )
        return self._session

    @property
    def simulated_only(self) -> dict[str, str]:
        """The tensors that the target has no integer kernels for -> their type."""
        real = {*self._target.activations}
        weights = {w for a in real for w in self._target.weight_types(a)}
        fixed = constants(self.model)
        return {
            name: e.dtype
            for name, e in self.model.encodings.items()
            if e.dtype not in (real | weights if name in fixed else real)
        }

    def to_onnx_qdq(self) -> Model:
        """The model with QuantizeLinear and DequantizeLinear, as the target runs it."""
        return self._written()

    def export(
        self,
        path: str | os.PathLike[str],
        filename_prefix: str,
        export_model: bool = True,
        *,
        encoding_version: str = "1.0.0",
        complete: Any = None,
    ) -> Exported:
        """Write the encodings, the float model that they belong to, and the Q/DQ model.

        The files are PREFIX.encodings, PREFIX.onnx and PREFIX.qdq.onnx; each appears whole or not
        at all.

        Args:
            path: The folder.
            filename_prefix: How the names of the files begin.
            export_model: Whether to write the models, too.
            encoding_version: 0.6.1, 1.0.0 or 2.0.0.
            complete: Samples, so that the encodings name every tensor that AIMET's default
                configuration quantizes, and no other, as its ``strict=True`` wants: also those that
                no integer kernel needs, which then are rounded there. None: what is rounded here.

        Raises:
            OnnxqError: A file cannot be written, or the version has no words for an encoding.
        """
        folder = Path(path)
        files = Exported(
            folder / f"{filename_prefix}.encodings",
            folder / f"{filename_prefix}.onnx" if export_model else None,
            folder / f"{filename_prefix}.qdq.onnx" if export_model else None,
        )
        check_outputs((files.encodings, files.model, files.qdq), models=[self.model.path])
        written = self._written()
        known = self.model.encodings
        if complete is not None:
            ctx = Context(complete, target=self._target.any_width, **self._settings)
            known, notes = completed(self.model, known, ctx, self._calibrate.method)
            self.report.notes.extend(notes)
        elif encoding_version in encodings_json.OLD:
            known = without_moves(self.model, known, self._target)
        text = encodings_json.dumps(known, encoding_version, constants(self.model))
        if files.model is not None and files.qdq is not None:
            self.model.save(files.model)
            written.save(files.qdq)
        encodings_json.write(text, files.encodings)
        return files

    def _written(self, **options: Any) -> Model:
        if not self.model.encodings:
            raise CalibrationError(
                "there are no encodings yet", fix="call compute_encodings or load_encodings first"
            )
        written = self.model.clone()
        InsertQDQ(**options).apply(written, Context(target=self._target.any_width))
        written.check()
        return written


# ---------------------------------------------------------------------- names of other programs


def _weights(text: str) -> Format:
    """A format of weights; a type alone has a scale per output channel."""
    wanted = Format.parse(text)
    if "/" in text or wanted.dtype == "float":
        return wanted
    return replace(wanted, granularity="channel")


def _activations(text: str) -> Format:
    """A format of activations: unsigned, whatever its sign."""
    wanted = Format.parse(text)
    if wanted.dtype == "float":
        return wanted
    return replace(wanted, dtype=f"uint{DTYPES[wanted.dtype][0]}")


def _method(scheme: Any) -> Method:
    """A method by its name, or AIMET's, also of a member of its enumeration."""
    name = getattr(scheme, "name", scheme)
    method: Method = _SCHEMES.get(name, name)
    return method
