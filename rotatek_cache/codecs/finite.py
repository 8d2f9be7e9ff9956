"""Whether states are finite, found out without waiting for the device."""

from typing import Any

import torch
from torch import Tensor


class FiniteCheck:
    """The answer to whether states are finite, on its way from the device: a GPU is not waited for.

    Args:
        states: of any shape; bool are answers, all of which have to be True.
        message: of the error if they are not.
    """

    def __init__(self, states: Tensor, message: str) -> None:
        self.message = message
        self.finite = states if states.dtype == torch.bool else torch.isfinite(states).all()
        self.arrived: torch.cuda.Event | None = None
        if self.finite.is_cuda:
            self.finite = torch.empty(self.finite.shape, dtype=torch.bool, device="cpu", pin_memory=True).copy_(
                self.finite, non_blocking=True
            )
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def __deepcopy__(self, memo: dict) -> "FiniteCheck":
        return self

    def __getstate__(self) -> dict[str, Any]:
        self.wait()
        return self.__dict__ | {"arrived": None}

    def wait(self) -> None:
        """Wait until the answer has arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()

    def passed(self) -> bool:
        """Look whether the answer has arrived; a ValueError if the states are not finite."""
        if self.arrived is not None and (torch.cuda.is_current_stream_capturing() or not self.arrived.query()):
            return False
        if self.finite.is_meta:
            return True  # shapes without numbers, of which bytes are estimated
        if not bool(self.finite.all()):
            raise ValueError(self.message)
        return True
