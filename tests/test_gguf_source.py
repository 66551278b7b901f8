"""A GGUF file as a source: nothing of it is missing or held twice, and a dry run writes no folder."""

import gguf
import pytest
import scripts
import torch
from test_gguf import export, llama
from transformers import AutoModelForCausalLM

from compactmind.errors import CompactMindError
from compactmind.gguf_source import folder_of, read_gguf


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_weights_are_held_once(tmp_path, monkeypatch, tied):
    export(llama(tied), tmp_path / "x.gguf")
    sources, read = [], AutoModelForCausalLM.from_pretrained

    def reading(*given, **options):
        result = read(*given, **options)
        sources.append(result[0] if isinstance(result, tuple) else result)
        return result

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", reading)
    model, _ = read_gguf(tmp_path / "x.gguf")
    theirs = dict(sources[0].named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == theirs[name].data_ptr() and parameter.dtype == torch.bfloat16 and parameter.requires_grad
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    frequencies = sources[0].model.rotary_emb.inv_freq
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies) and frequencies.dtype == torch.float32


def test_a_file_that_lacks_a_block_is_refused(tmp_path):
    export(llama(), tmp_path / "x.gguf")
    blocks = gguf.GGUFReader(tmp_path / "x.gguf", "r+").fields["llama.block_count"]
    blocks.parts[blocks.data[0]][0] += 1
    blocks.parts[blocks.data[0]].flush()
    with pytest.raises(CompactMindError, match="^[^ ]*x.gguf holds no whole LlamaForCausalLM: its weights lack model.layers.2.input_l"):
        folder_of(tmp_path / "x.gguf", tmp_path / "models")


def test_a_dry_run_says_what_would_be_made_of_it_and_makes_nothing(tmp_path):
    said, path, models = [], tmp_path / "x.gguf", tmp_path / "models"
    export(llama(), path)
    assert folder_of(path, models, said.append, dry_run=True) is None and not models.exists()
    parameters = sum(parameter.numel() for parameter in llama().parameters())
    assert said == [
        f"{path}: would be dequantized to {models / 'x'} first, {2 * parameters / 1e9:.2f} GB; memory and disk are known once it is there"
    ]
    folder = folder_of(path, models, said.append)
    assert folder_of(path, models, said.append, dry_run=True) == folder
    (tmp_path / "y.gguf").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CompactMindError, match="no whole GGUF"):  # what would stop it stops it here, too
        folder_of(tmp_path / "y.gguf", models, said.append, dry_run=True)


@pytest.mark.parametrize("stage", ["4_smoothquant_llama.py", "5_bayesian_search.py"])
def test_stages_with_dry_run_write_nothing(tmp_path, stage):
    export(llama(), tmp_path / "x.gguf")
    done = scripts.run_script(stage, "--model_path", "x.gguf", "--dry_run", "True", cwd=tmp_path)
    assert done.returncode == 0 and "x.gguf: would be dequantized to models/x first" in done.stdout, done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "hf_home"] == ["x.gguf"]
