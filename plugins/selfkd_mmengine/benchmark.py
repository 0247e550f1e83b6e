"""One training step at a time of a real mmengine runner, for benchmarks."""

from typing import Callable

from mmengine.runner import Runner

__all__ = ['step_of']


def step_of(runner: Runner) -> Callable[[], None]:
    """A training step, hooks included, of a run in its second epoch, where past predictions exist.

    The batches are loaded once and used again, so loading is not in it.
    """
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.optim_wrapper.initialize_count_status(runner.model, 0, 10**6)
    for point in ('before_run', 'before_train', 'before_train_epoch'):
        runner.call_hook(point)
    runner.model.train()
    batches = list(runner.train_dataloader)
    loop, position = runner.train_loop, 0

    def step():
        nonlocal position
        index = position % len(batches)
        loop._epoch = position // len(batches)
        loop.run_iter(index, dict(batches[index]))  # CS-KD takes the partners out of the dict
        position += 1

    for _ in batches:
        step()
    return step
