"""RouterBiasCallback: what counts towards a step of the choice bias, and what does not."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from vision_moe.moe.balance import bias_step
from vision_moe.router_bias import RouterBiasCallback
from vision_moe.upcycle import upcycle


@pytest.fixture
def make_model(make_dense_clip):
    def make(**fields):
        fields = {"router_bias_update_rate": 0.01, "router_std": 1.0, **fields}
        return upcycle(make_dense_clip(0), **fields).train()

    return make


def started(model):
    callback = RouterBiasCallback()
    callback.on_train_begin(None, None, None, model=model)
    return callback


def biases(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith("choice_bias")}


def assert_equal_biases(model, other):
    ours, theirs = biases(model), biases(other)
    assert len(ours) == 4
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("form", ["sign", "z_score"])
def test_a_step_follows_the_counts_that_the_forward_returned(make_model, clip_batch, form):
    model = make_model(router_bias_update=form)
    callback = started(model)
    out = model(**clip_batch)
    assert all(bias.abs().max() == 0 for bias in biases(model).values())
    callback.on_optimizer_step(None, None, None)
    for tower, output in ((model.vision_model, out.vision_model_output), (model.text_model, out.text_model_output)):
        for layer, counts_E in zip(tower.encoder.layers, output.tokens_per_expert, strict=True):
            assert torch.equal(layer.mlp.router.choice_bias, bias_step(counts_E, 0.01, form))
            assert layer.mlp.router.choice_bias.abs().max() > 0


def test_micro_batches_add_up_and_steps_start_anew(make_model, clip_batch):
    model, other = make_model(), make_model()
    whole, parts = started(model), started(other)
    for _ in range(2):
        model(**clip_batch)
        whole.on_optimizer_step(None, None, None)
        for rows in (slice(0, 1), slice(1, 3)):
            other(**{name: tensor[rows] for name, tensor in clip_batch.items()})
        parts.on_optimizer_step(None, None, None)
    assert_equal_biases(model, other)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_block_that_runs_again_in_the_backward_counts_once(make_model, clip_batch, use_reentrant):
    model, other = make_model(router_bias_update="z_score"), make_model(router_bias_update="z_score")
    other.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    other.vision_model.embeddings.register_forward_hook(lambda m, a, output: output.requires_grad_())
    for each in (model, other):
        callback = started(each)
        # Two forwards of other rows, the first with a backward: a second count of it would change the step.
        each(**{name: tensor[:1] for name, tensor in clip_batch.items()}, return_loss=True).loss.backward()
        each(**{name: tensor[1:] for name, tensor in clip_batch.items()})
        callback.on_optimizer_step(None, None, None)
    assert_equal_biases(model, other)


def test_evaluation_and_what_comes_after_training_do_not_count(make_model, clip_batch):
    model = make_model()
    callback = started(model)
    model.eval()(**clip_batch, output_router_logits=True)
    callback.on_optimizer_step(None, None, None)
    callback.on_train_end(None, None, None)
    model.train()(**clip_batch)
    callback.on_optimizer_step(None, None, None)
    assert all(bias.abs().max() == 0 for bias in biases(model).values())


def test_a_model_without_bias_is_left_alone(make_dense_clip, clip_batch):
    for model in (make_dense_clip(0), upcycle(make_dense_clip(0))):
        callback = started(model.train())
        model(**clip_batch)
        callback.on_optimizer_step(None, None, None)
        assert not biases(model)


class _Pairs(Dataset):
    """The three rows of a batch over and over: two steps of 4 pairs."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {name: tensor[index % 3] for name, tensor in self.batch.items()}


def test_the_trainer_steps_once_per_optimizer_step_whatever_the_accumulation(make_model, clip_batch, tmp_path):
    """With a learning rate of 0 the same pairs give the same counts."""
    trained = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        model = make_model()
        args = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            learning_rate=0.0,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )

        def collate(rows):
            return {name: torch.stack([row[name] for row in rows]) for name in clip_batch} | {"return_loss": True}

        Trainer(
            model, args, train_dataset=_Pairs(clip_batch), data_collator=collate, callbacks=[RouterBiasCallback()]
        ).train()
        trained.append(model)
        steps = torch.stack(list(biases(model).values())) / 0.01
        assert steps.abs().max().item() == pytest.approx(2.0)
    assert_equal_biases(*trained)
