"""Training steps of real mmengine runners, for benchmarks."""

import tempfile
from typing import Any, Callable, Dict, List, Optional

import torch
from costs import Cost, compare
from mmengine.config import Config
from mmengine.runner import Runner

__all__ = ['compare_configs', 'training_config']


def training_config(
    toolkit: str, model: dict, dataset: dict, batch: int, *, lr: float, hook: Optional[dict] = None, amp: bool = False
) -> Config:
    """SGD on a data set of random images; in mixed precision in the type that the device computes fast in."""
    optim_wrapper: Dict[str, Any] = dict(optimizer=dict(type='SGD', lr=lr, momentum=0.9))
    if amp:
        optim_wrapper.update(type='AmpOptimWrapper', dtype='float16' if torch.cuda.is_available() else 'bfloat16')
    return Config(
        dict(
            default_scope=toolkit,
            model=model,
            train_dataloader=dict(
                batch_size=batch,
                dataset=dict(dataset, serialize_data=False),
                sampler=dict(type='DefaultSampler', shuffle=True),
            ),
            optim_wrapper=optim_wrapper,
            train_cfg=dict(by_epoch=True, max_epochs=10**4),
            custom_hooks=[hook] if hook else [],
            # The same weights for all: RoIAlign's cost depends on the size of the regions that the RPN proposes.
            randomness=dict(seed=0),
            log_level='ERROR',
        )
    )


def compare_configs(configs: Dict[str, Config], repeats: int) -> List[Cost]:
    """:func:`costs.compare` of a training step with each config."""
    with tempfile.TemporaryDirectory() as folder:
        steps = {}
        for i, (name, cfg) in enumerate(configs.items()):
            work_dir = f'{folder}/{i}'
            cfg.merge_from_dict(dict(work_dir=work_dir, experiment_name=f'benchmark-{work_dir}'))
            steps[name] = _step_of(Runner.from_cfg(cfg))
        return compare(steps, repeats=repeats)


def _step_of(runner: Runner) -> Callable[[], None]:
    """A training step, hooks included, of a run in its second epoch, where past predictions exist.

    The batches are loaded once and used again, so loading is not in it.
    """
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.optim_wrapper.initialize_count_status(runner.model, 0, 10**6)
    for point in ('before_run', 'before_train', 'before_train_epoch'):
        runner.call_hook(point)
    runner.model.init_weights()  # some parameters are what was in the memory before
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
