"""Several processes of which one runs the pipeline and the others help it to retrain."""

import helpers
import scripts
import torch

from compactmind.methods.pruning.modeling_pruned_llama import PrunedLlamaForCausalLM

SENT_AND_RECEIVED = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import test_together as shared
from compactmind.devices import is_main_process
from compactmind.methods.retraining.together import from_main_process
for _ in range(2):  # one message after the other
    received = from_main_process(shared.what_is_sent() if is_main_process() else None)
if not is_main_process():
    with open(sys.argv[3] + "/found.json", "w") as file:
        json.dump(shared.what_differs(received), file)
"""


def what_is_sent() -> dict:
    """Return models and tensors of many kinds; one of them stands in two places."""
    tied = helpers.make_llama(tie_word_embeddings=True)
    config = PrunedLlamaForCausalLM.config_class(
        **helpers.llama_settings(), layer_num_key_value_heads=[2, 1], layer_intermediate_sizes=[40, 16]
    )
    pruned = helpers.randomize(PrunedLlamaForCausalLM(config), seed=1)
    pruned.model.norm.weight.requires_grad_(False)
    tensors = [torch.arange(6).view(2, 3).T, torch.tensor(2.5, dtype=torch.bfloat16), torch.zeros(0, 3), torch.tensor([True, False])]
    return {"models": [tied, pruned], "tensors": [*tensors, tensors[0]], "plain": ("text", 3, None)}


def what_differs(received: dict) -> list[str]:
    """Return what is not as `what_is_sent` made it."""
    sent, result = what_is_sent(), []
    for ours, theirs in zip(sent["models"], received["models"], strict=True):
        if any(each.training for each in theirs.modules()) or type(ours) is not type(theirs):
            result.append(f"{type(ours).__name__}: mode or class")
        with torch.no_grad():
            if not torch.equal(ours(helpers.example_windows()).logits, theirs(helpers.example_windows()).logits):
                result.append(f"{type(ours).__name__}: logits")
        for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            if not torch.equal(one, other) or one.requires_grad != other.requires_grad:
                result.append(name)
    tied = received["models"][0]
    if tied.lm_head.weight is not tied.model.embed_tokens.weight:
        result.append("tied weights")
    for number, (one, other) in enumerate(zip(sent["tensors"], received["tensors"], strict=True)):
        if one.dtype != other.dtype or not torch.equal(one, other):
            result.append(f"tensor {number}")
    if received["tensors"][0] is not received["tensors"][-1]:
        result.append("one tensor in two places")
    return result + ["plain values"] * (received["plain"] != sent["plain"])


def test_what_the_main_process_sends_arrives_as_it_was(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(SENT_AND_RECEIVED)
    ended = scripts.run_python(script, helpers.REPOSITORY, helpers.REPOSITORY / "tests", tmp_path, cwd=tmp_path, processes=2)
    assert ended.returncode == 0, ended.stderr
    assert helpers.read_json(tmp_path / "found.json") == []
