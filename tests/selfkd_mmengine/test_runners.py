"""mmengine's less usual ways to run: FlexibleRunner and its strategies, two nodes, torch.compile."""

import os
import resource
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from helpers.mmengine import assert_same_state, digits_config, train
from helpers.processes import free_port, run_module
from mmengine._strategy import BaseStrategy, SingleDeviceStrategy
from mmengine.hooks import Hook
from mmengine.registry import STRATEGIES
from mmengine.runner import FlexibleRunner

PSKD = dict(type='selfkd_mmpretrain.PSKDHook', alpha=0.8)
SNAPSHOT = dict(PSKD, teacher='snapshot')
TORCH = tuple(int(number) for number in torch.__version__.split('.')[:2])


def flexible(digits, folder, *hooks, **options):
    cfg = digits_config(digits, folder, *hooks, env_cfg={}, runner_type='FlexibleRunner', **options)
    cfg.auto_scale_lr = None
    return FlexibleRunner.from_cfg(cfg)


@pytest.mark.parametrize('hook', [PSKD, SNAPSHOT])
def test_flexible_runner_trains_and_resumes_as_runner_does(digits, tmp_path, hook):
    expected = train(digits_config(digits, tmp_path / 'runner', hook)).model.state_dict()
    options = {'default_hooks.checkpoint.max_keep_ckpts': 3}
    runner = flexible(digits, tmp_path / 'flexible', hook, **options)
    runner.train()
    assert_same_state(runner.model.state_dict(), expected)
    checkpoint = str(tmp_path / 'flexible/epoch_2.pth')
    resumed = flexible(digits, tmp_path / 'resumed', hook, resume=True, load_from=checkpoint)
    resumed.train()
    assert_same_state(resumed.model.state_dict(), expected)


class FullDisk(Hook):
    """From the last epoch on, no file grows beyond 50 kB."""

    def after_train_epoch(self, runner):
        if runner.epoch + 1 == runner.max_epochs:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_save_that_fails_leaves_the_checkpoint_before_it(digits, tmp_path):
    """mmengine deletes a checkpoint before it writes the next one: our configs keep two."""
    expected = train(digits_config(digits, tmp_path / 'straight', PSKD)).model.state_dict()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match='File too large'):
            train(digits_config(digits, tmp_path / 'full', PSKD), FullDisk())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resumed = digits_config(digits, tmp_path / 'full', PSKD, resume=True)
    assert_same_state(train(resumed).model.state_dict(), expected)


# Stands in for mmengine's DeepSpeedStrategy, whose library is not installed, and comes of the same base.
own = {name: value for name, value in vars(SingleDeviceStrategy).items() if name not in ('__dict__', '__weakref__')}
STRATEGIES.register_module(name='Foreign', force=True, module=type('DeepSpeedStrategy', (BaseStrategy,), own))


@pytest.mark.parametrize('name', ['PSKDHook', 'CSKDHook'])
def test_strategies_that_were_not_tried_are_refused(digits, tmp_path, name):
    hook = dict(type=f'selfkd_mmpretrain.{name}')
    runner = flexible(digits, tmp_path, hook, strategy=dict(type='Foreign'))
    with pytest.raises(ValueError, match=f'{name}: the strategy DeepSpeedStrategy is not supported .* DDPStrategy'):
        runner.train()


def test_fsdp_keeps_a_bank_and_refuses_a_snapshot(digits, tmp_path):
    can_train = TORCH >= (2, 6)  # the FSDP of earlier versions does not train without a GPU
    what = 'bank' if can_train else 'refusal'
    run_module('helpers.fsdp_worker', digits, tmp_path, what, folder=tmp_path, processes=2)
    for rank in range(2):
        refusal = (tmp_path / f'refusal{rank}.txt').read_text()
        assert 'a past copy cannot be made of a model whose weights are sharded (FSDP): train with DDP' in refusal
    if can_train:
        ranks = [torch.load(tmp_path / f'{rank}.pth') for rank in range(2)]
        assert_same_state(ranks[0]['bank'], ranks[1]['bank'])
        assert ranks[0]['bank']['seen'].all()
        for rank in ranks:
            assert len(rank['logs']['loss']) == 9  # 3 epochs of 40 images on 2 ranks, in batches of 8
            assert [soft > 0 for soft in rank['logs']['pskd_soft']] == [False] * 3 + [True] * 6
            assert min(rank['logs']['loss_cskd']) > 0


def test_two_nodes(digits, tmp_path):
    """Two agents of torchrun with a process each, which meet on this machine."""
    cfg = digits_config(digits, tmp_path / 'run', PSKD, **{'train_dataloader.batch_size': 4})
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.dump(tmp_path / 'config.py')
    meet = ['--nnodes', 2, '--nproc_per_node', 1, '--master_addr', '127.0.0.1', '--master_port', free_port()]
    arguments = [
        ROOT / 'tools/train.py',
        tmp_path / 'config.py',
        '--work-dir',
        tmp_path / 'run',
        '--launcher',
        'pytorch',
    ]
    path = os.pathsep.join(map(str, [ROOT / 'plugins', ROOT / 'tests', os.environ.get('PYTHONPATH', '')]))
    commands = [[sys.executable, '-m', 'torch.distributed.run', *meet, '--node_rank', i, *arguments] for i in range(2)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    nodes = [
        subprocess.Popen(map(str, command), env={**os.environ, 'PYTHONPATH': path}, **pipes) for command in commands
    ]
    outputs = [node.communicate()[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], '\n'.join(output[-3000:] for output in outputs)
    saved = torch.load(tmp_path / 'run/epoch_3.pth')
    assert saved['meta']['iter'] == 15  # 5 steps an epoch with 4 images on each node
    bank = saved['selfkd']['PSKDHook']['bank']
    assert bank['seen'].all()  # each node has seen half of the images in each epoch
    assert ((bank['values'].sum(1) - 1).abs() < 1e-5).all()


@pytest.mark.skipif(TORCH < (2, 6), reason='the toolkit itself does not compile with this torch')
def test_compiled_training_is_tapped(digits, tmp_path):
    losses = []
    for options in ({}, {'compile': dict(backend='eager')}):
        torch._dynamo.reset()  # what was compiled for another run of this process knows nothing of this run's hooks
        cfg = digits_config(digits, tmp_path / str(len(options)), PSKD, **options, **{'train_cfg.max_epochs': 2})
        log = train(cfg).message_hub.log_scalars
        losses.append(log['train/loss'].data[0].tolist())
        assert [soft > 0 for soft in log['train/pskd_soft'].data[0]] == [False] * 5 + [True] * 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # compiled or not, a sum may be rounded in another order
