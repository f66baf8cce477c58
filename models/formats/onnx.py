"""ONNX: a graph of operators, run by onnxruntime on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from millpond.models.features import Features
from millpond.models.formats.model_file import ExtraMissing, ModelFileRefused, library, one_per_row, read_file

__all__ = ["OnnxPredictor", "save_onnx"]

_FLOATS = {"tensor(float)": np.float32, "tensor(double)": np.float64}

#: Of onnx.proto what is checked and what leads there: message to field, its number and type.
_PROTO = {
    "Model": {
        "graph": (7, "Graph"), "opset_import": (8, "Opset"), "training_info": (20, "Training"),
        "functions": (25, "Function"),
    },
    "Opset": {"domain": (1, "string")},
    "Training": {"initialization": (1, "Graph"), "algorithm": (2, "Graph")},
    "Function": {"node": (7, "Node"), "opset_import": (9, "Opset"), "attribute_proto": (11, "Attribute")},
    "Graph": {"node": (1, "Node"), "initializer": (5, "Tensor"), "sparse_initializer": (15, "Sparse")},
    "Node": {"op_type": (4, "string"), "attribute": (5, "Attribute"), "domain": (7, "string")},
    "Attribute": {
        "name": (1, "string"), "ints": (8, "int64"), "strings": (9, "bytes"),
        "t": (5, "Tensor"), "g": (6, "Graph"), "tensors": (10, "Tensor"), "graphs": (11, "Graph"),
        "sparse_tensor": (22, "Sparse"), "sparse_tensors": (23, "Sparse"),
    },
    "Sparse": {"values": (1, "Tensor"), "indices": (2, "Tensor")},
    "Tensor": {"external_data": (13, "Entry"), "data_location": (14, "int32")},
    "Entry": {},
}  # fmt: skip
#: Numbers of types in a protobuf descriptor.
_SCALARS = {"int64": 3, "int32": 5, "string": 9, "bytes": 12}
_TREES = {"TreeEnsembleClassifier", "TreeEnsembleRegressor"}


class OnnxPredictor:
    """Predict with an ONNX model of one input, float32 or float64 [n, features].

    output: the name of the output to return; without it, the only one of floats, or the one called
        `probabilities`. The file holds all of its weights: none that names another file is taken.
    """

    def __init__(self, model: str, *, output: str | None = None, all_classes: bool = False, threads: int = 1) -> None:
        runtime = library("onnxruntime", "ONNX", "onnx")
        content = read_file(model, "an ONNX model")
        _check(content, model)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.use_deterministic_compute = True
        options.enable_cpu_mem_arena = False  # which keeps memory for each of hundreds of small models
        options.log_severity_level = 4  # what it says is in the exception
        options.add_session_config_entry("session.load_model_format", "ONNX")
        try:
            self._session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelFileRefused(
                model, f"onnxruntime: {str(error).strip()}", "expected an ONNX model that it runs"
            ) from error
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].type not in _FLOATS:
            found = ", ".join(f"`{one.name}` {one.type}" for one in inputs)
            raise ModelFileRefused(model, f"has the inputs {found}", "expected one, tensor(float) or tensor(double)")
        self._input, self._dtype = inputs[0].name, _FLOATS[inputs[0].type]
        self._outputs = [_output(self._session.get_outputs(), output, model)]
        self._all_classes = all_classes

    def predict(self, features: Features) -> npt.NDArray[np.float64]:
        matrix = np.ascontiguousarray(features.matrix, self._dtype)
        return one_per_row(self._session.run(self._outputs, {self._input: matrix})[0], self._all_classes)


def _output(outputs: list[Any], wanted: str | None, path: str) -> str:
    usable = [one.name for one in outputs if one.type in _FLOATS]
    if wanted is None and len(usable) > 1 and "probabilities" in usable:
        wanted = "probabilities"
    if wanted is None and len(usable) == 1:
        (wanted,) = usable
    if wanted is None or wanted not in usable:
        found = ", ".join(f"`{one.name}` {one.type}" for one in outputs)
        asked = "no output was named" if wanted is None else f"`{wanted}` was asked for"
        raise ModelFileRefused(
            path, f"has the outputs {found}, and {asked}",
            "expected a tensor of floats, alone or named by functools.partial(OnnxPredictor, output=...); "
            "skl2onnx writes one with options={'zipmap': False}",
        )  # fmt: skip
    return wanted


def _check(content: bytes, path: str) -> None:
    """Refuse what onnxruntime does not: weights in other files or at an address, a lost end, trees with circles."""
    try:
        model = _model_message().FromString(content)
    except Exception as error:
        raise ModelFileRefused(path, f"is no protobuf message: {error}", "expected an ONNX model") from error
    domains: dict[str, set[str]] = {"Opset": set(), "Node": set()}
    for message in _messages(model):
        if message.DESCRIPTOR.name == "Tensor" and (message.external_data or any(message.data_location)):
            raise ModelFileRefused(
                path, "has weights outside of it (external data)",
                "one file holds the whole model; write it with onnx.save(..., save_as_external_data=False)",
            )  # fmt: skip
        if message.DESCRIPTOR.name in domains:
            domains[message.DESCRIPTOR.name] |= {domain or "ai.onnx" for domain in message.domain or [""]}
        if message.DESCRIPTOR.name == "Node" and _TREES & {*message.op_type} and not _are_trees(message.attribute):
            raise ModelFileRefused(path, "has trees with nodes that lead nowhere", "expected a whole ONNX model")
    if not domains["Node"] or not domains["Node"] <= domains["Opset"]:
        raise ModelFileRefused(path, "has no opset for some of its operators", "expected a whole ONNX model")


def _are_trees(given: Any) -> bool:
    """Tell whether the nodes of an ensemble have children of their own tree, no child twice and none that is first."""
    attributes = {name: one for one in given for name in one.name}
    named = ("nodes_treeids", "nodes_nodeids", "nodes_truenodeids", "nodes_falsenodeids")
    if any(name not in attributes for name in (*named, "nodes_modes")) or len(attributes) != len(given):
        return False
    trees, ids, *ways = (np.array(attributes[name].ints, np.int64) for name in named)
    inner = np.array([mode != b"LEAF" for mode in attributes["nodes_modes"].strings], np.bool_)
    if any(len(one) != len(ids) for one in (trees, *ways, inner)):
        return False
    places = {place: i for i, place in enumerate(zip(trees.tolist(), ids.tolist(), strict=True))}
    children = [
        places.get(place) for way in ways for place in zip(trees[inner].tolist(), way[inner].tolist(), strict=True)
    ]
    firsts = np.unique(trees, return_index=True)[1].tolist()
    return None not in children and len({*children, *firsts}) == len(children) + len(firsts) and len(places) == len(ids)


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for field, values in message.ListFields():
        if field.message_type is not None:
            for one in values:
                yield from _messages(one)


@cache
def _model_message() -> Any:
    """Return the message class of `_PROTO`'s models. It skips what else is in a file, so that onnx is not needed."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="millpond_onnx.proto", package="millpond_onnx", syntax="proto2")
    for name, fields in _PROTO.items():
        message = file.message_type.add(name=name)
        for field, (number, of) in fields.items():
            # All are repeated: what a file gives twice is seen twice, while its readers may take either or both.
            scalar = _SCALARS.get(of)
            kind = {"type": scalar} if scalar else {"type": 11, "type_name": f".millpond_onnx.{of}"}
            message.field.add(name=field, number=number, label=3, **kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("millpond_onnx.Model"))


def save_onnx(
    estimator: Any, matrix: npt.NDArray[np.float64], path: str, *, float64: bool = False, difference_max: float = 1e-5
) -> None:
    """Write a trained scikit-learn model as ONNX, for `OnnxPredictor`. Needs skl2onnx, where the model is trained.

    matrix: float64 [n, features] of rows as they are served, NaN included: what the file predicts of them is compared
        with what the model does, since not all that converts is converted rightly (forests and NaN, say).
    float64: of the model's input; float32 is faster, and some operators have no other.
    Raises `ValueError`, and leaves no file, if the difference is larger than `difference_max` anywhere.
    """
    try:
        from skl2onnx import to_onnx
    except ModuleNotFoundError as error:
        raise ExtraMissing("export to ONNX needs skl2onnx where the model is trained: pip install skl2onnx") from error
    classifier = hasattr(estimator, "predict_proba")
    row = matrix[:1].astype(np.float64 if float64 else np.float32)
    written = to_onnx(estimator, row, options={"zipmap": False} if classifier else None)
    Path(path).write_bytes(written.SerializeToString())
    want = estimator.predict_proba(matrix) if classifier else estimator.predict(matrix)
    got = OnnxPredictor(path, all_classes=True).predict(Features(matrix, ()))
    difference = float(np.abs(got - np.asarray(want).reshape(got.shape)).max())
    if not difference <= difference_max:
        Path(path).unlink()
        raise ValueError(
            f"ONNX model `{Path(path).name}`: its predictions differ by {difference:.3g} from the model's own; "
            f"expected {difference_max:.3g} at most; use another format, or float64=True if it is a matter of rounding"
        )
