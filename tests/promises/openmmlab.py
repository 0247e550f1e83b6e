"""MMPretrain, MMDetection and MMSegmentation as the promises drive them: small real runs of mmengine's Runner."""

import copy
import functools
import importlib
import os
import signal
import zlib
from pathlib import Path

import torch
from helpers.processes import in_processes
from mmengine.config import ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.runner import Runner

from selfkd.publish import publish_checkpoint
from selfkd_mmengine.launch import prepare_cpu_launch

BATCH = {'mmpretrain': 8, 'mmdet': 2, 'mmseg': 2}


class Steps(Hook):
    """Keeps what each step logged; may kill the process after so many, or use every second batch of the data only."""

    priority = 'LOWEST'

    def __init__(self, kill_at=None):
        self.steps, self.kill_at = [], kill_at

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.steps.append({k: float(v) for k, v in outputs.items() if torch.as_tensor(v).numel() == 1})
        if runner.iter + 1 == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


class Bypass(Hook):
    """A model that computes its loss by other means than its loss module."""

    def before_train(self, runner):
        parameter = next(runner.model.parameters())
        runner.model.loss = lambda *args, **kwargs: {'loss_own': parameter.square().sum()}


class Frozen(Hook):
    """The same weights with and without a method, and no step changes them, nor the statistics of batch norms."""

    priority = 'VERY_HIGH'  # before a method takes a copy

    @torch.no_grad()
    def before_train(self, runner):
        for name, parameter in runner.model.named_parameters():
            if parameter.dim() > 1:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(float(name.endswith('weight')))
        for group in runner.optim_wrapper.param_groups:
            group['lr'] = group['initial_lr'] = 0.0
        for module in runner.model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = 0.0


class ValidationLoss(Hook):
    """The usual way to log a validation loss: the model's loss of each validation batch, summed over its parts."""

    def __init__(self):
        self.losses = []

    def before_val_epoch(self, runner):
        self.losses.append(0.0)

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        model = getattr(runner.model, 'module', runner.model)
        torch.manual_seed(batch_idx)  # detectors draw regions
        with torch.no_grad():
            losses = model(**model.data_preprocessor(data_batch, False), mode='loss')
        self.losses[-1] += float(model.parse_losses(losses)[0])


def shuffled(batch):
    """A batch whose images and labels changed places, each place keeping its index."""
    batch = pseudo_collate(batch)
    samples = batch['data_samples']
    indices = [sample.sample_idx for sample in samples]
    order = torch.randperm(len(samples)).tolist()
    batch = {key: [values[i] for i in order] for key, values in batch.items()}
    for sample, index in zip(batch['data_samples'], indices):
        sample.set_metainfo(dict(sample_idx=index))
    return batch


class Driver:
    """Trains a row's method, or the plain model.

    Args:
        row: of the table.
        data: the generated data set.
        folder: for work dirs.
    """

    epochs, batching = 3, 0.0

    def __init__(self, row, request, folder):
        self.row, self.folder, self.name = row, folder, row.toolkit.name
        self.data = request.getfixturevalue('digits' if self.name == 'mmpretrain' else 'voc')
        if self.name == 'mmseg':
            self.data = self.data / 'VOC2007'
        self.monkeypatch, self.count = request.getfixturevalue('monkeypatch'), 0

    def config(self, *, on=True, settings=None, loop='epoch', batch=None, **options):
        """The toolkit's toy config; ``settings`` go to the method, ``options`` to the config."""
        module, name = ('mmengine', 'digits_config') if self.name == 'mmpretrain' else (self.name, 'config')
        make = getattr(importlib.import_module(f'helpers.{module}'), name)
        self.count += 1
        cfg = make(self.data, self.folder / f'run{self.count}', **self.row.model)
        cfg.train_dataloader.batch_size = batch or BATCH[self.name]
        steps = {'mmpretrain': 5, 'mmdet': 2, 'mmseg': 2}[self.name]
        cfg.optim_wrapper.clip_grad = None
        cfg.param_scheduler = ConfigDict(type='ConstantLR', factor=1.0, by_epoch=False)
        checkpoint = ConfigDict(type='CheckpointHook', by_epoch=loop == 'epoch', max_keep_ckpts=50)
        if loop == 'epoch':
            cfg.train_cfg = ConfigDict(by_epoch=True, max_epochs=self.epochs, val_interval=100)
            cfg.train_dataloader.sampler = ConfigDict(type='DefaultSampler', shuffle=True)
            checkpoint.interval = 1
        else:
            cfg.train_cfg = ConfigDict(by_epoch=False, max_iters=self.epochs * steps, val_interval=1000)
            cfg.train_dataloader.sampler = ConfigDict(type='InfiniteSampler', shuffle=True)
            checkpoint.interval = steps // 2 + 1  # in mid-pass
            if self.row.batch_sampler:
                cfg.train_dataloader.batch_sampler = ConfigDict(type=self.row.batch_sampler)
        cfg.default_hooks.checkpoint = checkpoint
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        cfg.randomness = ConfigDict(seed=0)
        if self.name == 'mmdet':  # so short a training finds nothing with confidence
            test = cfg.model.test_cfg
            (test.rcnn if 'rcnn' in test else test).score_thr = 0.0
        if on:
            cfg.merge_from_dict(copy.deepcopy(self.row.options))
            cfg.custom_hooks = [ConfigDict({**hook, **(settings or {})}) for hook in self.row.hooks]
            if settings and not self.row.hooks:
                cfg.merge_from_dict(settings)
        cfg.merge_from_dict(options)
        return cfg

    def train(self, cfg, *, processes=1, kill_at=None, resume=False, hooks=()):
        """Trains in processes of their own; what rank 0 (or each of several) ends with."""
        work = functools.partial(self._train, cfg, processes, kill_at, resume, hooks)
        results = in_processes(self.folder, work, processes, dies=kill_at is not None)
        return results if processes > 1 or kill_at is not None else results[0]

    def _train(self, cfg, processes, kill_at, resume, hooks, rank):
        cfg.launcher, cfg.resume = ('pytorch' if processes > 1 else 'none'), resume
        prepare_cpu_launch(cfg)
        runner = Runner.from_cfg(cfg)
        steps = Steps(kill_at)
        for hook in (steps, *hooks):
            runner.register_hook(hook, priority='LOWEST')
        runner.train()
        model = getattr(runner.model, 'module', runner.model)
        past = next((hook.past for hook in runner.hooks if hasattr(hook, 'past')), None)
        bank, teacher = getattr(past, 'bank', None), getattr(past, 'teacher', None)
        return {
            'weights': copy.deepcopy(model.state_dict()),
            'steps': steps.steps,
            'bank': bank and bank.state_dict(),
            'teacher': teacher and {k: v.clone() for k, v in teacher.state_dict().items()},
            'checkpoint': str(Path(cfg.work_dir, 'last_checkpoint').read_text().strip()) if rank == 0 else None,
        }

    def validation_losses(self, cfg):
        """The validation loss after each epoch of a training whose weights stay as they are: a list of numbers.

        It is computed as users of the toolkit do, while the method is on, on batches of another size than in training.
        """
        loader = copy.deepcopy(cfg.train_dataloader)
        loader.batch_size -= 1
        loader.sampler = ConfigDict(type='DefaultSampler', shuffle=False)
        cfg.val_dataloader, cfg.val_cfg = loader, ConfigDict()
        cfg.val_evaluator = ConfigDict(type='mmengine.evaluator.DumpResults', out_file_path=f'{cfg.work_dir}.pkl')
        cfg.train_cfg.val_interval = 1
        return in_processes(self.folder, functools.partial(self._validation_losses, cfg))[0]

    def _validation_losses(self, cfg, rank):
        runner, validation = Runner.from_cfg(cfg), ValidationLoss()
        runner.register_hook(Frozen())
        runner.register_hook(validation)
        runner.train()
        return validation.losses

    def shuffle_within_batches(self, cfg):
        """The config, with samples that are moved between the sampler and the loss."""
        cfg.train_dataloader.collate_fn = dict(type=shuffled)
        return cfg

    @property
    def batch(self):
        return BATCH[self.name]

    @property
    def classes(self):
        """The names that the training set gives its classes."""
        from mmengine.registry import DefaultScope

        with DefaultScope.overwrite_default_scope(self.name):
            return tuple(Runner.build_dataloader(self.config(on=False).train_dataloader).dataset.metainfo['classes'])

    def publish(self, trained, target):
        """The weights for inference, and how many were dropped."""
        dropped = publish_checkpoint(trained['checkpoint'], target)
        return torch.load(target, weights_only=True)['state_dict'], dropped

    def load_strictly(self, cfg, weights):
        self._build(cfg).load_state_dict(weights, strict=True)

    def trained(self, weights):
        """Names of what is equal on all ranks: parameters, not the statistics of batch norms, which each rank keeps."""
        return [name for name in weights if 'running_' not in name]

    def killable(self, cfg):
        return cfg

    def accumulate(self, cfg):
        """Two batches to a step."""
        cfg.optim_wrapper.accumulative_counts = 2
        return cfg

    def bfloat16(self, cfg):
        """Mixed precision on the CPU."""
        if self.name == 'mmdet':
            from helpers import mmdet

            mmdet.bfloat16(self.monkeypatch, cfg)
        else:
            where = 'mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available'
            self.monkeypatch.setattr(where, lambda: True)  # mmengine asks for an accelerator, bfloat16 or not
            cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
        return cfg

    def bypass(self):
        return Bypass()

    def _build(self, cfg):
        from mmengine.registry import MODELS, DefaultScope

        with DefaultScope.overwrite_default_scope(self.name):
            return MODELS.build(copy.deepcopy(cfg.model))

    def total(self, step):
        """What a step trained on: mmengine logs it as ``loss``, unless an entry of that name stands for itself."""
        parts = sum(value for name, value in step.items() if 'loss' in name and name != 'loss')
        return step['loss'] if not parts or abs(step['loss'] - parts) < 1e-4 * abs(parts) else step['loss'] + parts

    def predictions(self, cfg, checkpoint):
        """Of the toolkit's own inference API on a picture: a tensor of numbers, and the names of the classes."""
        import numpy as np
        from mmengine.registry import DefaultScope

        picture = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
        cfg = copy.deepcopy(cfg)
        with DefaultScope.overwrite_default_scope(self.name):
            if self.name == 'mmpretrain':
                from mmpretrain import ImageClassificationInferencer, get_model

                cfg.test_dataloader = cfg.test_dataloader or cfg.train_dataloader
                model = get_model(cfg, pretrained=checkpoint, device='cpu')
                found = ImageClassificationInferencer(model)(picture)[0]
                return torch.tensor(found['pred_scores']), tuple(model._dataset_meta['classes'])
            if self.name == 'mmdet':
                from mmdet.apis import inference_detector, init_detector

                model = init_detector(cfg, checkpoint, device='cpu')
                found = inference_detector(model, picture).pred_instances
                return torch.cat([found.bboxes, found.scores[:, None]], dim=1), tuple(model.dataset_meta['classes'])
            from mmseg.apis import inference_model, init_model

            cfg.test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
            model = init_model(cfg, checkpoint, device='cpu')
            return inference_model(model, picture).seg_logits.data, tuple(model.dataset_meta['classes'])
