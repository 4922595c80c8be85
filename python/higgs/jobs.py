"""Independent jobs that survive a kill and spread over the ranks of ``torchrun``.

Results go line by line into one JSON-lines file a rank; a restart skips what any of them holds, so it loses at most the
job each rank was at. Ranks take jobs one by one from a counter in the rendezvous store, so a slow one does fewer. No
tensor is communicated: the files, in a directory that all ranks see, carry everything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .errors import HiggsError
from .progress import Progress

_PATIENCE = timedelta(days=7)  # the first rank may sample tokens for long


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


class Team:
    """The ranks that ``torchrun`` started, or this process alone. All ranks call the methods in the same order."""

    def __init__(self) -> None:
        self._store: Any = None
        self._size, self._calls = int(os.environ.get("WORLD_SIZE", "1")), 0
        if self._size > 1:  # the store alone: a process group would start threads for tensors that nobody sends
            self._store, _, self._size = next(iter(dist.rendezvous("env://")))

    def _key(self) -> str:
        self._calls += 1
        return f"higgs/{self._calls}"

    def wait_for_all(self) -> None:
        if self._store is None:
            return
        key = self._key()
        if self._store.add(f"{key}/arrived", 1) == self._size:
            self._store.set(f"{key}/all", "yes")
        self._store.wait([f"{key}/all"], _PATIENCE)

    def first_rank_first(self, work: Callable[[], None]) -> None:
        """Runs ``work`` on rank 0 while the others wait; they raise HiggsError if it failed there."""
        key = self._key()
        try:
            if rank() == 0:
                work()
        except BaseException as e:
            if self._store is not None:
                self._store.set(key, f"rank 0 failed: {e!r}")
            raise
        if self._store is None:
            return
        if rank() == 0:
            self._store.set(key, "")
        self._store.wait([key], _PATIENCE)
        failure = self._store.get(key).decode()
        if failure:
            raise HiggsError(failure)

    def turns(self, count: int) -> Iterator[int]:
        """The numbers below ``count`` that fall to this rank, rising."""
        if self._store is None:
            yield from range(count)
            return
        key = self._key()
        while (i := self._store.add(key, 1) - 1) < count:
            yield i


def finished_jobs(folder: Path) -> dict[str, Any]:
    """{job: result} of all files in ``folder``; a last line that a kill cut short does not count."""
    results = {}
    for file in sorted(folder.glob("rank*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            results[record["job"]] = record["result"]
    return results


def run_jobs(
    team: Team, jobs: Sequence[str], work: Callable[[str], Any], folder: Path, progress: Progress
) -> dict[str, Any]:
    """``{job: work(job)}`` for all ``jobs``, those recorded in ``folder`` taken from there. Results must be JSON."""
    done = finished_jobs(folder)
    todo = [job for job in jobs if job not in done]
    team.wait_for_all()  # nobody writes before everybody has read: all ranks see the same list
    progress.start("measuring", len(todo))
    file = folder / f"rank{rank()}.jsonl"
    torn = file.exists() and not file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as f:
        if torn:
            f.write("\n")
        seen = 0
        for i in team.turns(len(todo)):
            f.write(json.dumps({"job": todo[i], "result": work(todo[i])}) + "\n")
            f.flush()
            progress.advance(i + 1 - seen)  # others did those in between
            seen = i + 1
    progress.finish()
    team.wait_for_all()
    done = finished_jobs(folder)
    team.wait_for_all()  # nobody removes the folder before everybody has read
    return {job: done[job] for job in jobs}
