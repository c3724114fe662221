"""Train the vision tower of the embedded demo model from nothing.

A small CLIP-style encoder learns to name emoji and to tell easy-VQA's shapes and colours.  The
heads read the mean patch token of the last hidden state because that is what LLaVA reads
(`vision_feature_layer=-1`, strategy "default"); the heads are only scaffolding for training and
for measuring.

Run: python -m training.vision_tower --out training/out/vision_tower --cache training/cache
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from training import pictures as pics
from training.checkpoints import fingerprint, load_checkpoint, save_checkpoint
from training.common import timed

MEAN_AND_STD = 0.5
CHECKPOINT_SECONDS = 60
LOG_EVERY = 25
WHITENING_BATCHES = 40


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is learnt; a checkpoint of other settings is not resumed."""

    steps: int = 1600
    batch: int = 96
    emoji_share: float = 0.5
    blank_share: float = 0.05
    learning_rate: float = 1e-3
    muon_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 100
    label_smoothing: float = 0.05
    easy_start: float = 0.2
    easy_share: float = 0.6
    patch: int = 24
    hidden: int = 192
    layers: int = 4
    heads: int = 4
    seed: int = 7


@dataclass(frozen=True)
class Data:
    """The pictures of all splits and the names of their classes."""

    concepts: list[pics.Concept]
    train_emoji: pics.EmojiSet
    held_out_emoji: pics.EmojiSet
    train_shapes: pics.ShapeSet
    test_shapes: pics.ShapeSet

    @property
    def blank_class(self) -> int:
        """Return the number of the class "nothing there"."""
        return len(self.concepts)

    @property
    def shape_class(self) -> int:
        """Return the number of the class "an easy-VQA shape"."""
        return len(self.concepts) + 1

    @property
    def class_names(self) -> list[str]:
        """Return the name of each class of the concept head."""
        return [*(concept.name for concept in self.concepts), "blank", "easy-vqa shape"]


@dataclass(frozen=True)
class Batch:
    """Normalised pictures with the labels of all three heads."""

    pixels: torch.Tensor
    concept: torch.Tensor
    shape: torch.Tensor
    colour: torch.Tensor


class Tower(nn.Module):
    """The vision encoder with its three classification heads."""

    def __init__(self, settings: Settings, classes: int) -> None:
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=settings.hidden,
            intermediate_size=4 * settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            image_size=pics.SIDE,
            patch_size=settings.patch,
        )
        self.vision = CLIPVisionModel(config)
        # LLaVA takes the last hidden state before CLIP's own final norm, so the heads bring one.
        self.norm = nn.LayerNorm(settings.hidden)
        self.concept = nn.Linear(settings.hidden, classes)
        self.shape = nn.Linear(settings.hidden, len(pics.SHAPES))
        self.colour = nn.Linear(settings.hidden, len(pics.COLOURS))

    def patch_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the patch tokens LLaVA would read, without the class token."""
        tokens: torch.Tensor = self.vision(pixel_values=pixels).last_hidden_state
        return tokens[:, 1:]

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the logits of concept, shape and colour."""
        pooled = self.norm(self.patch_tokens(pixels)).mean(dim=1)
        return self.concept(pooled), self.shape(pooled), self.colour(pooled)


@torch.no_grad()
def liken_attention(tower: Tower, settings: Settings) -> None:
    """Start attention where trained vision transformers end up: like attends to like.

    Query-key products begin near the identity and value-output products near its negative, which
    saves a small data set from having to teach it (Trockman and Kolter, "mimetic" initialisation).
    """
    hidden, width = settings.hidden, settings.hidden // settings.heads
    for layer in tower.vision.encoder.layers:
        attention = layer.self_attn
        basis = torch.linalg.qr(torch.randn(hidden, hidden))[0]
        attention.v_proj.weight.copy_(0.6 * basis)
        attention.out_proj.weight.copy_(-0.3 * basis.T + 0.02 * torch.randn(hidden, hidden))
        for head in range(settings.heads):
            rows = slice(head * width, (head + 1) * width)
            shared = 0.7 * torch.linalg.qr(torch.randn(hidden, width))[0].T
            attention.q_proj.weight[rows] = shared
            attention.k_proj.weight[rows] = shared


@torch.no_grad()
def whiten_patch_embedding(tower: Tower, data: Data, settings: Settings) -> None:
    """Start the patch embedding from the whitened principal components of real patches.

    With random filters nearly all of a token's variance is the patch's mean colour, and the tower
    learns colours long before any outline.  Whitened components give outlines an equal voice from
    the first step.  The mean, which the embedding has no bias for, goes into the positions.
    """
    batches = range(settings.steps, settings.steps + WHITENING_BATCHES)
    pixels = torch.cat([draw_batch(data, settings, step).pixels for step in batches])
    patches = F.unfold(pixels, settings.patch, stride=settings.patch).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(dim=0)
    variance, axes = torch.linalg.eigh(torch.cov(patches.T))
    variance, axes = variance.flip(0)[: settings.hidden], axes.flip(1)[:, : settings.hidden]
    # The floor keeps the faintest components, mostly noise, from being blown up.
    filters = (axes / (variance + variance[settings.hidden // 4]).sqrt()).T
    embeddings = tower.vision.embeddings
    embeddings.patch_embedding.weight.copy_(
        filters.reshape(embeddings.patch_embedding.weight.shape)
    )
    positions = embeddings.position_embedding.weight
    positions[1:] = 0.5 * grid_positions(pics.SIDE // settings.patch, settings.hidden)
    positions[1:] -= filters @ mean


def grid_positions(cells: int, hidden: int) -> torch.Tensor:
    """Return sine-cosine codes of the cells of a square grid, row by row."""
    quarter = hidden // 4
    waves = torch.exp(-math.log(2.0 * cells) * torch.arange(quarter) / quarter)
    angles = torch.arange(cells).unsqueeze(1) * waves * math.pi / 2
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = line.unsqueeze(1).expand(cells, cells, 2 * quarter)
    columns = line.unsqueeze(0).expand(cells, cells, 2 * quarter)
    return torch.cat([rows, columns], dim=2).reshape(cells * cells, hidden)


def load_data(cache: Path) -> Data:
    """Load all pictures, drawing and fetching what the cache lacks."""
    concepts = pics.load_concepts()
    emoji = pics.load_emoji(concepts, cache)
    train_shapes, test_shapes = pics.load_shapes()
    return Data(
        concepts, emoji.of(held_out=False), emoji.of(held_out=True), train_shapes, test_shapes
    )


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Bring pictures in [0, 1] to the range the tower is trained on."""
    return (pixels - MEAN_AND_STD) / MEAN_AND_STD


def strength_at(step: int, settings: Settings) -> float:
    """Return how strongly emoji are moved at a step: it grows, then stays at its full value."""
    done = min(1.0, step / (settings.easy_share * settings.steps))
    return settings.easy_start + (1 - settings.easy_start) * done


def draw_batch(data: Data, settings: Settings, step: int) -> Batch:
    """Make the batch of one step.

    The generator is seeded by the step, so a resumed run sees just what an unbroken one would.
    """
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    emoji_count = round(settings.batch * settings.emoji_share)
    blank_count = round(settings.batch * settings.blank_share)
    shape_count = settings.batch - emoji_count - blank_count

    labels = data.train_emoji.concept
    # Each concept is equally likely, however many artists or variants draw it.
    weights = 1.0 / torch.bincount(labels)[labels]
    chosen = torch.multinomial(weights, emoji_count, generator=generator)
    shapes = torch.randint(len(data.train_shapes.rgb), (shape_count,), generator=generator)

    unknown = torch.full((emoji_count + blank_count,), pics.IGNORE)
    return Batch(
        pixels=normalise(
            torch.cat(
                [
                    pics.augmented_emoji(
                        data.train_emoji.rgba[chosen], generator, strength_at(step, settings)
                    ),
                    pics.blanks(blank_count, generator),
                    pics.augmented_shapes(data.train_shapes.rgb[shapes], generator),
                ]
            )
        ),
        concept=torch.cat(
            [
                labels[chosen],
                torch.full((blank_count,), data.blank_class),
                torch.full((shape_count,), data.shape_class),
            ]
        ),
        shape=torch.cat([unknown, data.train_shapes.shape[shapes]]),
        colour=torch.cat([unknown, data.train_shapes.colour[shapes]]),
    )


def batch_loss(tower: Tower, batch: Batch, settings: Settings) -> torch.Tensor:
    """Add up the three heads' losses; bfloat16 is used inside because it is half again as fast."""
    with torch.autocast("cpu", torch.bfloat16):
        concept, shape, colour = tower(batch.pixels)
    loss = F.cross_entropy(concept.float(), batch.concept, label_smoothing=settings.label_smoothing)
    for logits, labels in ((shape, batch.shape), (colour, batch.colour)):
        if bool((labels != pics.IGNORE).any()):
            loss = loss + 0.5 * F.cross_entropy(logits.float(), labels, ignore_index=pics.IGNORE)
    return loss


def rate_share(step: int, settings: Settings) -> float:
    """Return the share of the full rates: a linear warm-up, then half a cosine down to zero."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def make_optimizers(tower: Tower, settings: Settings) -> list[torch.optim.Optimizer]:
    """Return Muon for the encoder's matrices and AdamW for everything else.

    AdamW alone had not learnt the shapes when its time was up.  Norms, biases and the class token
    are not decayed.
    """
    matrices, other, free = [], [], []
    for name, parameter in tower.named_parameters():
        if parameter.ndim < 2:
            free.append(parameter)
        elif "encoder.layers" in name:
            matrices.append(parameter)
        else:
            other.append(parameter)
    decay = settings.weight_decay
    muon = torch.optim.Muon(
        matrices, lr=settings.muon_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
    )
    groups = [{"params": other, "weight_decay": decay}, {"params": free, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)
    optimizers: list[torch.optim.Optimizer] = [muon, adam]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_rate"] = group["lr"]
    return optimizers


def made_from(data: Data, settings: Settings) -> str:
    """Return what a checkpoint must agree with to be resumed."""
    return fingerprint([dataclasses.asdict(settings), pics.emoji_digest(data.concepts)])


def train(tower: Tower, data: Data, settings: Settings, checkpoint: Path) -> float:
    """Train to the last step, resuming if possible, and return the seconds spent in all runs."""
    optimizers = make_optimizers(tower, settings)
    expected = made_from(data, settings)
    progress = load_checkpoint(checkpoint, tower, optimizers, expected)
    first, spent_before = progress.get("step", 0), progress.get("seconds", 0.0)
    if first:
        print(f"resuming at step {first} of {settings.steps}", file=sys.stderr)
    started = saved = time.monotonic()
    tower.train()

    def save(step: int) -> None:
        seconds = spent_before + time.monotonic() - started
        facts = {"fingerprint": expected, "step": step, "seconds": seconds}
        save_checkpoint(checkpoint, tower, optimizers, facts)

    for step in range(first, settings.steps):
        share = rate_share(step, settings)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * group["full_rate"]
        loss = batch_loss(tower, draw_batch(data, settings, step), settings)
        tower.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss became {loss.item()} at step {step}")
        now = time.monotonic()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == settings.steps:
            rate = (step + 1 - first) * settings.batch / (now - started)
            print(
                f"step {step + 1}/{settings.steps} loss {loss.item():.3f} {rate:.0f} images/s",
                file=sys.stderr,
                flush=True,
            )
        if now - saved >= CHECKPOINT_SECONDS:
            save(step + 1)
            saved = now
    save(settings.steps)
    return spent_before + time.monotonic() - started


@torch.inference_mode()
def logits_of(
    tower: Tower, pixels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the tower over many pictures in float32, the precision it is shipped in."""
    parts = [tower(normalise(chunk)) for chunk in torch.split(pixels, 128)]
    concept, shape, colour = (torch.cat(column) for column in zip(*parts, strict=True))
    return concept, shape, colour


def accuracy(logits: torch.Tensor, labels: torch.Tensor, top: int = 1) -> float:
    """Return the share of known labels that are among the `top` highest logits."""
    known = labels != pics.IGNORE
    best = logits[known].topk(top, dim=1).indices
    return (best == labels[known].unsqueeze(1)).any(dim=1).float().mean().item()


def measure(tower: Tower, data: Data, settings: Settings) -> dict[str, Any]:
    """Measure every head on what it has and on what it has not been trained on."""
    tower.eval()
    generator = torch.Generator().manual_seed(settings.seed)
    concept, shape, colour = logits_of(tower, pics.plain_shapes(data.test_shapes.rgb))
    as_shape = torch.full((len(concept),), data.shape_class)
    result: dict[str, Any] = {
        "easy_vqa_test": {
            "shape": accuracy(shape, data.test_shapes.shape),
            "colour": accuracy(colour, data.test_shapes.colour),
            "recognised_as_easy_vqa": accuracy(concept, as_shape),
            "images": len(concept),
            "shape_labelled": int((data.test_shapes.shape != pics.IGNORE).sum()),
            "colour_labelled": int((data.test_shapes.colour != pics.IGNORE).sum()),
        }
    }
    for name, emoji in (
        ("held_out_artist", data.held_out_emoji),
        ("training_artists", data.train_emoji),
    ):
        plain = logits_of(tower, pics.plain_emoji(emoji.rgba))[0]
        augmented = logits_of(tower, pics.augmented_emoji(emoji.rgba, generator))[0]
        result[name] = {
            "top1": accuracy(plain, emoji.concept),
            "top5": accuracy(plain, emoji.concept, 5),
            "augmented_top1": accuracy(augmented, emoji.concept),
            "augmented_top5": accuracy(augmented, emoji.concept, 5),
            "images": len(plain),
        }
        if name == "held_out_artist":
            result["held_out_per_concept"] = {
                entry.name: accuracy(plain[emoji.concept == i], emoji.concept[emoji.concept == i])
                for i, entry in enumerate(data.concepts)
            }
    blank = logits_of(tower, pics.blanks(256, generator))[0]
    result["blank"] = accuracy(blank, torch.full((len(blank),), data.blank_class))
    with torch.inference_mode():
        sample = normalise(pics.plain_emoji(data.held_out_emoji.rgba[:64]))
        result["patch_token_rms"] = tower.patch_tokens(sample).square().mean().sqrt().item()
    return result


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def save_tower(tower: Tower, data: Data, out: Path) -> None:
    """Save the encoder, the picture preparation LLaVA must repeat, the heads and their classes."""
    tower.vision.save_pretrained(out)
    CLIPImageProcessorPil(
        do_resize=True,
        size={"height": pics.SIDE, "width": pics.SIDE},
        do_center_crop=False,
        image_mean=[MEAN_AND_STD] * 3,
        image_std=[MEAN_AND_STD] * 3,
    ).save_pretrained(out)
    heads = {
        name: value.contiguous()
        for name, value in tower.state_dict().items()
        if not name.startswith("vision.")
    }
    pics.write_via_rename(out / "heads.safetensors", lambda target: save_file(heads, target))
    facts = {
        "concept_head": data.class_names,
        "categories": {concept.name: concept.category for concept in data.concepts},
        "shape_head": list(pics.SHAPES),
        "colour_head": list(pics.COLOURS),
    }
    text = json.dumps(facts, indent=1) + "\n"
    pics.write_via_rename(out / "classes.json", lambda target: _write(target, text))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the demo model's vision tower.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained tower")
    parser.add_argument("--cache", type=Path, required=True, help="folder for fetched pictures")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--patch", type=int, default=Settings.patch, choices=(12, 16, 24))
    parser.add_argument(
        "--threads", type=int, default=2, help="use 1 where another process keeps a core busy"
    )
    parser.add_argument("--seed", type=int, default=Settings.seed)
    return parser.parse_args()


def main() -> None:
    """Train, measure and save the tower."""
    arguments = parse_arguments()
    settings = Settings(steps=arguments.steps, patch=arguments.patch, seed=arguments.seed)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(settings.seed)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    data = load_data(arguments.cache)
    print(
        f"{len(data.concepts)} concepts, {len(data.train_emoji.rgba)} training and "
        f"{len(data.held_out_emoji.rgba)} held-out emoji, {len(data.train_shapes.rgb)} shapes",
        file=sys.stderr,
    )
    tower = Tower(settings, len(data.class_names))
    whiten_patch_embedding(tower, data, settings)
    liken_attention(tower, settings)
    seconds = train(tower, data, settings, out / "checkpoint.safetensors")
    save_tower(tower, data, out)
    metrics = measure(tower, data, settings)
    metrics["settings"] = dataclasses.asdict(settings)
    metrics["seconds"] = seconds
    metrics["images_per_second"] = settings.steps * settings.batch / seconds
    metrics["pictures"] = {
        artist.package: {
            "version": artist.version,
            "licence": artist.licence,
            "held_out": artist.held_out,
        }
        for artist in pics.ARTISTS
    }
    text = json.dumps(metrics, indent=1) + "\n"
    pics.write_via_rename(out / "metrics.json", lambda target: _write(target, text))
    brief = {name: value for name, value in metrics.items() if name != "held_out_per_concept"}
    print(json.dumps(brief, indent=1), file=sys.stderr)


if __name__ == "__main__":
    with timed("vision_tower"):
        main()
