"""The parent of worker processes gets every message, and notices how each worker ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import closing
from multiprocessing.connection import Connection

import pytest

from eagle_ds.store.manifest import SampleEntry
from eagle_ds.store.processes import WorkerProcess, receive_all

ENTRY = SampleEntry("a", "a.h5", 1, 1, ((0, 1),), 10)


def send_messages(connection: Connection, *messages: object) -> None:
    for message in messages:
        connection.send(message)


def wait_for_a_message(connection: Connection) -> None:
    connection.recv()


def die(connection: Connection, number: int) -> None:
    os.kill(os.getpid(), number)


def start(body, *arguments: object) -> WorkerProcess:
    return WorkerProcess(multiprocessing.get_context("fork"), body, *arguments)


def test_all_messages_of_all_workers_arrive():
    received = list(
        receive_all([start(send_messages, 1, 2), start(send_messages, ENTRY), start(send_messages)])
    )
    assert len(received) == 3 and {1, 2} < set(received) and ENTRY in received


def test_an_exception_that_a_worker_sends_is_raised_and_the_others_are_stopped():
    waiting = start(wait_for_a_message)
    messages = receive_all([waiting, start(send_messages, ENTRY, ValueError("no such device"))])
    assert next(messages) == ENTRY
    with pytest.raises(ValueError, match="no such device"):
        next(messages)
    assert waiting.process.exitcode == -signal.SIGTERM


def test_a_worker_that_dies_without_a_message_is_noticed_and_the_others_are_stopped():
    waiting = start(wait_for_a_message)
    with pytest.raises(ChildProcessError, match="died with exit code -9"):
        list(receive_all([start(send_messages), start(die, signal.SIGKILL), waiting]))
    assert waiting.process.exitcode == -signal.SIGTERM


def test_workers_are_stopped_when_their_parent_stops_receiving():
    waiting = start(wait_for_a_message)
    with closing(receive_all([start(send_messages, 1), waiting])) as messages:
        assert next(messages) == 1
    assert waiting.process.exitcode == -signal.SIGTERM
