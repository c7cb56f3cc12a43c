"""What the workers of a group are told before the group goes, and how they answer. No Ray here.

Two things are told. A node will be taken away (a notice of preemption): save now, for the node may go before its time;
go on; and shortly before the deadline save again and leave, so that a new group starts elsewhere. Or the group is about
to be ended, for one of another size: finish the step, save, and leave. Either reaches the workers at different moments;
the word travels with the reduction of the loss, so all ranks act on it after the same step.
"""

from __future__ import annotations

import os
import threading
from enum import Enum

LAST_CALL_S = 10.0
"""So long before a node is taken away its group leaves: time for a step, a checkpoint, and the group's end."""


PLAIN = "PRIMA_PLAIN_RAY_TRAIN"
"""Set to 1, this variable leaves Ray Train as it is: for measuring what `elastic_ray` is worth."""


def is_plain() -> bool:
    """Whether this process was asked to leave Ray Train as it is."""
    return os.environ.get(PLAIN) == "1"


class GroupLeaves(Exception):  # noqa: N818 - no error: it tells the controller to start the group elsewhere
    """Every rank saved and left, because a node of the group will be taken away."""


class Notice(Enum):
    """What a rank has heard."""

    NONE = "none"
    SAVE = "save"
    LEAVE = "leave"


class Doorbell:
    """This process's: rung from outside of the training thread, and answered when training has returned."""

    def __init__(self) -> None:
        self._asked, self._left = threading.Event(), threading.Event()

    def ring(self) -> None:
        """Ask the training thread to save and leave."""
        self._asked.set()

    @property
    def rung(self) -> bool:
        return self._asked.is_set()

    def answer(self) -> None:
        """Training has returned, and what it had to save is saved."""
        self._left.set()

    @property
    def answered(self) -> bool:
        return self._left.is_set()


DOORBELL = Doorbell()


def ask_to_leave() -> None:
    """Run in a worker's process by the controller."""
    DOORBELL.ring()


def has_left() -> bool:
    """Run in a worker's process by the controller."""
    return DOORBELL.answered


class PreemptionDiary:
    """What a rank owes to a notice of preemption. A notice is known by its key; one of another node has another key."""

    def __init__(self) -> None:
        self._saved_for: object = None

    def read(self, key: object, *, deadline: float | None, now: float) -> Notice:
        """What the notice wants now; times in seconds since the epoch, no deadline: any moment."""
        if deadline is None or now > deadline - LAST_CALL_S:
            return Notice.LEAVE
        return Notice.NONE if key == self._saved_for else Notice.SAVE

    def saved(self, key: object) -> None:
        """A checkpoint was taken."""
        self._saved_for = key
