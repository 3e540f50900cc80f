"""The expert budget of one request.

Shape suffixes as in ``kernels/api/types.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class RequestBudget:
    """What every decoded token of a request may use: see :class:`ExpertBudget`."""

    keep_L: np.ndarray  # float32
    cap_L: np.ndarray  # int32
