"""Several processes that share one calibration or search: samples are divided, results gathered, errors known to all.

The batch is the unit. Process r measures the batches b with b % world == r; what a batch gave is added up in the order of the
batches, in float64, so the sums do not depend on how many processes there are.

What is exchanged lies in the CPU's memory (float64 sums, counts, reference distributions), so it goes through gloo wherever
the model is; gloo also notices at once when a process is gone. Nothing is pickled.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from modes_cli import failures
from modes_cli.errors import BadOption, ElsewhereFailed, ProcessLost, is_memory
from modes_cli.ranks import Place, place

T = TypeVar("T")
Tensors = dict[str, Tensor]

START = timedelta(minutes=5)  # for all processes to be there
WAIT = timedelta(minutes=30)  # for the others to finish a batch, or to load a model; a process that is gone is noticed at once


class Ranks:
    """The processes of one run. Every method that exchanges must be called by all of them, in the same order."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.rank, self.world, self.first = place.rank, place.world, place.first
        self._broken = False  # an exchange was left half way: the others can no longer be told anything

    def require_one_device_each(self, device_map: str | None) -> None:
        """Raises BadOption where each of several processes would spread its model over the same devices."""
        if self.world > 1 and device_map is not None:
            raise BadOption(
                f"`--device-map {device_map}` spreads a model over all GPUs, and `{self.world}` processes take one each",
                hint="use one or the other",
            )

    def owns(self, batch: int) -> bool:
        """Whether this process measures the batch of that number."""
        return batch % self.world == self.rank

    def rounds(self, items: Iterable[T], done: int = 0) -> Iterator[list[tuple[int, T]]]:
        """Numbered items: the first `done` one by one, then as many at a time as there are processes, each owning one."""
        numbered = enumerate(items)
        yield from ([item] for item in islice(numbered, done))
        while taken := list(islice(numbered, self.world)):
            yield taken

    def gather(self, own: Tensors | None) -> list[Tensors]:
        """What the processes measured in one round, by rising `number`: on the first process; elsewhere [].

        Args:
            own: with the batch's `number` among its tensors; None where this process had nothing to do.
        """
        if self.world == 1:
            return [] if own is None else [own]
        data = b"" if own is None else save({name: tensor.contiguous() for name, tensor in own.items()})
        sizes = self._announce(len(data))
        pieces: list[bytes] = []
        with self._reaching():
            for rank, size in enumerate(sizes):
                if rank == 0 and self.first:
                    pieces.append(data)
                elif self.first:
                    buffer = torch.empty(size, dtype=torch.uint8)
                    if size:
                        dist.recv(buffer, src=rank)
                    pieces.append(buffer.numpy().tobytes())
                elif rank == self.rank and size:
                    dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), dst=0)
        # By number, not by rank: a calibration that is continued may begin anywhere.
        return sorted((load(piece) for piece in pieces if piece), key=lambda tensors: int(tensors["number"]))

    def share(self, own: Tensors) -> list[Tensors]:
        """What each process has, by rank, on all of them. For small tensors."""
        if self.world == 1:
            return [own]
        return [load(piece) for piece in self._share(save({name: tensor.contiguous() for name, tensor in own.items()}))]

    def agree(self, what: str, value: object) -> None:
        """Raises BadOption on all processes where they do not have the same value, which must be JSON."""
        if self.world == 1:
            return
        found = self._share(json.dumps(value, sort_keys=True).encode())
        for rank, other in enumerate(found):
            if other != found[0]:
                raise BadOption(
                    f"process `{rank}` of {self.world} has another {what} than process 0",
                    hint="all processes need the same files, library versions and options: a shared folder, one environment",
                )

    def tell(self, text: str) -> str:
        """The first process's text, on all; what the others give is not read."""
        return text if self.world == 1 else self._share(text.encode() if self.first else b"")[0].decode()

    def _share(self, data: bytes) -> list[bytes]:
        sizes = self._announce(len(data))
        room = max(sizes)
        padded = torch.frombuffer(bytearray(data.ljust(max(room, 1), b"\0")), dtype=torch.uint8)
        found = [torch.empty_like(padded) for _ in sizes]
        with self._reaching():
            dist.all_gather(found, padded)
        return [piece[:size].numpy().tobytes() for piece, size in zip(found, sizes, strict=True)]

    def _announce(self, size: int, failure: failures.Failure | None = None) -> list[int]:
        """Begins every exchange: how many bytes each process has; or that one has failed, and with what."""
        said = b"" if failure is None else json.dumps([failure.exit_code, failure.kind, failure.message, failure.hint]).encode()
        own = torch.tensor([size, len(said)])
        found = [torch.empty_like(own) for _ in range(self.world)]
        with self._reaching():
            dist.all_gather(found, own)
            failed = next((rank for rank, numbers in enumerate(found) if numbers[1]), None)
            if failed is None:
                return [int(numbers[0]) for numbers in found]
            text = torch.empty(int(found[failed][1]), dtype=torch.uint8)
            if failed == self.rank:
                text = torch.frombuffer(bytearray(said), dtype=torch.uint8)
            dist.broadcast(text, src=failed)
        raise ElsewhereFailed(failed, self.world, *json.loads(text.numpy().tobytes()))

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._broken = True
            if isinstance(error, RuntimeError) and not is_memory(error):  # gloo: a connection was closed, or time is up
                raise ProcessLost(self.rank, self.world) from error
            raise

    def end(self, error: Exception | None) -> None:
        """The last exchange: how this process ends.

        Raises:
            ElsewhereFailed: another process has failed, or this one, which the first process will report.
            ProcessLost: one is gone.
        """
        if self.world == 1 or self._broken or isinstance(error, ElsewhereFailed):
            return
        failure = None if error is None else failures.describe(error)
        try:
            self._announce(0, failure)
        except ElsewhereFailed:
            if failure is None or not self.first:
                raise
        except ProcessLost as lost:
            if failure is None:
                raise
            if not self.first:
                raise ProcessLost(self.rank, self.world, failure.message) from lost


ALONE = Ranks(Place())


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that were started together; a single one where there is no launcher.

    An exception inside ends all of them: each raises it, or ElsewhereFailed in its place.

    Raises:
        BadOption: the environment is incomplete.
        ProcessLost: a process did not come, or is gone.
    """
    ranks = Ranks(place())
    if ranks.world == 1:
        yield ranks
        return
    _start(ranks.place)
    try:
        try:
            yield ranks
        except Exception as error:
            ranks.end(error)
            raise
        ranks.end(None)
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _start(place: Place) -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise BadOption(f"WORLD_SIZE is `{place.world}`, but {missing[0]} is not set", hint="start it with `torchrun`")
    try:
        store, rank, world = next(rendezvous("env://", timeout=START))
        store.set_timeout(START)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=WAIT)
    except (RuntimeError, ValueError) as error:  # torch's own errors are RuntimeErrors
        raise ProcessLost(place.rank, place.world) from error
