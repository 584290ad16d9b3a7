"""What each runtime executes in integers: one contract per target, as data.

Each fact has its source in the contract's `source`; docs/targets.md shows all of it as a table.
"""

from __future__ import annotations

from dataclasses import replace

from onnxq.contract import Kernel, Storage, Target
from onnxq.errors import TargetError, did_you_mean

__all__ = ["TARGETS", "Kernel", "Storage", "Target", "target_named"]

LAYER = Kernel("layer")
ELEMENTWISE = Kernel("elementwise")
MOVE = Kernel("move")
JOIN = Kernel("join")


def target_named(name: str | Target) -> Target:
    """The target of a name.

    Raises:
        TargetError: No target has that name.
    """
    if isinstance(name, Target):
        return name
    if name in TARGETS:
        return TARGETS[name]
    hint = did_you_mean(name, TARGETS, f"targets are {', '.join(TARGETS)}")
    raise TargetError(f"no target {name!r}", fix=hint)


def _all(kernel: Kernel, *operators: str) -> dict[str, Kernel]:
    return dict.fromkeys(operators, kernel)


def _handed_over(kernels: dict[str, Kernel], taken: dict[str, Kernel]) -> dict[str, Kernel]:
    """The kernels that a provider takes, and those that it leaves to the CPU provider."""
    return {op: taken.get(op, replace(k, elsewhere=True)) for op, k in {**kernels, **taken}.items()}


# ---------------------------------------------------------------------- ONNX Runtime's CPU provider

_CPU_KERNELS = {
    **_all(LAYER, "Conv"),
    **_all(Kernel("layer", float_output=True), "Gemm", "MatMul"),
    **_all(ELEMENTWISE, "Add", "Mul", "AveragePool", "GlobalAveragePool"),
    **_all(ELEMENTWISE, "LeakyRelu", "Sigmoid", "Softmax"),
    **_all(JOIN, "Concat"),
    **_all(MOVE, "DepthToSpace", "Expand", "Flatten", "Gather", "MaxPool", "Reshape", "Resize"),
    **_all(MOVE, "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    **_all(Kernel("move", bare=True), "Pad"),
}

_CPU = Target(
    name="ort-cpu",
    summary="ONNX Runtime's CPU provider wherever it runs: desktop, server and mobile",
    kernels=_CPU_KERNELS,
    activations=("uint8", "int8"),
    pairs=frozenset({("uint8", "int4"), ("uint8", "int8"), ("uint8", "uint8"), ("int8", "int8")}),
    per_channel=frozenset({"int8", "uint8"}),
    cpu=True,
    stored="packed",
    weight_only=frozenset({"MatMul", "Gemm"}),
    source=(
        "probes of the graphs that onnxruntime 1.32 makes at level EXTENDED",
        "onnxruntime/core/optimizer/qdq_transformer/selectors_actions/qdq_selectors.cc",
    ),
    remarks=(
        "On x86-64, int8 activations become uint8 as the model is loaded; with"
        " session.qdqisint8allowed=1 they stay, and run slower.",
        "16-bit activations run in float.",
    ),
)

_X64 = replace(
    _CPU,
    name="ort-x64",
    summary="ONNX Runtime's CPU provider on x86-64 with VNNI (AVX512-VNNI, AVX-VNNI, AMX)",
    source=(*_CPU.source, "onnxruntime/core/mlas/lib/platform.cpp (which kernels run where)"),
    remarks=(*_CPU.remarks, "VPDPBUSDS adds products of 8 bits in 32: nothing overflows."),
)

_X64_AVX2 = replace(
    _X64,
    name="ort-x64-avx2",
    summary="ONNX Runtime's CPU provider on x86-64 with AVX2 or AVX512, without VNNI",
    saturates=True,
    source=(
        *_CPU.source,
        "onnxruntime/core/mlas/lib/x86_64/QgemmU8X8KernelAvx2.S, ConvSymKernelAvx2.S,"
        " QgemvU8S8KernelAvx2.S (VPMADDUBSW)",
        "onnxruntime/core/providers/cpu/quantization/qlinearconv.cc (order of weights)",
    ),
    remarks=(
        *_CPU.remarks,
        "VPMADDUBSW adds neighbouring products of uint8 and int8 in 16 bits, which saturate; the"
        " pass reduce-range gives 7-bit weights to the layers that this happens to. Weights of"
        " type uint8 are multiplied exactly, by slower kernels, as are depthwise convolutions.",
    ),
)

_ARM64 = replace(
    _CPU,
    name="ort-arm64",
    summary="ONNX Runtime's CPU provider on 64-bit ARM: servers, laptops, phones",
    arm=True,
    source=(
        *_CPU.source,
        "probes with session.qdqisint8allowed=1, as onnxruntime has it on ARM",
        "onnxruntime/quantization/quantize.py, quantize_static (its advice: int8)",
    ),
    remarks=(
        "uint8 and int8 activations give the same numbers, and both have kernels. uint8 is the"
        " default because what leaves the integers may then have a scale per channel.",
        "16-bit activations run in float.",
    ),
)

_MOBILE = replace(
    _ARM64,
    name="ort-mobile",
    summary="ONNX Runtime in an Android or iOS app, on the processor's CPU",
    source=(*_ARM64.source, "docs/mobile.md (what was tried with .ort files)"),
    remarks=(
        *_ARM64.remarks,
        "Weights packed in 4 bits stay packed in .onnx files; .ort files hold them in bytes.",
    ),
)

# ---------------------------------------------------------------------- providers on phones

_XNNPACK = replace(
    _CPU,
    name="xnnpack",
    summary="ONNX Runtime's XNNPACK provider on phones; the rest runs on the CPU provider",
    kernels=_handed_over(
        _CPU_KERNELS,
        {
            **_all(LAYER, "Conv"),
            **_all(Kernel("layer", per_channel=False), "ConvTranspose"),
            **_all(ELEMENTWISE, "AveragePool"),
            **_all(Kernel("elementwise", results=(("uint8", 1 / 256, 0),)), "Softmax"),
            **_all(MOVE, "MaxPool", "Resize"),
        },
    ),
    activations=("int8", "uint8"),
    pairs=frozenset({("int8", "int8"), ("uint8", "uint8")}),
    per_channel=frozenset({"int8"}),
    cpu=False,
    keeps_activation=False,
    fixed_sizes=True,
    arm=True,
    stored="int8",
    source=(
        "onnxruntime/core/providers/xnnpack/detail/utils.cc (types; u8s8 is not handled)",
        "onnxruntime/core/providers/xnnpack/nn/conv_base.cc (2-D, weight and bias constant)",
        "onnxruntime/core/providers/xnnpack/math/softmax.cc (uint8, scale 1/256)",
        "onnxruntime/core/providers/xnnpack/detail/node_support_checker.cc (no Relu fused in Q/DQ)",
    ),
    remarks=(
        "int8 weights have a scale per channel with int8 activations only, so those are the"
        " default.",
        "Convolutions and pooling of other than two dimensions run on the CPU provider.",
    ),
)

_NNAPI = replace(
    _CPU,
    name="nnapi",
    summary="ONNX Runtime's NNAPI provider on Android; the rest runs on the CPU provider",
    kernels=_handed_over(
        _CPU_KERNELS,
        {
            **_all(LAYER, "Conv"),
            **_all(Kernel("layer", per_channel=False), "Gemm", "MatMul"),
            **_all(ELEMENTWISE, "Add", "Mul", "AveragePool"),
            **_all(Kernel("elementwise", results=(("uint8", 1 / 256, 0),)), "Softmax"),
            **_all(JOIN, "Concat"),
            **_all(MOVE, "Transpose", "Reshape", "Resize"),
        },
    ),
    activations=("uint8",),
    pairs=frozenset({("uint8", "int8"), ("uint8", "uint8")}),
    per_channel=frozenset({"int8"}),
    cpu=False,
    opset=23,
    keeps_activation=False,
    fixed_sizes=True,
    arm=True,
    stored="int8",
    weight_only=frozenset(),
    source=(
        "onnxruntime/core/providers/nnapi/nnapi_builtin/builders/helper.cc (operators, types:"
        " uint8 activations only, uint8 or int8 weights, zero point 0)",
        "onnxruntime/core/providers/nnapi/nnapi_builtin/builders/impl/base_op_builder.h (opset)",
    ),
    remarks=(
        "Scales per channel take Android 10 (API level 29) and are for Conv alone.",
        "Google has deprecated NNAPI since Android 15.",
    ),
)

_QNN = Target(
    name="qnn",
    summary="ONNX Runtime's QNN provider on the HTP of Qualcomm's chips, 8 and 16 bits",
    kernels={
        **_all(LAYER, "Conv", "ConvTranspose"),
        **_all(Kernel("layer", per_channel=False), "Gemm", "MatMul"),
        **_all(ELEMENTWISE, "Abs", "Add", "AveragePool", "Clip", "Div", "Elu", "Exp", "Gelu"),
        **_all(ELEMENTWISE, "GlobalAveragePool", "GlobalMaxPool", "HardSigmoid", "HardSwish"),
        **_all(ELEMENTWISE, "LeakyRelu", "LogSoftmax", "Max", "Min", "Mul", "Neg", "PRelu", "Pow"),
        **_all(ELEMENTWISE, "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Relu", "Resize"),
        **_all(ELEMENTWISE, "Softmax", "Sqrt", "Sub"),
        **_all(
            Kernel("elementwise", results=(("uint16", 1 / 65536, 0), ("int16", 1 / 32768, 0))),
            "Sigmoid",
        ),
        **_all(
            Kernel("elementwise", results=(("uint16", 1 / 32768, 32768), ("int16", 1 / 32768, 0))),
            "Tanh",
        ),
        **_all(JOIN, "Concat"),
        **_all(MOVE, "DepthToSpace", "Expand", "Flatten", "Gather", "MaxPool", "Pad", "Reshape"),
        **_all(MOVE, "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    },
    activations=("uint8", "uint16", "int16"),
    pairs=frozenset(
        {
            *(("uint8", "uint8"), ("uint8", "int8")),
            *(("uint16", "uint8"), ("uint16", "int8"), ("int16", "int8")),
        }
    ),
    opset=24,
    whole=True,
    keeps_activation=False,
    fixed_sizes=True,
    source=(
        "onnxruntime/quantization/execution_providers/qnn/quant_config.py of onnxruntime 1.32"
        " (MatMul per tensor, results of 16-bit Sigmoid and Tanh)",
        "onnxruntime.ai/docs/execution-providers/QNN-ExecutionProvider (operators, types)",
        "docs.qualcomm.com, Supported ONNX Ops (opset), QNN HTP Op Support Revision History",
    ),
    remarks=(
        "Nodes in float run on the CPU, at the cost of a copy each way, so everything that has a"
        " kernel is put into integers, the model's outputs, too.",
        "onnxruntime's CPU provider runs 16-bit activations in float: it shows their accuracy, not"
        " their speed.",
        "Normalizations by layer, instance or group stay in float.",
    ),
)

# ---------------------------------------------------------------------- other runtimes

_TENSORRT = Target(
    name="tensorrt",
    summary="NVIDIA TensorRT, explicit quantization, alone or as ONNX Runtime's provider",
    kernels={
        **_all(Kernel("layer", float_output=True), "Conv", "ConvTranspose", "Gemm", "MatMul"),
        **_all(ELEMENTWISE, "Add", "AveragePool", "GlobalAveragePool"),
        **_all(JOIN, "Concat"),
        **_all(MOVE, "Expand", "Flatten", "Gather", "MaxPool", "Reshape", "Slice", "Split"),
        **_all(MOVE, "Squeeze", "Transpose", "Unsqueeze"),
    },
    activations=("int8",),
    pairs=frozenset({("int8", "int8")}),
    symmetric=True,
    bias="float",
    opset=25,
    source=(
        "docs.nvidia.com/deeplearning/tensorrt, Working with Quantized Types (int8, symmetric)",
        "docs.nvidia.com/deeplearning/tensorrt, Explicit Quantization; ONNX Opset Guide",
        "onnx-tensorrt, ModelImporter.cpp (DequantizeLinear takes no int32, so biases are float)",
    ),
    remarks=("A Relu keeps its place: TensorRT fuses it, and zero points are 0.",),
)

_OPENVINO = Target(
    name="openvino",
    summary="OpenVINO, low precision transformations, on Intel's CPUs and GPUs",
    kernels={
        **_all(Kernel("layer", float_output=True), "Conv", "ConvTranspose", "MatMul", "Gemm"),
        **_all(ELEMENTWISE, "Add", "Mul", "AveragePool", "GlobalAveragePool"),
        **_all(JOIN, "Concat"),
        **_all(MOVE, "DepthToSpace", "Expand", "Flatten", "MaxPool", "Reshape", "Slice", "Split"),
        **_all(MOVE, "Squeeze", "Transpose", "Unsqueeze"),
    },
    activations=("uint8", "int8"),
    pairs=frozenset({("uint8", "int8"), ("int8", "int8")}),
    bias="float",
    source=(
        "docs.openvino.ai, OpenVINO Low Precision Transformations (types, operators)",
        "docs.openvino.ai, Low Precision IR (INT8 Inference)",
    ),
    remarks=("Biases are added behind the dequantization, so they stay in float.",),
)

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        *(_CPU, _X64, _X64_AVX2, _ARM64, _MOBILE),
        *(_XNNPACK, _NNAPI, _QNN, _TENSORRT, _OPENVINO),
    )
}
