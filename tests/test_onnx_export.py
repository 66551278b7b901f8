"""Classifiers as ONNX: equal logits for any shape, the int8 product as such in the file, a clear word where the packages are missing."""

import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import helpers
import pytest
import scripts
import torch

from compactmind.checkpoint import load_checkpoint, save_checkpoint
from compactmind.errors import CompactMindError
from compactmind.kernels import KERNEL_VARIABLE
from compactmind.methods.pruning.encoder import encoder_layers
from compactmind.methods.pruning.masks import compact
from compactmind.methods.quantization.grouped import GroupedWeight
from compactmind.methods.quantization.w8a8_encoder import quantize_encoder
from compactmind.methods.quantization.w8a8_linear import W8A8Linear
from compactmind.onnx_export import FILE, PRODUCT, OnnxClassifier, export_classifier, require_onnx

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="pip install -r requirements-export.txt",
)


def int8_linears(model) -> list[W8A8Linear]:
    return [module for module in model.modules() if isinstance(module, W8A8Linear)]


def difference(model, path, shapes=((1, 3), (5, 12), (2, 40))) -> float:
    """Return the largest difference of a logit over batches of several shapes, some sentences shorter than others."""
    exported, largest = OnnxClassifier(path), 0.0
    for rows, length in shapes:
        batch = helpers.example_batch(rows, length)
        logits = exported(**batch)
        assert logits.shape == (rows, 2) and logits.dtype == torch.float32
        largest = max(largest, (logits - helpers.logits_of(model, batch)).abs().max().item())
    return largest


def operators_run(path: Path) -> list[str]:
    """Return the operators onnxruntime makes of a file."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path.with_suffix(".run")), 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(path.with_suffix(".run")).graph.node]


def settings_of(path: Path, monkeypatch) -> dict[str, str]:
    """Return the settings with which a file is run."""
    import onnxruntime

    class Options(onnxruntime.SessionOptions):
        def add_session_config_entry(self, name: str, value: str) -> None:
            settings[name] = value
            super().add_session_config_entry(name, value)

    def options() -> Options:
        settings.clear()
        return Options()

    settings: dict[str, str] = {}
    with monkeypatch.context() as patched:
        patched.setattr(onnxruntime, "SessionOptions", options)
        OnnxClassifier(path)
    return settings


@needs_onnx
@pytest.mark.parametrize(("name", "pruned"), [("bert", False), ("distilbert", True)])
def test_equal_logits_for_any_shape(tmp_path, name, pruned):
    model = helpers.MAKERS[name]()
    if pruned:
        model = compact(model, helpers.uneven_masks(model))
    export_classifier(model, tmp_path / FILE)
    assert difference(model, tmp_path / FILE) < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    operators, layers = operators_run(tmp_path / FILE), len(encoder_layers(model))
    assert operators.count("LayerNormalization") == 2 * layers + 1, operators  # the sums before them and before GELU are apart
    assert operators.count("Gelu") == operators.count("Attention") == layers, operators


@needs_onnx
@pytest.mark.parametrize(
    ("name", "kernel", "products"), [("bert", "simulated", "u8u8"), ("distilbert", "", "u8s8"), ("distilbert", "", "u8s7")]
)
def test_int8_products_are_int8_in_the_file(tmp_path, monkeypatch, name, kernel, products):
    import onnx

    monkeypatch.setenv(KERNEL_VARIABLE, kernel)
    layers = {"bert": "num_hidden_layers", "distilbert": "n_layers"}[name]
    model = helpers.MAKERS[name](scale=0.1, **{layers: 2})
    quantize_encoder(model)
    kernels, before = [linear.kernel for linear in int8_linears(model)], helpers.logits_of(model)
    export_classifier(model, tmp_path / FILE, products=products)
    graph = onnx.load(tmp_path / FILE).graph
    nodes, types = [node for node in graph.node if node.op_type == PRODUCT], onnx.TensorProto
    stored = {each.name: each.data_type for each in graph.initializer}
    assert len(nodes) == 6 * 2
    assert all(len(node.input) == (6 if products == "u8u8" else 5) for node in nodes)  # unsigned bytes have a zero point
    assert {stored[node.input[1]] for node in nodes} == {types.UINT8 if products == "u8u8" else types.INT8}
    weights = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    largest = {int(abs(weights[node.input[1]].astype(int) - (128 if products == "u8u8" else 0)).max()) for node in nodes}
    assert largest == {63 if products == "u8s7" else 127}
    assert difference(model, tmp_path / FILE) < (0.04 if products == "u8s7" else 0.02)
    assert torch.equal(helpers.logits_of(model), before)  # what was exported is a copy
    for vnni in (True, False):  # products that would saturate are asked not to
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda vnni=vnni: vnni)
        assert settings_of(tmp_path / FILE, monkeypatch).get("session.x64quantprecision") == (None if vnni or products == "u8s7" else "1")
    assert [linear.kernel for linear in int8_linears(model)] == kernels
    assert not kernel or set(kernels) == {kernel}


@needs_onnx
@pytest.mark.parametrize("embeddings", ["int8", "int4"])
def test_tables_in_integers_are_exported_too(tmp_path, embeddings):
    model = helpers.make_bert(scale=0.1, num_hidden_layers=1)
    quantize_encoder(model, embeddings)
    export_classifier(model, tmp_path / FILE)
    assert difference(model, tmp_path / FILE) < 0.02
    import onnx

    table = next(module for module in model.modules() if isinstance(module, GroupedWeight))
    shape, kind = (table.shape, "UINT8") if embeddings == "int8" else (table.packed.shape, "INT32")  # four bits are four bits there too
    graph = onnx.load(tmp_path / FILE).graph
    stored = [list(each.dims) for each in graph.initializer if each.data_type == getattr(onnx.TensorProto, kind)]
    assert list(shape) in stored
    assert any(node.op_type == "ScatterElements" for node in graph.node) == (embeddings == "int4")  # bytes are read as they are


@needs_onnx
def test_the_file_is_the_same_whatever_machine_writes_it(tmp_path, monkeypatch):
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
    written = {}
    for vnni in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda vnni=vnni: vnni)
        model = helpers.make_distilbert(scale=0.1, n_layers=1)
        quantize_encoder(model)
        assert all((linear.kernel == "int_mm") == vnni for linear in int8_linears(model))
        export_classifier(model, tmp_path / FILE)
        written[vnni] = (tmp_path / FILE).read_bytes()
    assert written[True] == written[False]
    for path in (
        Path(torch.__file__).parent.parent,
        helpers.REPOSITORY,
    ):  # where things lie on the machine is nobody's business
        assert str(path).encode() not in written[True]


@needs_onnx
def test_a_file_that_fails_its_check_never_takes_the_place_of_another(tmp_path, monkeypatch):
    path, checked = tmp_path / FILE, []
    left_by_a_kill = tmp_path / f".{FILE}.tmp-{socket.gethostname()}-{2**22 + 1}-x"  # the process is gone: no system has so many
    model = helpers.make_distilbert(n_layers=1)

    def check(exported):
        checked.append(exported(**helpers.example_batch()))
        assert path.read_bytes() == earlier if earlier else not path.exists()
        raise CompactMindError("other logits")

    for earlier in (None, b"an earlier export"):
        left_by_a_kill.write_bytes(b"half")
        os.utime(left_by_a_kill, (0, 0))
        if earlier:
            path.write_bytes(earlier)
        with pytest.raises(CompactMindError, match="other logits"):
            export_classifier(model, path, check)
        assert torch.allclose(checked.pop(), helpers.logits_of(model), atol=1e-4)
        assert [each.name for each in tmp_path.iterdir()] == ([FILE] if earlier else [])
        assert not earlier or path.read_bytes() == earlier


@pytest.fixture
def folder(tmp_path):
    helpers.write_sst2(tmp_path / "sst2_data" / "glue" / "sst2", 60, 20)
    scripts.run_script_once("download_model.py", cwd=helpers.make_workspace(tmp_path, 60, 20))
    tokenizer = helpers.make_tokenizer(tmp_path / "vocabulary")
    dense = helpers.make_distilbert(max_position_embeddings=128, n_layers=1)
    save_checkpoint(tmp_path / "models" / "student_distilled", dense, tokenizer, kind="dense", parent=None, stage={})
    small = helpers.make_distilbert(max_position_embeddings=128, n_layers=1)
    description = quantize_encoder(small)
    save_checkpoint(
        tmp_path / "models" / "student_pruned_w8a8",
        small,
        tokenizer,
        kind="w8a8",
        parent="student_pruned",
        stage={},
        quantization=description,
    )
    return tmp_path


MODELS = ("student_distilled", "student_pruned_w8a8")


@needs_onnx
def test_the_script_exports_and_the_report_measures(folder, run_here):
    status, output = run_here("export_onnx.py", "--models", *MODELS, cwd=folder)
    assert status == 0 and output.count("logits within") == 2, output
    status, output = run_here("6_evaluate_report.py", cwd=folder)
    assert status == 0 and "ONNX ms, batch 32" in output, output
    rows = {row["name"]: row for row in helpers.read_json(folder / "results" / "final_report.json")["models"]}
    for name in MODELS:
        assert rows[name]["onnx_latency"]["batch_32"]["median_ms"] > 0
        load_checkpoint(folder / "models" / name)  # a further file does no harm
    path = folder / "models" / "student_distilled" / FILE
    files, earlier = sorted(path.parent.iterdir()), path.read_bytes()
    status, output = run_here("export_onnx.py", "--tolerance", "0", "--models", "student_distilled", cwd=folder)
    assert status == 1 and "more than 0: the file was not kept" in output
    assert path.read_bytes() == earlier and sorted(path.parent.iterdir()) == files


def test_without_the_packages_it_says_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for call in (
        require_onnx,
        lambda: OnnxClassifier(tmp_path / FILE),
        lambda: export_classifier(helpers.make_bert(), tmp_path / FILE),
    ):
        with pytest.raises(CompactMindError, match="pip install -r requirements-export.txt"):
            call()
