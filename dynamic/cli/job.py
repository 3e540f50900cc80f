"""An exception that Hydra passes on unchanged."""

from __future__ import annotations


class JobFailed(SystemExit):
    """Carries an error through Hydra, which would print its own report of an ordinary exception."""

    def __init__(self, error: Exception) -> None:
        super().__init__(1)
        self.error = error
