"""Run a function of many small steps on a GPU without Python between them.

Rounding a weight column by column is a chain of tiny kernels: a Llama-2-7B has 1.1 million columns of ten kernels each, and starting a
kernel from Python takes longer than running it. A CUDA graph records the kernels of one call and starts them all at once the next time.
"""

from collections.abc import Callable, Hashable

import torch


def replayed(function: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return a function that does the same, on CUDA from a recording: its first call with tensors of a shape records the kernels.

    It takes tensors, then hashable settings, and returns a tuple of tensors. Between the two nothing may depend on a value in a tensor
    (no `.item()`, no `if`). It may write into its inputs: on CUDA these are copies.
    """
    recordings: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[torch.Tensor], tuple[torch.Tensor, ...]]] = {}
    pools: dict[torch.device, tuple[int, int]] = {}

    def run(*arguments) -> tuple[torch.Tensor, ...]:
        tensors = [each for each in arguments if isinstance(each, torch.Tensor)]
        if not tensors[0].is_cuda:
            return function(*arguments)
        with torch.inference_mode(False), torch.no_grad():  # whoever calls: a recording outlives the mode it was made in
            return replay(tensors, arguments[len(tensors) :])

    def replay(tensors: list[torch.Tensor], settings: tuple[Hashable, ...]) -> tuple[torch.Tensor, ...]:
        device = tensors[0].device
        key = (device, settings, tuple((each.shape, each.dtype) for each in tensors))
        if key not in recordings:
            own = [each.contiguous().clone() for each in tensors]
            beside = torch.cuda.Stream(device)
            beside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(beside):  # what a kernel sets up at its first start does not belong into a recording
                function(*own, *settings)
            torch.cuda.current_stream(device).wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            pools.setdefault(
                device, torch.cuda.graph_pool_handle()
            )  # one recording runs at a time, and what it returned is copied
            with torch.cuda.graph(graph, pool=pools[device]):
                output = function(*own, *settings)
            recordings[key] = graph, own, output
        graph, own, output = recordings[key]
        for mine, given in zip(own, tensors, strict=True):
            mine.copy_(given)
        graph.replay()
        return tuple(each.clone() for each in output)

    return run
