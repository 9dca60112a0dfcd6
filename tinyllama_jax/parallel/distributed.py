"""Several processes as one run, by `jax.distributed`: start, agreement, and the loss of a peer.

Every process runs the same program; process 0, the main one, writes what is written once. jax's
coordination service lives in process 0 and hears the heartbeat of all. A collective that misses a
peer waits for ever (NCCL) or fails with a socket's error (gloo), and neither says who is gone; so a
thread asks the service who lives, and ends the process with a name and an exit code that tells a
launcher to start all again. What processes agree on goes through the service too: it needs no
device, and waits for as long as the slowest takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax

LOST_PEER = 76  # the exit code: start all processes again

_ASK_SECONDS = 2.0
_INITIALIZATION_SECONDS = 300
_PATIENCE_MS = 7 * 24 * 3600 * 1000  # of agreements: who never comes is lost, which `_Peers` sees
# What launchers set, jax's own clusters aside.
_ADDRESS, _COUNT, _ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Set by Slurm and Open MPI for each process of a job step of so many.
_CLUSTER_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_agreements = itertools.count()  # all processes come to the same ones in the same order


@contextlib.contextmanager
def in_use(peer_seconds: int) -> Iterator[None]:
    """Joins the processes that the environment tells of; does nothing where it tells of none.

    It comes before anything else touches a device. Output of all but the main process goes nowhere;
    errors are printed by all. A process that does not find the others ends with `LOST_PEER`.

    Args:
      peer_seconds: a process that has not been heard of for so long is lost, and the others end
        with exit code `LOST_PEER`.

    Raises:
      ValueError: an environment that says half of what it must.
    """
    settings = _settings(os.environ)
    if settings is None:
        yield
        return
    peers = _Peers()
    peers.join(settings, peer_seconds)
    out = sys.stdout
    if not is_main():
        print(f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
              f"the main process tells of the run", file=sys.stderr, flush=True)  # fmt: skip
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        yield
    except SystemExit as end:
        peers.leave_together(end.code if isinstance(end.code, int) else 1)
        raise
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            peers.explain(error)  # and ends here, where a peer is lost
        peers.leave_failed(error)
        raise
    else:
        peers.leave_together(0)
    finally:
        sys.stdout = out


def is_main() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


@contextlib.contextmanager
def together(error: type[ValueError] = ValueError) -> Iterator[None]:
    """All processes come to the end of this block, or none does: a failure of one is one of all.

    Every process must come here. A ValueError or OSError of the block is raised where it arose; the
    other processes raise `error`, with its words.
    """
    own: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as caught:
        own = caught
    if jax.process_count() > 1:
        said = _exchange("" if own is None else str(own) or type(own).__name__)
        failed = [n for n, text in enumerate(said) if text]
        if own is None and failed:
            raise error(f"process {failed[0]} of {len(said)} could not go on: {said[failed[0]]}")
    if own is not None:
        raise own


def from_main(value: Any) -> Any:
    """The main process's value (what JSON holds), in every process; each must come here."""
    if jax.process_count() == 1:
        return value
    return json.loads(_exchange(json.dumps(value) if is_main() else "")[0])


def tell(what: str, text: str) -> None:
    """Leaves a text for whichever process asks `told(what)`; once per process and `what`."""
    if jax.process_count() > 1:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # `_Peers` sees who is gone
            _client().key_value_set(f"told/{what}/{jax.process_index()}", text)


def told(what: str) -> dict[int, str]:
    """What processes have left so far, by their number; nobody is waited for."""
    if jax.process_count() == 1:
        return {}
    left = _client().key_value_dir_get(f"told/{what}")
    return {int(key.rsplit("/", 1)[1]): text for key, text in left}


def _exchange(text: str, patience_ms: int = _PATIENCE_MS) -> list[str]:
    """What every process says, by its number."""
    client, number = _client(), next(_agreements)
    place = f"agreement/{number}"
    client.key_value_set(f"{place}/{jax.process_index()}", text)
    client.wait_at_barrier(f"{place}/all said", patience_ms)
    said = {key.rsplit("/", 1)[1]: value for key, value in client.key_value_dir_get(place)}
    return [said[str(n)] for n in range(jax.process_count())]


def _client() -> Any:
    # What jax.experimental.multihost_utils asks too.
    from jax._src.distributed import global_state

    return global_state.client


def _settings(variables: Any) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None: this process is all."""
    given = [name for name in (_ADDRESS, _COUNT, _ID) if variables.get(name)]
    if not given:
        several = any(int(variables.get(name) or 1) > 1 for name in _CLUSTER_COUNTS)
        return {} if several else None  # jax finds the rest itself
    if len(given) < 3:
        missing = [name for name in (_ADDRESS, _COUNT, _ID) if name not in given]
        raise ValueError(
            f"{', '.join(given)} is set but {', '.join(missing)} is not: a process of several "
            f"needs the coordinator's host:port, how many they are, and its own number; set all "
            f"three, or none to run alone"
        )
    try:
        count, number = int(variables[_COUNT]), int(variables[_ID])
    except ValueError:
        count, number = 0, 0
    if not 0 <= number < count:
        raise ValueError(
            f"{_COUNT}={variables[_COUNT]} and {_ID}={variables[_ID]}: processes are numbered from "
            f"0 to one less than how many they are"
        )
    if count == 1:
        return None
    return {
        "coordinator_address": variables[_ADDRESS], "num_processes": count, "process_id": number
    }  # fmt: skip


class _Peers:
    """Watches over the other processes from joining them until this one leaves."""

    def __init__(self) -> None:
        self._leaving: int | None = None  # with which exit code
        self._joined = False
        # jax's client aborts where the others do not come or the coordinator is gone, and no
        # setting of jax's prevents it. Python's own handlers would run when abort() has returned.
        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        ctypes.CDLL(None).signal(int(signal.SIGABRT), self._on_abort)

    def join(self, settings: dict[str, Any], peer_seconds: int) -> None:
        """Finds the other processes, and begins to watch."""
        # Else jax itself aborts all processes where one is lost, without a name or a code.
        jax.config.update("jax_enable_recoverability", True)
        try:
            jax.distributed.initialize(
                **settings,
                heartbeat_timeout_seconds=peer_seconds,
                initialization_timeout=_INITIALIZATION_SECONDS,
            )
            # All meet here once more, to tell each other of their devices and hosts.
            self._count, self._number = jax.process_count(), jax.process_index()
            self._hosts = _exchange(socket.gethostname(), 1000 * _INITIALIZATION_SECONDS)
        except RuntimeError as error:
            self._not_found(str(error).splitlines()[0])
        from jax._src.distributed import global_state

        self._coordinator = str(global_state.coordinator_address)
        self._joined = True
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def leave_together(self, code: int) -> None:
        """Waits for all, and leaves the coordinator's process to the last."""
        self._leaving = code
        client = _client()
        try:
            client.wait_at_barrier("leaving", 600_000)
            if self._number:
                client.key_value_set(f"left/{self._number}", "")
            else:
                for other in range(1, self._count):
                    client.blocking_key_value_get(f"left/{other}", 60_000)
                time.sleep(0.2)  # for the answer to the last of them
            jax.distributed.shutdown()
        except jax.errors.JaxRuntimeError:  # the others are gone: nothing is left to wait for
            pass

    def leave_failed(self, error: BaseException) -> None:
        """Tells the others that starting again does not mend this, so that they end alike."""
        self._leaving = 1
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().key_value_set(f"failed/{self._number}", str(error) or type(error).__name__)
            if self._number == 0:  # with it the service ends
                time.sleep(2 * _ASK_SECONDS)
            # Else threads of a save that was given up would wait for the others for 20 minutes, and
            # the process for them. One that still writes is waited for to its end.
            jax.distributed.shutdown()

    def explain(self, error: Exception) -> None:
        """After a failed collective: ends the process where a peer is lost, else returns."""
        if not self._coordinator_answers():
            self._lost([0])
        print(f"a collective failed ({str(error).splitlines()[0][:200]}); asking who is lost",
              file=sys.stderr, flush=True)  # fmt: skip
        self._ask()

    def _watch(self) -> None:
        while self._leaving is None:
            time.sleep(_ASK_SECONDS)
            self._ask()

    def _ask(self) -> None:
        """Ends the process where one of the others failed or does not live."""
        client = _client()
        if client is None:  # this process has left
            return
        try:
            failed = client.key_value_dir_get("failed")
            live = [] if failed else client.get_live_nodes(list(range(self._count)))
            missing = sorted(set(range(self._count)) - set(live) - {self._number})
            if missing:  # one that failed has said so before it left
                failed = client.key_value_dir_get("failed")
        except jax.errors.JaxRuntimeError:
            if self._leaving is None and not self._coordinator_answers():
                self._lost([0])
            return
        if self._leaving is not None:
            return
        if failed:
            self._others_failed(*failed[0])
        if missing:
            self._lost(missing)

    def _coordinator_answers(self) -> bool:
        host, _, port = self._coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError:
            return False
        return True

    def _aborted(self, _signal: int) -> None:
        if self._leaving is not None:
            os._exit(self._leaving)
        if not self._joined:
            self._not_found("see above")
        if not self._coordinator_answers():
            self._lost([0])

    def _not_found(self, reason: str) -> NoReturn:
        print(
            f"\nthe processes of this run did not find each other within {_INITIALIZATION_SECONDS} "
            f"s, or one was lost meanwhile ({reason}): look whether all were started, and whether "
            f"the first one's host and "
            f"port ({os.environ.get(_ADDRESS, 'found by jax')}) can be reached from here; ends "
            f"with exit code {LOST_PEER}, to be started again",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(LOST_PEER)

    def _others_failed(self, key: str, text: str) -> NoReturn:
        number = int(key.rsplit("/", 1)[1])
        print(
            f"\nerror: process {number} on {self._hosts[number]} could not go on: {text}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(1)

    def _lost(self, missing: list[int]) -> NoReturn:
        if self._leaving is not None:
            os._exit(self._leaving)
        named = ", ".join(f"process {n} on {self._hosts[n]}" for n in missing)
        print(
            f"\nlost {named}: it ended or has not been heard of; process {self._number} ends with "
            f"exit code {LOST_PEER}. Start all processes again: the run goes on from its last "
            f"saved step. The lost one's output says why it ended",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(LOST_PEER)
