"""Convolutional networks as people bring them, laid out as torchvision's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

CLASSES = 7


class AlexNet(nn.Module):
    """Images [B, 3, 35, 35] to logits [B, classes], laid out as torchvision's AlexNet."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 9, kernel_size=5, stride=2, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(9, 15, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(15, 11, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(11 * 2 * 2, 27),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(27, 19),
            nn.ReLU(inplace=True),
            nn.Linear(19, CLASSES),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class BasicBlock(nn.Module):
    """A residual block with batch norms, as torchvision's."""

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)
        self.downsample: nn.Module | None = None
        if stride != 1 or inplanes != planes:
            conv = nn.Conv2d(inplanes, planes, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + identity)


class ResNet(nn.Module):
    """Images [B, 3, 15, 15] to logits [B, classes], laid out as torchvision's ResNet-18."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(5, 5, 1), BasicBlock(5, 5, 1))
        self.layer2 = nn.Sequential(BasicBlock(5, 9, 2), BasicBlock(9, 9, 1))
        self.layer3 = nn.Sequential(BasicBlock(9, 13, 2), BasicBlock(13, 13, 1))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(13, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))
