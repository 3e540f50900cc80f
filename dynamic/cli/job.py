"""How a failure gets past Hydra."""

from __future__ import annotations


class JobFailed(SystemExit):
    """Carries an error past Hydra, which would print lines of its own about an ordinary exception."""

    def __init__(self, error: Exception) -> None:
        super().__init__(1)
        self.error = error
