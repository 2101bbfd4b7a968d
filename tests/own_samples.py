"""Sets of a user's own samples as a job makes them, and what its check makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hybrid.data.check import check_samples
from hybrid.data.samples import job_sets
from tests.conftest import small_job
from tests.own_data import Own

NAME = "data.name = 'tests.own_data:augmented_sets'"
X, Y = torch.ones(3), torch.tensor(1)


def sets(train: Any, test: Any = None, collate: Any = None) -> tuple[Any, Any]:
    return job_sets(NAME, 5, train, train if test is None else test, collate)


def judge(make: Callable[[int], Any], collate: Any = None, size: int = 7) -> Any:
    """What the check of a job makes of such samples."""
    return check_samples(small_job(), *sets(Own(size, make), None, collate))
