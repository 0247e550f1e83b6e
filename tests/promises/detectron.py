"""Detectron2 as the promises drive it: the script's trainer, over the same batches in the same order."""

import functools
import itertools
import os
import signal

import helpers.detectron2 as d2_runs
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor, HookBase, SimpleTrainer, create_ddp_model
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils import comm
from helpers.processes import in_processes

from selfkd.publish import publish_checkpoint
from selfkd_detectron2 import selfkd_hooks, with_self_teacher

OPTIONS = 'SOLVER.MAX_ITER 8 SOLVER.CHECKPOINT_PERIOD 2 MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 MODEL.DEVICE cpu'


class Steps(HookBase):
    """Keeps what each step logged; may kill the process before a step."""

    def __init__(self, kill_at=None):
        self.steps, self.kill_at = [], kill_at

    def before_step(self):
        if self.trainer.iter == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_step(self):
        latest = self.trainer.storage.latest()
        kept = {name: value for name, (value, _) in latest.items() if 'loss' in name or 'pskd' in name}
        self.steps.append(kept)


class Driver:
    """Trains a row's method, or the plain detector."""

    batch, batching = 2, 0.0

    def __init__(self, row, request, folder):
        self.row, self.folder, self.data = row, folder, request.getfixturevalue('voc')
        self.count = itertools.count()

    def config(self, *, on=True, settings=None, loop='iteration', batch=2):
        method = (settings or self.row.options)['args'] if on else ''
        return d2_runs.config(self.data, self.folder / f'run{next(self.count)}', options=f'{OPTIONS} {method}')

    def killable(self, cfg):
        return cfg

    def train(self, cfg, *, processes=1, kill_at=None, resume=False):
        work = functools.partial(self._ranks if processes > 1 else self._train, cfg, kill_at, resume)
        results = in_processes(self.folder, work, processes, dies=kill_at is not None)
        return results if processes > 1 or kill_at is not None else results[0]

    def _train(self, cfg, kill_at, resume, rank):
        steps = Steps(kill_at)
        trainer = d2_runs.train(cfg, steps, d2_runs.Reseed(), resume=resume)
        return self._result(trainer.model, steps, trainer._hooks, f'{cfg.OUTPUT_DIR}/model_final.pth')

    def _ranks(self, cfg, kill_at, resume, rank):
        """With torch's DistributedDataParallel, whose device ids Detectron2's own trainer sets, which CPUs have not."""
        torch.distributed.init_process_group('gloo')
        comm.create_local_process_group(comm.get_world_size())
        torch.manual_seed(0)
        model = build_model(with_self_teacher(cfg))
        optimizer = build_optimizer(cfg, model)
        model = create_ddp_model(model, device_ids=None, broadcast_buffers=False)
        batches = [batch[rank :: comm.get_world_size()] for batch in d2_runs.batches(cfg)]
        trainer, steps = SimpleTrainer(model, d2_runs.Cycle(batches), optimizer), Steps()
        hooks = selfkd_hooks(cfg)
        trainer.register_hooks([*hooks, steps])
        trainer.train(0, cfg.SOLVER.MAX_ITER)
        return self._result(model.module, steps, hooks, None)

    def validation_losses(self, cfg):
        """The validation loss after each step of a training whose weights stay as they are, computed as users do."""
        cfg = cfg.clone()
        cfg.SOLVER.BASE_LR = 0.0
        return in_processes(self.folder, functools.partial(self._validation_losses, cfg))[0]

    def _validation_losses(self, cfg, rank):
        trainer = d2_runs.train(cfg, d2_runs.Reseed(), kind=d2_runs.ValidatingTrainer)
        return [sum(losses.values()) for losses in trainer.validation.losses]

    def _result(self, model, steps, hooks, checkpoint):
        teacher = next((hook.teacher for hook in hooks if getattr(hook, 'teacher', None)), None)
        return {
            'weights': {name: value.clone() for name, value in model.state_dict().items()},
            'steps': steps.steps,
            'bank': None,
            'teacher': teacher and {name: value.clone() for name, value in teacher.state_dict().items()},
            'checkpoint': checkpoint,
        }

    def total(self, step):
        return step['total_loss']

    def trained(self, weights):
        return [name for name in weights if 'running_' not in name]

    def publish(self, trained, target):
        dropped = publish_checkpoint(trained['checkpoint'], target)
        return torch.load(target, weights_only=True)['model'], dropped

    def load_strictly(self, cfg, weights):
        build_model(cfg).load_state_dict(weights, strict=True)

    def predictions(self, cfg, checkpoint):
        """Of DefaultPredictor on a picture."""
        cfg = with_self_teacher(cfg.clone())
        cfg.MODEL.WEIGHTS = checkpoint
        picture = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
        found = DefaultPredictor(cfg)(picture)['instances']
        classes = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes
        return torch.cat([found.pred_boxes.tensor, found.scores[:, None]], dim=1), tuple(classes)

    @property
    def classes(self):
        return tuple(self.config(on=False).VOC.CLASSES)
