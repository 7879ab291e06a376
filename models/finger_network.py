"""The finger network: from a print's directions and minutiae to its pose, its inputs in that pose, and a vector of 256 numbers.

Owns its layers, in PyTorch. `train_finger.py` trains it and writes it as ONNX; biodedup itself never imports this.

One network from the captured print to a unit vector. The first part estimates the pose (the core's position and the upward direction);
a differentiable resampling rotates the inputs into it (spatial transformer, Jaderberg et al., 2015; for
fingerprints Engelsma, Cao and Jain, "Learning a fixed-length fingerprint representation", 2019), the rest embeds them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from biodedup.embed.finger_input import CELL_PX, CELLS

ROWS, COLUMNS, FINE_PX = 42, 36, 16 / 3
"""The window in the finger's own pose: 17.1 mm high and 14.6 mm wide, in cells of 8 pixels at 500 dpi."""
BELOW_CORE_PX = 8.0
"""The window's middle lies this far below the core."""
DIRECTIONS = 8
SHARPNESS = 2.5  # of a minutia's share in the channels of directions, as a von Mises law's concentration
SPREAD = 0.8  # of a minutia, in squared fine cells
POSE_PX = 50.0
REFINED_PX, REFINED_RADIANS = 10.0, 0.2
DIMENSION = 256


def _convolution(given: int, wanted: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(given, wanted, size, stride, size // 2, bias=False), nn.BatchNorm2d(wanted), nn.ReLU(inplace=True)
    )


class PoseNetwork(nn.Module):
    """directions (n, 4, 36, 36) -> (n, 4): x, y of the core from the centre in POSE_PX, cosine and sine of the finger's angle."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _convolution(4, 24, 2, 5), _convolution(24, 48), _convolution(48, 64, 2), _convolution(64, 64),
            nn.Conv2d(64, 32, 1), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(32 * 81, 160), nn.ReLU(inplace=True), nn.Linear(160, 4))

    def forward(self, directions: Tensor) -> Tensor:
        found: Tensor = self.head(self.features(directions))
        return found


class RefiningNetwork(nn.Module):
    """What lies in the window of a first pose -> (n, 3): how far that pose is off, along the window's x and y in REFINED_PX and
    in REFINED_RADIANS."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _convolution(DIRECTIONS + 4, 32, 2), _convolution(32, 48, 2), _convolution(48, 64),
            nn.Conv2d(64, 24, 1), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(24 * 11 * 9, 96), nn.ReLU(inplace=True), nn.Linear(96, 3))

    def forward(self, seen: Tensor) -> Tensor:
        found: Tensor = self.head(self.features(seen))
        return found


class Trunk(nn.Module):
    """What lies in the window (n, DIRECTIONS + 4, ROWS, COLUMNS) -> unit vectors (n, DIMENSION)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _convolution(DIRECTIONS + 4, 32)
        self.down1, self.same1 = _convolution(32, 64, 2), _convolution(64, 64)
        self.down2, self.same2 = _convolution(64, 96, 2), _convolution(96, 96)
        self.last = _convolution(96, 48, size=1)
        self.drop = nn.Dropout(0.1)
        self.project = nn.Linear(48 * 11 * 9, DIMENSION, bias=False)
        self.norm = nn.BatchNorm1d(DIMENSION)

    def forward(self, window: Tensor) -> Tensor:
        x = self.down1(self.first(window))
        x = self.down2(x + self.same1(x))
        x = self.last(x + self.same2(x))
        return functional.normalize(self.norm(self.project(self.drop(x.flatten(1)))))


class FingerNetwork(nn.Module):
    """(directions (n, 4, 36, 36), minutiae (n, m, 5)) -> (unit vectors (n, 256), pose (n, 4))."""

    def __init__(self) -> None:
        super().__init__()
        self.pose = PoseNetwork()
        self.refine = RefiningNetwork()
        self.trunk = Trunk()

    def posed(self, directions: Tensor, minutiae: Tensor) -> Tensor:
        first: Tensor = self.pose(directions)
        return corrected(first, self.refine(window(directions, minutiae, first)))

    def forward(self, directions: Tensor, minutiae: Tensor) -> tuple[Tensor, Tensor]:
        pose = self.posed(directions, minutiae)
        return self.trunk(window(directions, minutiae, pose)), pose


def _mapped(points: Tensor, matrix: Tensor) -> Tensor:
    """Points (n, m, 2) by matrices (n, 2, 2). Not as a product of matrices, which may be of fewer bits than places need."""
    x, y = points[:, :, 0], points[:, :, 1]
    return torch.stack([x * matrix[:, i, :1] + y * matrix[:, i, 1:] for i in (0, 1)], 2)


def pose_of(core: Tensor, angle: Tensor) -> Tensor:
    """What the pose network should say. core: (n, 2) pixels from the centre; angle: (n,) radians."""
    return torch.cat([core / POSE_PX, torch.cos(angle)[:, None], torch.sin(angle)[:, None]], 1)


def corrected(pose: Tensor, off: Tensor) -> Tensor:
    """The pose, moved and turned by what the refining network found."""
    up = functional.normalize(pose[:, 2:])
    cosine, sine = up[:, :1], up[:, 1:]
    x, y = off[:, :1] * (REFINED_PX / POSE_PX), off[:, 1:2] * (REFINED_PX / POSE_PX)
    turn = off[:, 2:] * REFINED_RADIANS
    core = pose[:, :2] + torch.cat([cosine * x - sine * y, sine * x + cosine * y], 1)
    c, s = torch.cos(turn), torch.sin(turn)
    return torch.cat([core, cosine * c - sine * s, sine * c + cosine * s], 1)


def window(directions: Tensor, minutiae: Tensor, pose: Tensor, skew: Tensor | None = None) -> Tensor:
    """The print in its pose: (n, DIRECTIONS + 4, ROWS, COLUMNS). skew: (n, 2, 2), a distortion to train with."""
    core = pose[:, :2] * POSE_PX
    up = functional.normalize(pose[:, 2:])
    cosine, sine = up[:, :1], up[:, 1:]
    turn = torch.stack([torch.cat([cosine, -sine], 1), torch.cat([sine, cosine], 1)], 1)  # window -> print
    back = turn.transpose(1, 2)  # print -> window
    if skew is not None:
        turn, back = turn @ skew, torch.linalg.inv(skew) @ back

    y = (torch.arange(ROWS, dtype=pose.dtype) - (ROWS - 1) / 2) * FINE_PX + BELOW_CORE_PX
    x = (torch.arange(COLUMNS, dtype=pose.dtype) - (COLUMNS - 1) / 2) * FINE_PX
    places = torch.stack([x[None, :].expand(ROWS, COLUMNS), y[:, None].expand(ROWS, COLUMNS)], -1).reshape(1, -1, 2)
    there = _mapped(places, turn) + core[:, None]
    grid = (there / (CELLS * CELL_PX / 2)).reshape(-1, ROWS, COLUMNS, 2)
    seen = functional.grid_sample(directions, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    cosine2, sine2 = (cosine * cosine - sine * sine)[:, :, None], (2 * sine * cosine)[:, :, None]
    upright = torch.stack(
        [cosine2 * seen[:, 0] + sine2 * seen[:, 1], cosine2 * seen[:, 1] - sine2 * seen[:, 0], seen[:, 2], seen[:, 3]],
        1,
    )

    at = _mapped(minutiae[:, :, :2] - core[:, None], back) / FINE_PX
    nearness_x = torch.exp((at[:, :, :1] - x / FINE_PX) ** 2 * (-0.5 / SPREAD))
    nearness_y = torch.exp((at[:, :, 1:] - y / FINE_PX) ** 2 * (-0.5 / SPREAD))
    ways = torch.arange(DIRECTIONS, dtype=pose.dtype) * (2 * math.pi / DIRECTIONS)
    along = minutiae[:, :, 2:3] * cosine[:, None] + minutiae[:, :, 3:4] * sine[:, None]
    aside = minutiae[:, :, 3:4] * cosine[:, None] - minutiae[:, :, 2:3] * sine[:, None]
    shares = torch.exp(SHARPNESS * (along * torch.cos(ways) + aside * torch.sin(ways) - 1)) * minutiae[:, :, 4:]
    weighted = (shares[:, :, :, None] * nearness_y[:, :, None, :]).flatten(2)  # (n, m, DIRECTIONS * ROWS)
    splat = (weighted.transpose(1, 2) @ nearness_x).reshape(-1, DIRECTIONS, ROWS, COLUMNS)
    return torch.cat([splat, upright], 1)
