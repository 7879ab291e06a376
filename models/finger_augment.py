"""Augments a batch of training prints: rotated, cropped, with lost, moved and false minutiae, and distorted directions.

Owns the augmentations. All random numbers come from PyTorch's generator, on whole batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from biodedup.embed.finger_input import CELL_PX, CELLS

HALF_PX = CELLS * CELL_PX / 2
_FALSE_MOST = 28


@dataclass
class Batch:
    """directions (n, 4, 36, 36), minutiae (n, m, 5), core (n, 2) pixels from the centre, angle (n,) radians."""

    directions: Tensor
    minutiae: Tensor
    core: Tensor
    angle: Tensor


def mirrored(batch: Batch, which: Tensor) -> Batch:
    """Those of which `which`, bool (n,), is true as in a mirror: other fingers, as plausible as they."""
    sign = torch.where(which, -1.0, 1.0)
    flipped = batch.directions.flip(3) * torch.tensor([1.0, -1.0, 1.0, 1.0])[None, :, None, None]
    directions = torch.where(which[:, None, None, None], flipped, batch.directions)
    one = torch.ones_like(sign)
    minutiae = batch.minutiae * torch.stack([sign, one, sign, one, one], 1)[:, None]
    return Batch(directions, minutiae, batch.core * torch.stack([sign, one], 1), batch.angle * sign)


def moved(batch: Batch, degrees: float, pixels: float) -> Batch:
    """Turned by up to `degrees` about the centre and moved by a normal `pixels`."""
    n = len(batch.angle)
    return _placed(batch, (torch.rand(n) * 2 - 1) * math.radians(degrees), torch.randn(n, 2) * pixels)


def tips(batch: Batch, share: float) -> Batch:
    """Of a share of the prints what lies below the core, or a little above it, is cut off, and the rest is centred anew: tips of
    fingers, whose pose is to be told from the ridges above the core."""
    line = 95 * torch.rand(len(batch.angle), 1) - 50  # pixels below the core

    def above(x: Tensor, y: Tensor) -> Tensor:
        down = (y - batch.core[:, 1:]) * torch.cos(batch.angle)[:, None]
        return down - (x - batch.core[:, :1]) * torch.sin(batch.angle)[:, None] < line

    centres = (torch.arange(CELLS) + 0.5) * CELL_PX - HALF_PX
    x, y = centres.repeat(CELLS), centres.repeat_interleave(CELLS)
    inside = batch.directions[:, 2].flatten(1)
    left = inside * above(x[None], y[None])
    chosen = (torch.rand(len(line)) < share) & (left.sum(1) > 0.4 * inside.sum(1))
    kept = above(x[None], y[None]) | ~chosen[:, None]
    directions = batch.directions * kept.reshape(-1, 1, CELLS, CELLS)
    minutiae = batch.minutiae.clone()
    minutiae[:, :, 4] *= above(minutiae[:, :, 0], minutiae[:, :, 1]) | ~chosen[:, None]
    middle = torch.stack([(left * x).sum(1), (left * y).sum(1)], 1) / left.sum(1, keepdim=True).clamp_min(1)
    cut = Batch(directions, minutiae, batch.core, batch.angle)
    return _placed(cut, torch.zeros(len(line)), -middle * chosen[:, None])


def _placed(batch: Batch, turn: Tensor, shift: Tensor) -> Batch:
    """Turned by radians (n,) about the centre, then moved by pixels (n, 2)."""
    cosine, sine = torch.cos(turn), torch.sin(turn)
    rotation = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)
    back = torch.cat([rotation.transpose(1, 2), -(rotation.transpose(1, 2) @ shift[:, :, None]) / HALF_PX], 2)
    grid = functional.affine_grid(back, list(batch.directions.shape), align_corners=False)
    seen = functional.grid_sample(batch.directions, grid, align_corners=False)
    twice = torch.stack([torch.cos(2 * turn), torch.sin(2 * turn)], 1)
    minutiae = batch.minutiae.clone()
    minutiae[:, :, :2] = batch.minutiae[:, :, :2] @ rotation.transpose(1, 2) + shift[:, None]
    minutiae[:, :, 2:4] = batch.minutiae[:, :, 2:4] @ rotation.transpose(1, 2)
    core = (batch.core[:, None] @ rotation.transpose(1, 2))[:, 0] + shift
    return Batch(_turned(seen, twice[:, 0, None, None], twice[:, 1, None, None]), minutiae, core, batch.angle + turn)


def harmed(batch: Batch) -> Batch:
    """Cut, rubbed out, bent; with minutiae lost, moved and invented."""
    n = len(batch.angle)
    hard = torch.rand(n)
    directions, minutiae = batch.directions, batch.minutiae.clone()

    # sides cut off, and patches rubbed out
    centres = (torch.arange(CELLS) + 0.5) * CELL_PX - HALF_PX
    x, y = centres[None, None, :], centres[None, :, None]
    cut = torch.rand(n, 4) * 115 * (torch.rand(n, 4) < 0.35) * (torch.rand(n, 1) < 0.6)
    cut = cut[:, :, None, None]
    kept = (
        (x >= cut[:, 0] - HALF_PX) & (x < HALF_PX - cut[:, 1]) & (y >= cut[:, 2] - HALF_PX) & (y < HALF_PX - cut[:, 3])
    )
    patch = torch.randn(n, 2, 1, 1) * 55
    radius = (8 + 40 * torch.rand(n, 1, 1)) * (torch.rand(n, 1, 1) < 0.3)
    kept &= (x - patch[:, 0]) ** 2 + (y - patch[:, 1]) ** 2 >= radius**2
    directions = directions * kept[:, None]

    # a smooth error of direction, a period that is off everywhere, and noise
    bend = functional.interpolate(torch.randn(n, 1, 6, 6), size=(CELLS, CELLS), mode="bicubic", align_corners=False)[
        :, 0
    ]
    bend = bend * 0.28 * hard[:, None, None] * (torch.rand(n, 1, 1) < 0.7)
    directions = _turned(directions, torch.cos(bend), torch.sin(bend))
    share = directions[:, 2:3]
    off = torch.cat([torch.zeros(n, 3, 1, 1), torch.randn(n, 1, 1, 1) * 0.15], 1)
    directions = directions + off * share + torch.randn_like(directions) * 0.04 * (share > 0)

    def cell(points: Tensor) -> Tensor:
        at = ((points + HALF_PX) / CELL_PX).long().clamp(0, CELLS - 1)
        return at[..., 1] * CELLS + at[..., 0]

    survives = kept.flatten(1).gather(1, cell(minutiae[:, :, :2])) & (
        torch.rand(minutiae.shape[:2]) > 0.45 * hard[:, None]
    )
    minutiae[:, :, 4] *= survives
    minutiae[:, :, :2] += torch.randn(n, minutiae.shape[1], 2) * 1.7
    jitter = torch.randn(minutiae.shape[:2]) * 0.16 + math.pi * (torch.rand(minutiae.shape[:2]) < 0.03)
    cosine, sine = torch.cos(jitter), torch.sin(jitter)
    minutiae[:, :, 2:4] = torch.stack(
        [minutiae[:, :, 2] * cosine - minutiae[:, :, 3] * sine, minutiae[:, :, 3] * cosine + minutiae[:, :, 2] * sine],
        2,
    )

    places = (torch.rand(n, _FALSE_MOST, 2) * 2 - 1) * 115
    at = cell(places)
    there = [directions[:, k].flatten(1).gather(1, at) for k in range(3)]
    way = torch.atan2(there[1], there[0]) / 2 + math.pi * (torch.rand(at.shape) < 0.5) + torch.randn(at.shape) * 0.1
    present = (there[2] > 0.3) & (torch.rand(at.shape) < hard[:, None])
    false = torch.cat([places, torch.cos(way)[..., None], torch.sin(way)[..., None], present[..., None]], 2)
    return Batch(directions, torch.cat([minutiae, false], 1), batch.core, batch.angle)


def _turned(directions: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """With the doubled angle turned."""
    a, b = directions[:, 0], directions[:, 1]
    return torch.stack([cosine * a - sine * b, sine * a + cosine * b, directions[:, 2], directions[:, 3]], 1)
