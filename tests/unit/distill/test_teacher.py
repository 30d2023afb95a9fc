"""Loading teachers: checkpoints of the old layout, encoders without a head, taps against stock outputs."""

import torch
from safetensors.torch import load_file, save_file
from support.small import small_batch, small_model

from homodistil.distill.teacher import Teacher, has_lm_head, load_model


def test_a_checkpoint_of_the_old_layout_loads_whole(tmp_path):
    """bert-base-uncased on the hub: gamma and beta, no decoder of its own, a pooler and a next-sentence head."""
    model = small_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(file).items()
        if not name.startswith("cls.predictions.decoder")
    }
    old |= {"cls.seq_relationship.weight": torch.zeros(2, 24), "bert.pooler.dense.weight": torch.zeros(24, 24)}
    save_file(old, file, metadata={"format": "pt"})
    assert has_lm_head(str(tmp_path))
    loaded = load_model(str(tmp_path)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_an_encoder_has_no_mlm_head(tmp_path):
    small_model().bert.save_pretrained(tmp_path)
    assert not has_lm_head(str(tmp_path))


def test_taps_are_what_the_stock_model_shows():
    model, batch = small_model(), small_batch()
    tapped = Teacher(model).run(batch)
    stock = small_model()
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = stock(
            batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True, output_attentions=True
        )
    valid = batch.attention_mask.bool()
    for ours, theirs in zip([tapped.embedding, *tapped.layers], outputs.hidden_states, strict=True):
        torch.testing.assert_close(ours[valid], theirs[valid], rtol=1e-4, atol=1e-5)  # fp32, other kernels
    padding = ~valid[:, None, None, :]
    for queries, keys, theirs in zip(tapped.queries, tapped.keys, outputs.attentions, strict=True):
        scores = (queries @ keys.transpose(-1, -2) * tapped.scale).masked_fill(padding, -torch.inf)
        rows = valid[:, None, :].expand(-1, scores.shape[1], -1)
        torch.testing.assert_close(scores.softmax(-1)[rows], theirs[rows], rtol=1e-4, atol=1e-5)


def test_the_teacher_builds_no_graph_and_is_not_trained():
    teacher = Teacher(small_model()).train()
    logits = teacher.predict(small_batch())
    assert not logits.requires_grad and not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.model.training  # dropout stays off whatever the caller says
