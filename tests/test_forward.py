"""Forward passes over much text: whatever the batches, the answers are those of each sentence alone, in its place."""

import helpers
import pytest
import torch

from compactmind.forward import predict_logits


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_logits_come_back_in_the_order_of_the_sentences(distilbert, encoded, batch_size):
    distilbert.train()  # dropout must be off all the same
    logits = predict_logits(distilbert, encoded, batch_size)
    assert logits.shape == (len(encoded), 2) and logits.dtype == torch.float32
    for row in range(len(encoded)):
        alone = encoded.collate([row])
        expected = helpers.logits_of(distilbert, {key: alone[key] for key in ("input_ids", "attention_mask")})
        torch.testing.assert_close(logits[row], expected[0], atol=1e-4, rtol=1e-4)
    assert logits.std(dim=0).min() > 0.01  # rows differ, so a wrong order would show
