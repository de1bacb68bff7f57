"""A training step on a GPU, recorded once and then replayed."""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # steps that run as they are: they make the optimiser's state


class ReplayedStep:
    """`step(index, *numbers)` as a CUDA graph.

    A small model's thousand operations take less time than Python does to launch them. The step may
    draw from `generator` and PyTorch's default one; what else Python does in it is not repeated.
    """

    def __init__(self, step: Callable, generator: torch.Generator) -> None:
        self.step, self.calls = step, 0
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        torch.backends.cudnn.benchmark = True  # all batches have one shape
        self.graph.register_generator_state(generator)

    def __call__(self, index: Tensor, *numbers: float) -> tuple[Tensor, ...]:
        """Take a step; the index must have the same shape each time."""
        if self.calls == 0:
            scalars = [torch.zeros((), device=index.device) for _ in numbers]
            self.inputs = [torch.empty_like(index), *scalars]
        self.inputs[0].copy_(index)
        for tensor, number in zip(self.inputs[1:], numbers, strict=True):
            tensor.fill_(number)
        self.calls += 1
        if self.calls <= WARM_UP:  # on the stream that records
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.outputs = self.step(*self.inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            if self.calls == WARM_UP + 1:
                options = dict(stream=self.stream, capture_error_mode="thread_local")
                with torch.cuda.graph(self.graph, **options):
                    self.outputs = self.step(*self.inputs)
            self.graph.replay()
        return tuple(output.clone() for output in self.outputs)
