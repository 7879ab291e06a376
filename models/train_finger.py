"""Trains the finger network on generated fingers, and writes it as ONNX.

    python models/finger_data.py FOLDER --masters 8000      generates the training data: an hour and a half on two cores
    python models/train_finger.py FOLDER pose --minutes 20
    python models/train_finger.py FOLDER refine --minutes 12
    python models/train_finger.py FOLDER embedding --minutes 90
    python models/train_finger.py FOLDER export

Each step saves FOLDER/network.pt regularly and starts from it if it exists, so that training can be interrupted; with `--shipped` it
starts from finger256.onnx. One finger in twenty is held out; `finger_curves.csv` keeps the figures on these.
Needs `pip install torch onnxscript`.

Losses: InfoNCE over pairs of impressions (van den Oord, Li and Vinyals, 2018) at temperature 0.07, and additive-margin cosine
softmax over master fingers (Wang et al., "CosFace", 2018), with mirrored fingers as further classes. Half of the batches hold fingers
whose class vectors are similar (hard negatives).
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from finger_augment import Batch, harmed, mirrored, moved, tips
from finger_network import DIMENSION, POSE_PX, FingerNetwork, corrected, pose_of, window
from torch import Tensor, nn
from torch.nn import functional

SEED = 20261125
HELD_OUT = 20
FINGERS = 96  # in a batch, two impressions of each
TEMPERATURE, SCALE, MARGIN, CLASS_SHARE, POSE_SHARE = 0.07, 24.0, 0.25, 0.3, 0.5
LAST = torch.channels_last
BRIEF = torch.cpu._is_avx512_bf16_supported()


class Prints:
    """Everything drawn so far, in memory as it was saved."""

    def __init__(self, folder: Path) -> None:
        chunks = [np.load(path) for path in sorted(folder.glob("[0-9]*.npz"))]
        self.directions, self.minutiae, self.pose, master = (
            torch.from_numpy(np.concatenate([chunk[name] for chunk in chunks]))
            for name in ("directions", "minutiae", "pose", "master")
        )
        numbers, self.master = master.unique(return_inverse=True)
        held = numbers % HELD_OUT == 0
        self.held_out = torch.nonzero(held[self.master])[:, 0]
        self.trained = torch.nonzero(~held[self.master])[:, 0]
        self.masters = torch.nonzero(~held)[:, 0]
        self.count = len(numbers)
        order = torch.argsort(self.master, stable=True)
        self.impressions = len(order) // self.count
        self.of_master = order.reshape(self.count, self.impressions)

    def batch(self, rows: Tensor) -> Batch:
        pose = self.pose[rows]
        return Batch(self.directions[rows].float() / 127, self.minutiae[rows].float(), pose[:, :2], pose[:, 2])

    def hard_batch(self, count: int) -> Batch:
        """Prints that poses are learnt from: any of those to train on, mirrored or not, turned, moved and harmed."""
        batch = self.batch(self.trained[torch.randint(len(self.trained), (count,))])
        return harmed(moved(tips(mirrored(batch, torch.rand(count) < 0.5), 0.2), 25, 12))


class Curves:
    """Appends to finger_curves.csv."""

    def __init__(self, step: str) -> None:
        self._path, self._step, self._started = Path(__file__).with_name("finger_curves.csv"), step, time.monotonic()

    def add(self, **figures: float) -> None:
        minutes = (time.monotonic() - self._started) / 60
        rows = [(self._step, f"{minutes:.1f}", name, f"{value:.5g}") for name, value in figures.items()]
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerows(rows)
        print(self._step, f"{minutes:.1f} min", *(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)


def schedule(optimizer: torch.optim.Optimizer, minutes: float, warm: int = 60) -> Iterator[float]:
    """The share of the time that is over, until it is; sets learning rates: a short rise, then half a cosine."""
    rates = [group["lr"] for group in optimizer.param_groups]
    started, step = time.monotonic(), 0
    while (share := (time.monotonic() - started) / 60 / minutes) < 1:
        factor = min(1.0, step / warm + 0.02) * (0.5 * (1 + math.cos(math.pi * share)) + 0.005)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        yield share
        step += 1


def train_pose(network: FingerNetwork, prints: Prints, minutes: float, save: Path, rate: float) -> None:
    curves = Curves("pose")
    optimizer = torch.optim.AdamW(network.pose.parameters(), lr=rate, weight_decay=1e-3)
    losses = []
    for step, _ in enumerate(schedule(optimizer, minutes)):
        batch = prints.hard_batch(256)
        network.pose.train()
        found = network.pose(batch.directions.contiguous(memory_format=LAST))
        loss = functional.smooth_l1_loss(found, pose_of(batch.core, batch.angle), beta=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 200 == 0:
            torch.save(network.state_dict(), save)
            curves.add(step=step + 1, loss=float(np.mean(losses[-200:])), **pose_errors(network, prints, refined=False))
    torch.save(network.state_dict(), save)
    curves.add(step=len(losses), **pose_errors(network, prints, refined=False))


def train_refining(network: FingerNetwork, prints: Prints, minutes: float, save: Path, rate: float) -> None:
    """From the poses that the first network finds, and worse ones, to the true ones."""
    curves = Curves("refine")
    optimizer = torch.optim.AdamW(network.refine.parameters(), lr=rate, weight_decay=1e-3)
    losses = []
    network.eval()
    for step, _ in enumerate(schedule(optimizer, minutes)):
        batch = prints.hard_batch(256)
        true = pose_of(batch.core, batch.angle)
        network.refine.train()
        with torch.no_grad():
            first = nudged(network.pose(batch.directions.contiguous(memory_format=LAST)), 0.1, 6.0)
            seen = window(batch.directions, batch.minutiae, first).contiguous(memory_format=LAST)
        loss = functional.smooth_l1_loss(corrected(first, network.refine(seen)), true, beta=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 200 == 0:
            torch.save(network.state_dict(), save)
            curves.add(step=step + 1, loss=float(np.mean(losses[-200:])), **pose_errors(network, prints))
    torch.save(network.state_dict(), save)
    curves.add(step=len(losses), **pose_errors(network, prints))


@torch.no_grad()
def pose_errors(network: FingerNetwork, prints: Prints, refined: bool = True) -> dict[str, float]:
    network.eval()
    batch = prints.batch(prints.held_out)
    parts = zip(batch.directions.split(500), batch.minutiae.split(500), strict=True)
    found = torch.cat([network.posed(d, m) if refined else network.pose(d) for d, m in parts])
    away, turned = pose_distance(found, pose_of(batch.core, batch.angle))
    degrees = turned * 180 / math.pi
    return {
        "median px": away.median().item(), "p95 px": away.quantile(0.95).item(),
        "median degrees": degrees.median().item(), "p95 degrees": degrees.quantile(0.95).item(),
    }  # fmt: skip


def pose_distance(found: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """(pixels, radians) between poses."""
    a, b = functional.normalize(found[:, 2:]), functional.normalize(true[:, 2:])
    return (found[:, :2] - true[:, :2]).norm(dim=1) * POSE_PX, torch.acos((a * b).sum(1).clamp(-1, 1))


def train_embedding(network: FingerNetwork, prints: Prints, minutes: float, save: Path, rate: float) -> None:
    curves = Curves("embedding")
    classes_path = save.with_name("classes.pt")
    classes = nn.Parameter(functional.normalize(torch.randn(2 * prints.count, DIMENSION)))
    if classes_path.exists() and (kept := torch.load(classes_path)).shape == classes.shape:
        classes.data = kept
    groups = [
        {"params": network.trunk.parameters(), "lr": rate, "weight_decay": 5e-4},
        {"params": [classes], "lr": 4 * rate, "weight_decay": 0.0},
        {"params": [*network.pose.parameters(), *network.refine.parameters()], "lr": rate / 10, "weight_decay": 1e-3},
    ]
    optimizer = torch.optim.AdamW(groups)
    losses, started, told = [], time.monotonic(), 0.0
    resumed = classes_path.exists()
    for step, share in enumerate(schedule(optimizer, minutes)):
        rows, labels, flipped = choose(prints, classes.detach(), alike=torch.rand(()) < 0.5 * min(1.0, share / 0.1))
        batch = harmed(moved(tips(mirrored(prints.batch(rows), flipped), 0.1), 10, 5))
        network.trunk.train()
        network.pose.eval()  # their statistics stay those of all poses
        network.refine.eval()
        true = pose_of(batch.core, batch.angle)
        # every other time the pose learns from the embedding's loss, so that it lies alike in all impressions of a finger
        with torch.set_grad_enabled(step % 2 == 0), fewer_bits(share):
            found = network.posed(batch.directions.contiguous(memory_format=LAST), batch.minutiae).float()
        away, turned = pose_distance(found, true)
        lost = (away > 48) | (turned > 0.4)  # an arch's height is uncertain: that is to be lived with
        pose = nudged(torch.where(lost[:, None], true, found), 0.07, 3.5)
        posed = functional.smooth_l1_loss(found, true, beta=0.2)
        skew = torch.eye(2) + torch.randn(len(rows), 2, 2) * 0.028
        with fewer_bits(share):
            seen = window(batch.directions, batch.minutiae, pose, skew)
            vectors = network.trunk(seen.contiguous(memory_format=LAST)).float()
        pairs = vectors[0::2] @ vectors[1::2].T / TEMPERATURE
        same = torch.arange(len(pairs))
        contrast = (functional.cross_entropy(pairs, same) + functional.cross_entropy(pairs.T, same)) / 2
        margin = MARGIN * (1.0 if resumed else min(1.0, share / 0.3))
        logits = vectors @ functional.normalize(classes).T
        logits = SCALE * (logits - margin * functional.one_hot(labels, len(classes)))
        by_class = functional.cross_entropy(logits, labels)
        loss = contrast + CLASS_SHARE * by_class + POSE_SHARE * posed
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*network.pose.parameters(), *network.refine.parameters()], 1.0)
        optimizer.step()
        losses.append((contrast.item(), by_class.item(), lost.float().mean().item()))
        if time.monotonic() - told > 400:
            told = time.monotonic()
            torch.save(network.state_dict(), save)
            torch.save(classes.data, classes_path)
            recent = np.mean(losses[-200:], axis=0)
            rate_now = (step + 1) * len(rows) / (told - started)
            curves.add(
                prints=float((step + 1) * len(rows)), a_second=rate_now, contrast=recent[0], by_class=recent[1],
                pose_lost=recent[2], **held_out_ranks(network, prints),
            )  # fmt: skip
    torch.save(network.state_dict(), save)
    torch.save(classes.data, classes_path)
    curves.add(
        prints=float(len(losses) * 2 * FINGERS), **held_out_ranks(network, prints), **pose_errors(network, prints)
    )


def fewer_bits(share: float) -> torch.autocast:
    """Half as much again is seen with products of 16 bits, where the processor has them; the end is trained as it will be used."""
    return torch.autocast("cpu", torch.bfloat16, enabled=BRIEF and share < 0.85)


def choose(prints: Prints, classes: Tensor, alike: bool | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, classes, mirrored) of FINGERS fingers, two impressions each. alike: of those whose classes lie near each other."""
    if alike:
        seeds = prints.masters[torch.randint(len(prints.masters), (12,))] * 2 + torch.randint(2, (12,))
        unit = functional.normalize(classes)
        near = (unit[seeds] @ unit.T).topk(24, dim=1).indices
        chosen = torch.stack([seeds, *near[:, 1:].T]).T.flatten()  # each seed with those near it
        chosen = chosen[torch.isin(chosen // 2, prints.masters)]
        _, first = np.unique(chosen.numpy() // 2, return_index=True)
        chosen = chosen[torch.from_numpy(np.sort(first))]
        chosen = chosen[torch.randperm(len(chosen))[:FINGERS]]
    else:
        chosen = prints.masters[torch.randperm(len(prints.masters))[:FINGERS]] * 2 + torch.randint(2, (FINGERS,))
    picks = torch.rand(len(chosen), prints.impressions).argsort(dim=1)[:, :2]
    rows = prints.of_master[chosen // 2].gather(1, picks).flatten()
    labels = chosen.repeat_interleave(2)
    return rows, labels, labels % 2 == 1


def nudged(pose: Tensor, radians: float, pixels: float) -> Tensor:
    """Poses that are off by so much, some by twice as much, some by a third."""
    much = 0.3 + 1.7 * torch.rand(len(pose), 1)
    turn = torch.randn(len(pose)) * radians * much[:, 0]
    cosine, sine = torch.cos(turn), torch.sin(turn)
    up = torch.stack([pose[:, 2] * cosine - pose[:, 3] * sine, pose[:, 3] * cosine + pose[:, 2] * sine], 1)
    return torch.cat([pose[:, :2] + torch.randn(len(pose), 2) * much * (pixels / POSE_PX), up], 1)


@torch.no_grad()
def embed(network: FingerNetwork, batch: Batch) -> Tensor:
    network.eval()
    parts = zip(batch.directions.split(200), batch.minutiae.split(200), strict=True)
    return torch.cat([network(directions, minutiae)[0] for directions, minutiae in parts])


def held_out_ranks(network: FingerNetwork, prints: Prints) -> dict[str, float]:
    """Each impression but the first of held-out fingers searched among the first ones."""
    vectors, master = embed(network, prints.batch(prints.held_out)), prints.master[prints.held_out]
    first = torch.from_numpy(np.unique(master.numpy(), return_index=True)[1])
    rest = torch.ones(len(master), dtype=torch.bool)
    rest[first] = False
    scores = vectors[rest] @ vectors[first].T
    mine = scores.gather(1, torch.searchsorted(master[first], master[rest])[:, None])
    before = (scores > mine).sum(1).float()
    return {"rank 1": (before == 0).float().mean().item(), "mean before": before.mean().item(), "of": float(len(first))}


def load_shipped(network: FingerNetwork, path: Path) -> None:
    """The weights of an exported network; it was not optimized, so that they have their names."""
    known = {
        one.name: torch.from_numpy(onnx.numpy_helper.to_array(one).copy()) for one in onnx.load(path).graph.initializer
    }
    missing, _ = network.load_state_dict(known, strict=False)
    assert all(name.endswith("num_batches_tracked") for name in missing), missing


def export(network: FingerNetwork, path: Path) -> None:
    network.eval()
    dynamic = torch.export.Dim("n", min=1, max=4096)
    torch.onnx.export(
        network, (torch.zeros(2, 4, 36, 36), torch.zeros(2, 96, 5)), path, dynamo=True, opset_version=20, external_data=False, optimize=False,
        input_names=["directions", "minutiae"], output_names=["embedding", "pose"],
        dynamic_shapes={"directions": {0: dynamic}, "minutiae": {0: dynamic}},
    )  # fmt: skip
    model = onnx.load(path)
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]  # stack traces, with the paths of the machine
    onnx.save(model, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("step", choices=("pose", "refine", "embedding", "export"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--shipped", action="store_true", help="go on from the shipped weights")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    network = FingerNetwork().to(memory_format=LAST)
    save = options.folder / "network.pt"
    shipped = Path(__file__).with_name("finger256.onnx")
    if options.shipped:
        load_shipped(network, shipped)
    elif save.exists():
        network.load_state_dict(torch.load(save), strict=False)
    if options.step == "export":
        export(network, shipped)
        return
    step = {"pose": train_pose, "refine": train_refining, "embedding": train_embedding}[options.step]
    step(network, Prints(options.folder), options.minutes, save, options.rate)


if __name__ == "__main__":
    main()
