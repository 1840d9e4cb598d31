"""One call at a time: what a signal handler or a second thread asks of an object whose call is running is refused."""

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from threading import get_ident
from types import TracebackType
from typing import Concatenate, ParamSpec, Self, TypeVar

from edgecl_device.errors import BusyError, ClosedError, StoreError

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="OneAtATime")


def verb(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that needs an open object, and is the only one to run on it."""

    @functools.wraps(method)
    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        turn = [get_ident()]
        try:
            # One step takes the turn and notes whose it is: a signal handler may run between any two.
            running = self._running.setdefault("turn", turn)
            if running is not turn:
                raise BusyError(_why_busy(running == turn))
            if self._process != os.getpid():
                raise ClosedError(
                    f"learner: belongs to process {self._process}, this is {os.getpid()}, and a fork does not take its store's lock along; "
                    "load the bundle in the process that uses it"
                )
            if self._closed:
                raise ClosedError(f"learner: {self._closed}; load the bundle, with its store, again")
            return method(self, *args, **kwargs)
        finally:
            if self._running.get("turn") is turn:
                try:
                    self._settle()
                finally:
                    del self._running["turn"]
                if self._to_close and not self._closed:  # after the turn: a handler that comes now closes by itself
                    with suppress(StoreError, BusyError):  # nobody waits for its errors, and the call has its own result
                        self.close()

    return run


class OneAtATime(ABC):
    """What can be closed, and whose methods marked with :func:`verb` exclude each other.

    The lock is none that the same thread could take twice: a signal handler runs in the middle of the call that it interrupts,
    where the store may have an update that the state has not.
    """

    def __init__(self) -> None:
        self._running: dict[str, list[int]] = {}  # the thread of the call that is running
        self._process = os.getpid()
        self._to_close = False
        self._closed = ""

    def close(self) -> None:
        """Write the automatic snapshot if anything changed, and close store and engine; harmless when closed already.

        In a process that was forked off it does nothing: store and lock are the first one's.

        In a signal handler that interrupts another call, it returns at once: the call goes on and returns its result, and
        closes at its end.

        Raises:
            StoreFullError: when the snapshot does not fit; closed all the same, and only predictions that wait for a label are
                lost. Not raised where a signal handler asked for it.
        """
        if self._closed or self._process != os.getpid():
            return
        if self._running.get("turn") == [get_ident()]:
            self._to_close = True
        else:
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @abstractmethod
    def _close(self) -> None:
        """Close in a turn of its own."""

    @abstractmethod
    def _settle(self) -> None:
        """What every call does at the end of its turn, whatever its result."""


def _why_busy(same_thread: bool) -> str:
    if same_thread:
        return "learner: a call of it is running in this thread, and a signal handler may call nothing but close(); wait for its return"
    return "learner: another thread is using it; call it from one thread at a time, or guard it with a lock"
