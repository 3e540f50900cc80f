"""Operations of layers with recurrent states, as a part of the torch backend."""

from __future__ import annotations

from ..reference import states as reference


class StateOperations:
    """What a backend does for layers that keep a state for each sequence; see :mod:`.reference.states`."""

    short_convolution = staticmethod(reference.short_convolution)
    recurrence = staticmethod(reference.recurrence)
