"""Batches of a data set that lies in the memory of a device, or of the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from gpukern.data.augment import Augment
from gpukern.data.order import permutation, share
from gpukern.runtime.arguments import as_int, check_tensors
from gpukern.runtime.integers import cdiv, require

#: What a loader's state has.
_STATE = ("seed", "epoch", "samples")


class Loader:
    """Shuffled batches of uint8 images, gathered, cropped and normalized by one kernel.

    Iterating yields (images, labels) of each batch, or images alone without labels. There are no workers: nothing is
    read, decoded or copied.

    Parameters
    ----------
    images:
        uint8 [N, H, W, C]; ``labels``: any tensor [N, ...], on the same device.
    batch_size:
        of each process.
    transform:
        an :class:`Augment`, which then gets the epoch as its step: a sample's crop depends on the seed, the epoch and
        its place in ``images``, not on the batch or the process; or any function of a batch of bytes [N, H, W, C].
    shuffle:
        in an order that follows from ``seed`` and the epoch, the same on every device.
    drop_last:
        leave out the samples that fill no batch of all processes.
    rank, world_size:
        which process this is of how many; those of ``torch.distributed`` where it is initialized. A batch of all
        processes has the same samples however many share it.
    even:
        give all processes the same number of samples, as backward passes in step need: the first ones once more where
        they do not divide. False for an evaluation that counts each sample once.
    device:
        where batches go if the images are elsewhere, through pinned memory: a data set in the memory of the host, or
        mapped from a file.

    Each iteration is an epoch, ``epoch`` its number until it ends, and then that of the next; one that was left early
    is not taken up again. ``state_dict`` tells epoch and samples so far, with those of the batch at hand, and after
    ``load_state_dict`` the next iteration goes on there, with as many processes as there are then.

    Raises ValueError and TypeError for options, RuntimeError for tensors that do not fit.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor | None,
        batch_size: int,
        *,
        transform: Callable[[torch.Tensor], Any] | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        even: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        check_tensors("Loader", images, optional=(labels,))
        require(images.dim() > 0, "Loader: expected images [N, H, W, C], but got a number")
        if labels is not None:
            require(
                labels.dim() > 0 and len(labels) == len(images) and labels.device == images.device,
                f"Loader: expected a label for each of {len(images)} images, on {images.device}, "
                f"but got {list(labels.shape)} on {labels.device}",
            )
        self.images, self.labels, self.transform = images, labels, transform
        self.batch_size, self.seed = as_int("batch_size", batch_size), as_int("seed", seed)
        self.shuffle, self.drop_last, self.even = shuffle, drop_last, even
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank, self.world_size = 0, 1
        if distributed:
            self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if rank is not None:
            self.rank = as_int("rank", rank)
        if world_size is not None:
            self.world_size = as_int("world_size", world_size)
        self.device = images.device if device is None else torch.device(device)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1, got {self.rank} of {self.world_size}")
        self.epoch = 0
        self._samples = 0  # of all processes, in this epoch
        self._begun = False

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        whole, rest = divmod(len(self.images), self._whole)
        if not rest or self.drop_last:
            return whole
        none_left = not self.even and self.rank * cdiv(rest, self.world_size) >= rest
        return whole if none_left else whole + 1

    def __iter__(self) -> Iterator[Any]:
        if self._begun:
            self.set_epoch(self.epoch + 1)
        self._begun = True
        return self._batches(self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Begin ``epoch`` with the next iteration. One that was loaded goes on where it was."""
        if epoch != self.epoch or self._begun:
            self.epoch, self._samples, self._begun = as_int("epoch", epoch), 0, False

    def state_dict(self) -> dict[str, int]:
        """Seed, epoch, and how many samples of it all processes have had. The same in every process."""
        return {"seed": self.seed, "epoch": self.epoch, "samples": self._samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up ``state``. ValueError if it is no such state, or had more samples than there are."""
        if not isinstance(state, Mapping) or not all(type(state.get(name)) is int for name in _STATE):
            raise ValueError(f"expected a state with whole numbers as {', '.join(_STATE)}, got {state}")
        if not 0 <= state["samples"] <= len(self.images):
            raise ValueError(f"a state after {state['samples']} samples, but there are {len(self.images)}")
        self.seed, self.epoch, self._samples = state["seed"], state["epoch"], state["samples"]
        self._begun = False

    @property
    def _whole(self) -> int:
        """Samples of a batch of all processes."""
        return self.batch_size * self.world_size

    def _batches(self, epoch: int) -> Iterator[Any]:
        count, order = len(self.images), self._order(epoch)
        stop = count - self._whole + 1 if self.drop_last else count
        for start in range(self._samples, stop, self._whole):
            index = share(order, start, self._whole, self.rank, self.world_size, self.even)
            batch = self._batch(index, epoch) if len(index) else None
            if self.epoch == epoch:  # a later iteration has not begun yet
                self._samples = min(start + self._whole, count)
            if batch is not None:
                yield batch
        if self.epoch == epoch:
            self.set_epoch(epoch + 1)

    def _order(self, epoch: int) -> torch.Tensor:
        if self.shuffle:
            return permutation(len(self.images), self.seed, epoch, self.images.device)
        return torch.arange(len(self.images), device=self.images.device)

    def _batch(self, index: torch.Tensor, epoch: int) -> Any:
        images = self._transformed(index, epoch)
        if self.labels is None:
            return images
        return images, self._moved(self.labels.index_select(0, index))

    def _transformed(self, index: torch.Tensor, epoch: int) -> Any:
        if isinstance(self.transform, Augment) and self.device == self.images.device:
            return self.transform(self.images, index, step=epoch)
        batch = self._moved(self.images.index_select(0, index))
        if isinstance(self.transform, Augment):
            return self.transform(batch, places=index.to(self.device), step=epoch)
        return batch if self.transform is None else self.transform(batch)

    def _moved(self, batch: torch.Tensor) -> torch.Tensor:
        if batch.device == self.device:
            return batch
        if self.device.type == "cuda":
            return batch.pin_memory().to(self.device, non_blocking=True)
        return batch.to(self.device)
