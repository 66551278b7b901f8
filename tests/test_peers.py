"""What benchmarks/peers/ computes itself: rounding to nearest and its bytes, tables counted once, windows of a text as it stands."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "peers"))

import calibration
import helpers
import llama_cpp
import measure
import peer
import rtn


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128])
def test_rounding_is_within_half_a_step_of_the_weight_also_in_a_shorter_last_group(symmetric, group_size):
    weight = torch.randn(8, 160, generator=torch.Generator().manual_seed(0))  # 160 = 128 + 32
    rounded = peer.round_to_nearest(weight, 4, group_size, symmetric)
    assert rounded.shape == weight.shape
    for start in range(0, 160, group_size):
        group, result = weight[:, start : start + group_size], rounded[:, start : start + group_size]
        largest = group.abs().amax(1) / 7 if symmetric else (group.amax(1) - group.amin(1)) / 15
        # the step is a float16 and an asymmetric zero point is rounded, too: the ends may lie another half step outside
        allowed = largest * (0.51 if symmetric else 1.01)
        assert ((result - group).abs().amax(1) <= allowed).all()
        assert all(len(row.unique()) <= 16 for row in result)


def test_more_bits_are_nearer():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    errors = [(peer.round_to_nearest(weight, bits, 32, False) - weight).square().mean() for bits in (3, 4, 8)]
    assert errors[0] > 3 * errors[1] > 30 * errors[2]


def test_bytes_of_a_rounded_matrix():
    assert peer.rounded_bytes((4, 64), 4, 32, symmetric=True) == (4 * 64 * 4 + 4 * 2 * 16) // 8
    assert peer.rounded_bytes((4, 64), 4, 32, symmetric=False) == (4 * 64 * 4 + 4 * 2 * 20) // 8
    assert peer.rounded_bytes((2, 576), 4, 128, symmetric=True) == (2 * 576 * 4 + 2 * 5 * 16) // 8  # four groups and a half


def test_bytes_of_tables_in_files(tmp_path):
    table = torch.zeros(10, 4, dtype=torch.bfloat16)
    save_file({peer.EMBEDDING: table, "model.norm.weight": torch.zeros(4)}, tmp_path / "model.safetensors")
    assert peer.table_bytes(tmp_path) == {peer.EMBEDDING: 80}
    save_file({peer.HEAD: table.float()}, tmp_path / "more.safetensors")
    assert peer.table_bytes(tmp_path) == {peer.EMBEDDING: 80, peer.HEAD: 160}


def test_a_table_that_is_the_head_too_counts_once():
    tied, untied = {peer.EMBEDDING: 80}, {peer.EMBEDDING: 80, peer.HEAD: 80}
    assert measure.bytes_counted(200, tied, once=True) == 200
    assert measure.bytes_counted(280, untied, once=False) == 280
    assert measure.bytes_counted(280, untied, once=True) == 200


def test_bytes_with_tables_in_int8():
    shape = (10, 64)
    wide, int8 = 2 * 10 * 64, peer.rounded_bytes(shape, 8, 64, symmetric=True)
    assert int8 * 8 / 640 == 8.25
    tied, untied = {peer.EMBEDDING: wide}, {peer.EMBEDDING: wide, peer.HEAD: wide}
    assert measure.bytes_with_int8_tables(5000, tied, shape, once=False) == 5000 - wide + int8
    assert measure.bytes_with_int8_tables(5000, untied, shape, once=False) == 5000 - 2 * wide + 2 * int8
    assert measure.bytes_with_int8_tables(5000, untied, shape, once=True) == 5000 - wide + int8
    assert measure.bytes_with_int8_tables(5000, {peer.EMBEDDING: wide // 2}, shape, once=False) is None  # it is small already


class Words:
    """A tokenizer that gives every character its code point."""

    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([[ord(character) for character in text]])}


def test_windows_are_of_the_file_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration.AutoTokenizer, "from_pretrained", lambda _: Words())
    text = tmp_path / "wiki.test.raw"
    text.write_text(" \n = Title = \n \n a line\nanother\n", encoding="utf-8")
    windows = calibration.text_windows(Path("model"), text, "test", seq_len=8, windows=2)
    assert "".join(map(chr, windows.flatten().tolist())) == " \n = Title = \n \n"[:16]
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "test.jsonl").write_text("\n".join(json.dumps({"text": each}) for each in ("abc", "defgh")), encoding="utf-8")
    windows = calibration.text_windows(Path("model"), folder, "test", seq_len=10, windows=1)
    assert "".join(map(chr, windows.flatten().tolist())) == "abc\n\ndefgh"
    with pytest.raises(SystemExit, match="not found"):
        calibration.text_windows(Path("model"), tmp_path / "missing", "test", 8, 1)


def test_too_few_calibration_windows_are_an_error(tmp_path):
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps([[1, 2], [3, 4]]), encoding="utf-8")
    assert peer.calibration_windows(file, 1).tolist() == [[1, 2]]
    with pytest.raises(SystemExit, match="2 windows, 3 are wanted"):
        peer.calibration_windows(file, 3)


@pytest.mark.parametrize(
    ("name", "file_type", "tied", "importance", "columns", "expected"),
    [
        ("token_embd.weight", "Q4_K_M", True, False, 576, "Q8_0"),  # 576 is no multiple of 256
        ("token_embd.weight", "Q4_0", True, False, 576, "Q8_0"),
        ("token_embd.weight", "Q4_K_M", True, False, 2048, "Q6_K"),
        ("token_embd.weight", "Q4_K_M", False, False, 2048, "Q4_K"),
        ("output.weight", "Q4_K_M", False, False, 2048, "Q6_K"),
        ("output.weight", "Q8_0", False, False, 2048, "Q8_0"),
        ("blk.4.attn_q.weight", "Q4_K_M", True, False, 576, "Q5_0"),
        ("blk.4.attn_q.weight", "Q5_K_M", True, False, 576, "Q5_1"),
        ("blk.4.attn_q.weight", "Q6_K", True, False, 2048, "Q6_K"),
        ("blk.4.attn_v.weight", "Q4_K_M", True, False, 2048, "Q4_K"),
        ("blk.5.attn_v.weight", "Q4_K_M", True, False, 2048, "Q6_K"),
        ("blk.0.ffn_down.weight", "Q5_K_M", True, False, 2048, "Q6_K"),
        ("blk.29.ffn_down.weight", "Q4_K_M", True, False, 2048, "Q6_K"),
        ("blk.0.ffn_down.weight", "Q3_K_M", True, False, 2048, "Q5_K"),
        ("blk.1.ffn_down.weight", "Q3_K_M", True, False, 2048, "Q4_K"),
        ("blk.1.attn_v.weight", "Q3_K_M", True, False, 2048, "Q5_K"),
        ("blk.9.attn_output.weight", "Q3_K_M", True, False, 2048, "Q4_K"),
        ("blk.9.ffn_up.weight", "Q3_K_M", True, False, 576, "Q4_0"),
        ("blk.0.ffn_down.weight", "Q4_0", True, False, 2048, "Q4_0"),
        ("blk.0.ffn_down.weight", "Q4_0", True, True, 2048, "Q4_1"),
    ],
)
def test_the_format_of_a_tensor_is_the_one_llama_cpp_gives_it(name, file_type, tied, importance, columns, expected):
    config = {"num_hidden_layers": 30, "hidden_size": columns, "intermediate_size": columns, "tie_word_embeddings": tied}
    assert llama_cpp.type_of(name, file_type, config, importance).name == expected


def test_what_llama_cpp_gave_where_q3_k_does_not_fit_in_2025():
    config = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "tie_word_embeddings": True}
    older = llama_cpp.INSTEAD | {llama_cpp.Type.Q3_K: llama_cpp.Type.IQ4_NL}
    assert llama_cpp.type_of("blk.9.ffn_up.weight", "Q3_K_M", config, False, older).name == "IQ4_NL"
    assert llama_cpp.type_of("blk.9.ffn_down.weight", "Q3_K_M", config, False, older).name == "Q4_K"


def test_rows_paired_for_rope_come_back():
    weight = torch.arange(24.0).reshape(12, 2)
    paired = llama_cpp.pair_up(weight, heads=2)
    assert paired[:2].tolist() == [weight[0].tolist(), weight[3].tolist()]  # first rows of a head's two halves of three
    assert torch.equal(llama_cpp.unpair(paired, heads=2), weight)


@pytest.mark.parametrize("tied", [True, False])
def test_a_peer_beside_the_dense_model(tmp_path, monkeypatch, tied):
    base, output, text = tmp_path / "base", tmp_path / "rtn", tmp_path / "wiki.test.raw"
    model = helpers.make_llama(tie_word_embeddings=tied).to(torch.bfloat16)
    model.save_pretrained(base)
    helpers.make_byte_tokenizer().save_pretrained(base)
    text.write_text("= Title =\n\nsome text of a few words " * 4, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["rtn.py", "--model", str(base), "--output", str(output), "--group_size", "16"])
    rtn.main()
    tables = model.get_input_embeddings().weight.numel() * 2
    wanted = measure.MeasureConfig(
        models=(f"rounded={output}",), base=base, text=text, windows=2, seq_len=16, count_table_once=True,
        output=tmp_path / "peers.json",
    )  # fmt: skip
    measure.main(wanted)
    result = json.loads((tmp_path / "peers.json").read_text(encoding="utf-8"))
    dense, rounded = result["rows"]
    once = 0 if tied else tables
    assert result["protocol"]["base_bytes"] == dense["bytes"] == 2 * sum(each.numel() for each in model.parameters()) - once
    assert dense["against_dense"] == 0 and dense["divergence"]["mean"] == 0 and dense["divergence"]["same_top"] == 1
    written = json.loads((output / "peer.json").read_text(encoding="utf-8"))
    assert rounded["bytes"] == written["bytes"] - once
    assert rounded["int8_table"]["bytes"] < rounded["bytes"] < dense["bytes"]
    assert rounded["ratio"] == dense["bytes"] / rounded["bytes"]
    assert rounded["divergence"]["mean"] > 0
    loaded = []
    monkeypatch.setattr(measure, "load", lambda folder, load=measure.load: loaded.append(folder) or load(folder))
    measure.main(wanted)
    assert loaded == [base]  # the row is there already
    assert json.loads((tmp_path / "peers.json").read_text(encoding="utf-8")) == result
