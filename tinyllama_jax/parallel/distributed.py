"""Several processes as one run, by `jax.distributed`: start, agreement, and the loss of a peer.

Every process runs the same program; process 0, the main one, writes what is written once. jax's
coordination service lives in process 0 and hears the heartbeat of all. A collective that misses a
peer waits for ever (NCCL) or fails with a socket's error (gloo), and neither says who is gone; so a
thread asks the service who lives, and ends the process with a name and an exit code that tells a
launcher to start all again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

LOST_PEER = 76  # the exit code: start all processes again

_ASK_SECONDS = 2.0
_INITIALIZATION_SECONDS = 300
# What launchers set, jax's own clusters aside.
_ADDRESS, _COUNT, _ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Set by Slurm and Open MPI for each process of a job step of so many.
_CLUSTER_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


@contextlib.contextmanager
def in_use(peer_seconds: int) -> Iterator[None]:
    """Joins the processes that the environment tells of; does nothing where it tells of none.

    It comes before anything else touches a device. Output of all but the main process goes nowhere;
    errors are printed by all.

    Args:
      peer_seconds: a process that has not been heard of for so long is lost, and the others end
        with exit code `LOST_PEER`.

    Raises:
      ValueError: an environment that says half of what it must, or the others do not come.
    """
    settings = _settings(os.environ)
    if settings is None:
        yield
        return
    # Else jax itself aborts all processes where one is lost, without a name or a code.
    jax.config.update("jax_enable_recoverability", True)
    try:
        jax.distributed.initialize(
            **settings,
            heartbeat_timeout_seconds=peer_seconds,
            initialization_timeout=_INITIALIZATION_SECONDS,
        )
    except RuntimeError as error:
        raise ValueError(
            f"the processes of this run did not find each other within {_INITIALIZATION_SECONDS} s "
            f"({str(error).splitlines()[0]}); look whether all were started and whether "
            f"{settings.get('coordinator_address', 'the first host')} can be reached from here"
        ) from error
    peers = _Peers()
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
    except (ValueError, OSError):
        # Known to all (`together`), or to this one alone, whose end the others then notice.
        peers.leaving = 1
        raise
    except jax.errors.JaxRuntimeError as error:
        peers.explain(error)
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
    other processes raise `error`.
    """
    own: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as caught:
        own = caught
    failed = _gathered(own is not None)
    if own is not None:
        raise own
    if failed:
        raise error(
            f"process {failed[0]} of {jax.process_count()} could not go on; its own output says why"
        )


def from_main(numbers: Sequence[int]) -> list[int]:
    """The main process's integers (not negative, at most 256 of them), in every process."""
    if jax.process_count() == 1:
        return list(numbers)
    from jax.experimental import multihost_utils

    padded = np.full(256, -1, np.int32)
    if is_main():
        padded[: len(numbers)] = numbers
    return [int(n) for n in multihost_utils.broadcast_one_to_all(padded) if n >= 0]


def _gathered(failed: bool) -> list[int]:
    """The processes that failed."""
    if jax.process_count() == 1:
        return []
    from jax.experimental import multihost_utils

    return np.flatnonzero(multihost_utils.process_allgather(np.int32(failed))).tolist()


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
    """Watches over the other processes until this one leaves."""

    def __init__(self) -> None:
        # What jax.experimental.multihost_utils.live_devices asks too.
        from jax._src.distributed import global_state

        self._client: Any = global_state.client
        self._coordinator = str(global_state.coordinator_address)
        self._count = jax.process_count()
        self.leaving: int | None = None  # with which exit code
        self._name_hosts()
        threading.Thread(target=self._watch, name="peers", daemon=True).start()
        # jax's client aborts where the coordinator is gone, and no setting of jax's prevents it.
        # Python's own handlers would run too late, when abort() has returned.
        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        ctypes.CDLL(None).signal(int(signal.SIGABRT), self._on_abort)

    def leave_together(self, code: int) -> None:
        """Waits for all, and leaves the coordinator's process to the last."""
        self.leaving = code
        number = jax.process_index()
        try:
            self._client.wait_at_barrier("leaving", 600_000)
            if number:
                self._client.key_value_set(f"left/{number}", "")
            else:
                for other in range(1, self._count):
                    self._client.blocking_key_value_get(f"left/{other}", 60_000)
                time.sleep(0.2)  # for the answer to the last of them
            jax.distributed.shutdown()
        except jax.errors.JaxRuntimeError:  # the others are gone: nothing is left to wait for
            pass

    def explain(self, error: Exception) -> None:
        """After a failed collective: ends the process where a peer is lost, else returns."""
        if not self._coordinator_answers():
            self._lost([0])
        print(f"a collective failed ({str(error).splitlines()[0][:200]}); asking who is lost",
              file=sys.stderr, flush=True)  # fmt: skip
        self._ask()

    def _name_hosts(self) -> None:
        number = jax.process_index()
        self._client.key_value_set(f"host/{number}", socket.gethostname())
        self._hosts = [
            self._client.blocking_key_value_get(f"host/{n}", 60_000) for n in range(self._count)
        ]

    def _watch(self) -> None:
        while self.leaving is None:
            time.sleep(_ASK_SECONDS)
            self._ask()

    def _ask(self) -> None:
        """Ends the process where one of the others does not live."""
        try:
            live = self._client.get_live_nodes(list(range(self._count)))
        except jax.errors.JaxRuntimeError:
            if self._coordinator_answers():
                return
            live = range(1, self._count)
        missing = sorted(set(range(self._count)) - set(live))
        if missing and self.leaving is None:
            self._lost(missing)

    def _coordinator_answers(self) -> bool:
        host, _, port = self._coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError:
            return False
        return True

    def _aborted(self, _signal: int) -> None:
        if self.leaving is not None:
            os._exit(self.leaving)
        if not self._coordinator_answers():
            self._lost([0])

    def _lost(self, missing: list[int]) -> NoReturn:
        named = ", ".join(f"process {n} on {self._hosts[n]}" for n in missing)
        print(
            f"\nlost {named}: it ended or has not been heard of; process {jax.process_index()} "
            f"ends with exit code {LOST_PEER}. Start all processes again: the run goes on from its "
            f"last saved step. The lost one's output says why it ended",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(LOST_PEER)
