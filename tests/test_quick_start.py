"""generate.py and classify.py import what running a model takes, and nothing for compiling it or for several processes."""

import json
import subprocess
import sys

import helpers
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from compactmind.checkpoint import save_checkpoint
from compactmind.formats.loading import meta_model
from compactmind.methods.quantization.w8a8_encoder import quantize_encoder
from compactmind.methods.quantization.w8a8_model import W8A8Recipe, calibrate_llama, quantize_llama

IMPORTED = """
import json, os, runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
import torch
heavy = ("sympy", "torch._dynamo.utils", "torch.distributed.tensor", "torch.distributed.checkpoint")
found = [name for name in heavy if name in sys.modules]
doubled = torch.compile(lambda x: 2 * x, backend="eager", fullgraph=True)
counted = torch._dynamo.testing.CompileCounter()
tripled = torch.compile(lambda x: 3 * x, backend=counted)
print(json.dumps({
    "heavy": found, "doubled": doubled(torch.ones(2)).tolist(), "tripled": tripled(torch.ones(2)).tolist(), "graphs": counted.frame_count,
    "distributed": torch.distributed.is_available(), "normal": torch.nn.init.normal_(torch.empty(3, device="meta")).device.type,
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    encoder, llama = helpers.make_distilbert(), helpers.make_llama()
    description = quantize_encoder(encoder)
    save(folder / "classifier", encoder, helpers.make_tokenizer(folder), description)
    description = quantize_llama(llama, calibrate_llama(llama, helpers.example_windows()), W8A8Recipe())
    save(folder / "llama", llama, helpers.make_byte_tokenizer(), description)
    return folder


def save(path, model, tokenizer, description):
    save_checkpoint(path, model, tokenizer, kind="w8a8", parent=None, stage={}, quantization=description)


@pytest.mark.parametrize(("script", "model"), [("generate.py", "llama"), ("classify.py", "classifier")])
def test_a_model_runs_without_what_compiling_takes_and_compiling_still_works(folder, script, model):
    command = [sys.executable, "-c", IMPORTED, str(helpers.REPOSITORY / script), "--model", model, "a good film"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "heavy": [], "doubled": [2.0, 2.0], "tripled": [3.0, 3.0], "graphs": 1, "distributed": True, "normal": "meta",
    }  # fmt: skip


def test_a_model_that_waits_for_weights_has_none_and_what_it_computes_itself():
    config = LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32, vocab_size=40)
    model, made = meta_model(LlamaForCausalLM, config), LlamaForCausalLM(config)
    matrices = {name: weight.device.type for name, weight in model.named_parameters() if weight.ndim == 2}
    assert set(matrices.values()) == {"meta"} and len(matrices) == 9
    assert {name: weight.shape for name, weight in model.named_parameters()} == {n: w.shape for n, w in made.named_parameters()}
    assert (model.model.rotary_emb.inv_freq == made.model.rotary_emb.inv_freq).all()
