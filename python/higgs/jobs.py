"""Independent jobs that survive a kill and spread over the ranks of ``torchrun``.

Results go line by line into one JSON-lines file a rank; a restart skips what any of them holds, so it loses at most the
job each rank was at. Ranks take jobs one by one from a counter in the rendezvous store, so a slow one does fewer. No
tensor is communicated: the files, in a directory that all ranks see, carry everything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .errors import HiggsError
from .progress import Progress


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the ranks that ``torchrun`` started; does nothing in a process of its own."""
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def first_rank_first(work: Callable[[], None]) -> None:
    """Runs ``work`` on rank 0 while the others wait; they raise HiggsError if it failed there."""
    error = [None]
    failure: Exception | None = None
    if rank() == 0:
        try:
            work()
        except Exception as e:
            failure, error = e, [str(e)]  # type: ignore[list-item]
    if dist.is_initialized():
        dist.broadcast_object_list(error, 0)
    if failure is not None:
        raise failure
    if error[0] is not None:
        raise HiggsError(f"rank 0 failed: {error[0]}")


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


def run_jobs(jobs: Sequence[str], work: Callable[[str], Any], folder: Path, progress: Progress) -> dict[str, Any]:
    """``{job: work(job)}`` for all ``jobs``, those recorded in ``folder`` taken from there. Results must be JSON."""
    done = finished_jobs(folder)
    todo = [job for job in jobs if job not in done]
    wait_for_all()  # nobody writes before everybody has read: all ranks see the same list
    progress.start("measuring", len(todo))
    file = folder / f"rank{rank()}.jsonl"
    torn = file.exists() and not file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as f:
        if torn:
            f.write("\n")
        seen = 0
        for i in _turns(len(todo)):
            f.write(json.dumps({"job": todo[i], "result": work(todo[i])}) + "\n")
            f.flush()
            progress.advance(i + 1 - seen)  # others did those in between
            seen = i + 1
    progress.finish()
    wait_for_all()
    done = finished_jobs(folder)
    return {job: done[job] for job in jobs}


def _turns(count: int) -> Iterator[int]:
    """The numbers below ``count`` that fall to this rank."""
    if not dist.is_initialized():
        yield from range(count)
        return
    store = dist.distributed_c10d._get_default_store()
    counter = f"higgs_jobs_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    while (i := store.add(counter, 1) - 1) < count:
        yield i
