"""The vision tower: its batches, its checkpoints, and what is saved of it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoImageProcessor, CLIPVisionModel

from training import pictures, vision_tower
from training.vision_tower import Batch, Data, Settings, Tower

SETTINGS = Settings(
    steps=4, batch=8, emoji_share=0.5, blank_share=0.25, warmup=2, patch=48, hidden=16, layers=2,
    heads=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> Data:
    generator = torch.Generator().manual_seed(0)

    def pixels(count: int, channels: int) -> Tensor:
        shape = (count, channels, pictures.SIDE, pictures.SIDE)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    def emoji() -> pictures.EmojiSet:
        concepts = torch.tensor([0, 0, 0, 1, 2, 2])
        return pictures.EmojiSet(pixels(6, 4), concepts, torch.zeros(6, dtype=torch.int64))

    def shapes() -> pictures.ShapeSet:
        unknown = pictures.IGNORE
        return pictures.ShapeSet(
            pixels(4, 3), torch.tensor([0, 1, 2, unknown]), torch.tensor([0, unknown, 3, 7])
        )

    concepts = [pictures.Concept("thing", name, (name,)) for name in ("cat", "dog", "owl")]
    return Data(concepts, emoji(), emoji(), shapes(), shapes())


def made(data: Data) -> Tower:
    torch.manual_seed(0)
    return Tower(SETTINGS, len(data.class_names))


def train(data: Data, checkpoint: Path, settings: Settings = SETTINGS) -> dict[str, Tensor]:
    tower = made(data)
    vision_tower.train(tower, data, settings, checkpoint)
    return tower.state_dict()


def interrupt_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Stop a run at a step; each one before leaves a checkpoint."""
    draw = vision_tower.draw_batch

    def stopping(data: Data, settings: Settings, at: int) -> Batch:
        if at == step:
            raise KeyboardInterrupt
        return draw(data, settings, at)

    patch.setattr(vision_tower, "CHECKPOINT_SECONDS", 0)
    patch.setattr(vision_tower, "draw_batch", stopping)


def test_an_interrupted_run_ends_as_an_unbroken_one(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = train(data, tmp_path / "one.safetensors")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(2, patch)
        train(data, tmp_path / "two.safetensors")
    resumed = train(data, tmp_path / "two.safetensors")
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_a_checkpoint_of_other_settings_or_pictures_is_refused(data: Data, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    train(data, path)
    written = path.read_bytes()
    fewer = dataclasses.replace(data.concepts[0], keys=("cat-face",))
    others = dataclasses.replace(data, concepts=[fewer, *data.concepts[1:]])
    faster = dataclasses.replace(SETTINGS, learning_rate=1.0)
    for changed, settings in ((data, faster), (others, SETTINGS)):
        with pytest.raises(SystemExit, match=rf"{path} was made with other .*: delete it"):
            train(changed, path, settings)
    assert path.read_bytes() == written


def test_a_batch_has_the_declared_shares(data: Data) -> None:
    batch = vision_tower.draw_batch(data, SETTINGS, step=3)
    classes = Counter(batch.concept.tolist())
    assert classes[data.blank_class] == 2 and classes[data.shape_class] == 2
    assert sum(classes[number] for number in range(len(data.concepts))) == 4
    assert batch.pixels.shape == (8, 3, pictures.SIDE, pictures.SIDE)
    assert batch.pixels.min() >= -1 and batch.pixels.max() <= 1
    assert (batch.shape[:6] == pictures.IGNORE).all()
    assert (batch.colour[:6] == pictures.IGNORE).all()


def test_a_concept_is_as_likely_however_often_it_is_drawn(data: Data) -> None:
    settings = dataclasses.replace(SETTINGS, batch=2, blank_share=0.0)
    drawn = Counter(
        int(vision_tower.draw_batch(data, settings, step).concept[0]) for step in range(300)
    )
    assert all(70 <= drawn[number] <= 130 for number in range(3))


def test_rates_rise_and_fall_to_nothing() -> None:
    shares = [vision_tower.rate_share(step, SETTINGS) for step in range(SETTINGS.steps + 1)]
    assert shares == pytest.approx([0.5, 1, 1, 0.5, 0])


def test_what_is_saved_sees_what_the_tower_sees(data: Data, tmp_path: Path) -> None:
    tower = made(data).eval()
    vision_tower.save_tower(tower, data, tmp_path)
    saved = CLIPVisionModel.from_pretrained(tmp_path).eval()
    pixels = vision_tower.normalise(pictures.plain_shapes(data.test_shapes.rgb))
    with torch.no_grad():
        seen = saved(pixel_values=pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        torch.testing.assert_close(seen, tower.patch_tokens(pixels))
    prepare = AutoImageProcessor.from_pretrained(tmp_path)
    images = [image.permute(1, 2, 0).numpy() for image in data.test_shapes.rgb]
    torch.testing.assert_close(prepare(images, return_tensors="pt")["pixel_values"], pixels)
