"""PS-KD and CS-KD as hooks of Detectron2's trainers, and one that tells FRSKD's self-teacher when training is on."""

import logging
from typing import Dict, List, Optional

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from selfkd.checks import at_least_zero, positive
from selfkd.defaults import CSKD, PSKD
from selfkd.losses import distillation_kl, mix
from selfkd.options import check_options, refuse_without_past, warn_without_effect
from selfkd.pairing import same_class_partners
from selfkd.past import CopyPast, copy_past
from selfkd.schedule import linear_growth
from selfkd.seeds import step_generator
from selfkd.teacher import unwrap

from .detectors import Classified, make_tap
from .frskd import SelfTaught

logger = logging.getLogger('detectron2.selfkd')  # below the logger that Detectron2 sets up

__all__ = ['CSKDHook', 'FRSKDHook', 'PSKDHook', 'StepHook']


class StepHook(HookBase):
    """Knows when a training iteration is under way.

    Projects compute validation losses in hooks of their own, in ``after_step`` as a rule, with the detector in training
    mode: those stay the plain ones.
    """

    in_step = False

    def before_train(self) -> None:
        # To the front, so that the iteration has ended for us before other hooks do what they do after it.
        hooks = self.trainer._hooks
        hooks.remove(self)
        hooks.insert(0, self)

    def before_step(self) -> None:
        self.in_step = True

    def after_step(self) -> None:
        self.in_step = False

    def after_train(self) -> None:
        self.in_step = False


class SelfKDHook(StepHook):
    """Taps the detector's classification while it trains.

    A subclass has ``rewrite(images, calls, losses)``, which changes the detector's losses in place.
    """

    dense = False  # whether one-stage detectors are supported

    def __init__(self):
        self._handles = []
        self._fired = False

    def setup(self, model: nn.Module) -> None:
        """Makes what the hook needs, before the tap is set: copies of the model would copy torch hooks, too."""

    def before_train(self) -> None:
        super().before_train()
        name = type(self).__name__
        if sum(type(hook) is type(self) for hook in self.trainer._hooks) > 1:
            raise ValueError(
                f'{name} is registered twice, by SELFKD in the config and by the script, perhaps: the two would act on '
                "each other's loss. Remove one"
            )
        model = unwrap(self.trainer.model)
        self.tap = make_tap(model, name, self.dense)
        self.setup(model)
        self._handles = self.tap.attach(self._rewrite)

    def _rewrite(self, images, calls, losses) -> None:
        if self.in_step and torch.is_grad_enabled():  # without gradients it is no loss to train on
            self._fired = True
            self.rewrite(images, calls, losses)

    def after_step(self) -> None:
        super().after_step()
        if not self._fired:
            raise RuntimeError(
                f'{type(self).__name__}: the detector computed no classification loss that could be tapped, so the '
                'training is the plain one (does the trainer run another model than trainer.model?); remove this hook '
                'to train without it'
            )

    def after_train(self) -> None:
        super().after_train()
        for handle in self._handles:
            handle.remove()
        self._handles = []


class PSKDHook(SelfKDHook):
    """Progressive self-knowledge distillation of the classification of regions (or anchors).

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021
    https://arxiv.org/abs/2006.12000

    A frozen past copy of the detector classifies the same regions that the student was given, and the classification
    loss becomes ``ce(label) + alpha_t * ce(past)``; ``alpha_t`` grows with the share of the iterations that were done
    when the present period began. The label's term keeps its whole weight: where student and past agree the past's has
    no gradient, and with ``1 - alpha_t`` classification would weigh ever less beside the boxes. Sampling,
    normalisation, box regression, masks and the RPN are Detectron2's own. RetinaNet and FCOS keep their focal loss; the
    past is added as the quality focal loss with the weight ``alpha_t``, on the same anchors and with the same
    normaliser::

        trainer = DefaultTrainer(cfg)
        trainer.register_hooks([PSKDHook(alpha=0.8)])
        trainer.resume_or_load(resume=True)
        trainer.train()

    Args:
        alpha: final weight of the past's term, in [0, 1].
        teacher: what the past copy is: ``'snapshot'``, the detector as it was when the present period began (and what
            ``'auto'`` takes), or ``'ema'``, a moving average of its weights. There is no bank: regions are others in
            each step.
        teacher_mode: ``'train'``: the past copy predicts as the student does in training (batch norm by the batch's
            statistics, dropout drawn anew); ``'eval'``: in evaluation mode.
        interval: iterations of a period, between two snapshots. Defaults to one pass over the training set, which
            Detectron2's own data loaders can tell. The first period has no past, whatever the teacher.
        ema_decay: of the moving average, in [0, 1).
        keep_hard: regions: False weighs the label's term by ``1 - alpha_t``, as the paper does in classification: the
            target is then ``(1 - alpha_t) * label + alpha_t * past``.
        background: also soften the target of background regions, whose class is one like the others. False leaves
            their label hard. One-stage detectors have no such class.

    Logged: ``pskd_alpha``, ``pskd_hard`` and ``pskd_soft`` (the two parts of the loss), with the prefix ``stage0/``,
    ``stage1/``, ... for the stages of Cascade R-CNN.

    A checkpoint of the middle of a period holds the past copy. Training that is resumed there without one (PS-KD was
    off until then) is plain until the next period, and says so in the log.

    Raises:
        ValueError: a setting out of range; at the start of training, for detectors that it does not support, periods
            as long as the training, and a second PSKDHook.
    """

    dense = True

    def __init__(
        self,
        alpha: float = PSKD['alpha']['detection'],
        *,
        teacher: str = PSKD['teacher'],
        teacher_mode: str = PSKD['teacher_mode'],
        interval: Optional[int] = PSKD['interval'],
        ema_decay: float = PSKD['ema_decay'],
        keep_hard: bool = PSKD['keep_hard']['detection'],
        background: bool = PSKD['background'],
    ):
        super().__init__()
        user = 'PSKDHook (SELFKD.PSKD)'
        if teacher == 'bank':
            raise ValueError(
                f"{user}: teacher='bank' keeps a prediction for each sample, and regions are others in each step: set "
                "'snapshot' or 'ema'"
            )
        options = dict(alpha=alpha, teacher=teacher, teacher_mode=teacher_mode, interval=interval, ema_decay=ema_decay)
        check_options(user, 'detection', options)
        if teacher == 'auto':
            warn_without_effect(user, 'snapshot', 'detection', options, log=logger.warning)
        self.alpha, self.teacher, self.teacher_mode, self.interval = alpha, teacher, teacher_mode, interval
        self.ema_decay, self.keep_hard, self.background = ema_decay, keep_hard, background
        self.current_alpha = 0.0
        self.past: Optional[CopyPast] = None
        self._resumed: dict = {}

    def setup(self, model: nn.Module) -> None:
        for name in ('background', 'keep_hard'):
            if not getattr(self, name) and not hasattr(model, 'roi_heads'):
                raise ValueError(
                    f'PSKDHook: {name}=False (SELFKD.PSKD.{name.upper()}) is for regions, and {type(model).__name__} '
                    'has none: remove it'
                )
        self.period = period = self.interval or _epoch_length(self.trainer.data_loader)
        start, end = self.trainer.start_iter, self.trainer.max_iter
        if self.alpha > 0:
            refuse_without_past(
                'PSKDHook',
                period,
                end,
                'iterations',
                period_is='interval (SELFKD.PSKD.INTERVAL)' if self.interval else 'a pass over the training set',
                way_out=f'set interval (SELFKD.PSKD.INTERVAL) well below that, to {max(1, end // 10)}, say',
                alpha='alpha (SELFKD.PSKD.ALPHA) to 0',
            )
        teacher = 'snapshot' if self.teacher == 'auto' else self.teacher
        self.past = copy_past(teacher, model, mode=self.teacher_mode, ema_decay=self.ema_decay)
        self.past.load_state_dict(self._resumed)
        self._resumed = {}
        logger.info(
            f'PS-KD: teacher={teacher!r}, a past copy of the detector, as regions and anchors are others in each step; '
            f'alpha grows to {self.alpha}, and a period has {period} iterations'
        )
        if start > period and start % period and not self.past.ready:
            logger.warning(
                'PS-KD: training resumes without a past copy (PS-KD was off in the run that saved the checkpoint, '
                'or PSKDHook was registered after the checkpoint was loaded): '
                f'it is plain until iteration {(start // period + 1) * period}'
            )

    @property
    def _past(self) -> CopyPast:
        assert self.past is not None  # the training has begun
        return self.past

    def before_step(self) -> None:
        super().before_step()
        trainer, past = self.trainer, self._past
        start = trainer.iter // self.period * self.period
        self.current_alpha = linear_growth(self.alpha, start / trainer.max_iter)
        trainer.storage.put_scalar('pskd_alpha', self.current_alpha, smoothing_hint=False)
        if trainer.iter == start and start > 0:
            past.begin_period(unwrap(trainer.model))
        past.begin_step(trainer.iter)

    def after_step(self) -> None:
        super().after_step()
        self._past.after_update(unwrap(self.trainer.model))

    def rewrite(self, images: Tensor, calls: List[Classified], losses: Dict[str, Tensor]) -> None:
        alpha = self.current_alpha if self._past.ready else 0.0
        past = self.tap.past_losses(self._past, images, calls, self.background) if alpha > 0 else None
        storage = get_event_storage()
        for i, call in enumerate(calls):
            soft = 0.0
            if past is not None:
                losses[call.name] = mix(losses[call.name], past[i], alpha, keep_hard=self.keep_hard)
                soft = alpha * float(past[i])
            storage.put_scalar(f'{call.scope}pskd_hard', float(losses[call.name]) - soft)
            storage.put_scalar(f'{call.scope}pskd_soft', soft)

    def state_dict(self) -> dict:
        return self._past.state_dict(mid_period=(self.trainer.iter + 1) % self.period != 0)

    def load_state_dict(self, state: dict) -> None:
        self._resumed = state


class CSKDHook(SelfKDHook):
    """Class-wise self-knowledge distillation, carried over to regions; an extension of this project.

    Yun et al., "Regularizing Class-wise Predictions via Self-knowledge Distillation", CVPR 2020
    https://arxiv.org/abs/2003.13964

    For each foreground region of the batch another one of its class is the teacher, drawn at random: of an object in
    another image where there is one, else of another object in the image, else another region of the same object
    ([`selfkd.pairing.same_class_partners`][]). ``loss_cskd`` is the sum of the temperature KLs, normalised and
    weighted as the classification loss is (by the number of sampled regions). No further forward pass.

    Args:
        weight: of the KL, at least 0.
        temperature: T > 0.

    Raises:
        ValueError: a setting out of range; at the start of training, for detectors that it does not support.
    """

    def __init__(self, weight: float = CSKD['weight'], *, temperature: float = CSKD['temperature']):
        super().__init__()
        at_least_zero('CSKDHook (SELFKD.CSKD)', weight=weight)
        positive('CSKDHook (SELFKD.CSKD)', temperature=temperature)
        self.weight, self.temperature = weight, temperature

    def rewrite(self, _: Tensor, calls: List[Classified], losses: Dict[str, Tensor]) -> None:
        for stage, call in enumerate(calls):
            assert call.match is not None  # these are regions
            labels, images, objects = call.match()
            partners = same_class_partners(
                labels,
                objects,
                images,
                ignore=call.logits.shape[1] - 1,
                generator=step_generator(self.trainer.iter, stage),
            )
            kl = distillation_kl(call.logits, call.logits[partners], self.temperature, reduction='sum')
            losses[call.name.replace('loss_cls', 'loss_cskd')] = self.weight * call.weight * kl


class FRSKDHook(StepHook):
    """Sees to it that the model has the self-teacher that is asked for, and that it teaches in training alone.

    Without this hook the self-teacher adds its losses wherever the detector computes losses with gradients.

    Raises:
        ValueError: at the start of training, for a model without a self-teacher.
    """

    heads: List[SelfTaught] = []

    def before_train(self) -> None:
        super().before_train()
        self.heads = [module for module in self.trainer.model.modules() if isinstance(module, SelfTaught)]
        if not self.heads:
            raise ValueError(
                'SELFKD.FRSKD.ENABLED is True, but the model was built without a self-teacher: derive the trainer from '
                'SelfKDTrainer, or build the model from with_self_teacher(cfg)'
            )
        self._teach(False)

    def before_step(self) -> None:
        super().before_step()
        self._teach(True)

    def after_step(self) -> None:
        super().after_step()
        self._teach(False)

    def after_train(self) -> None:
        super().after_train()
        self._teach(True)

    def _teach(self, teaches: bool) -> None:
        for heads in self.heads:
            heads.teaches = teaches


def _epoch_length(data_loader) -> int:
    """Iterations of one pass over the training data, for Detectron2's own data loaders."""
    batch_size, dataset = getattr(data_loader, 'batch_size', None), data_loader
    while hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    try:
        return max(1, len(dataset) // (batch_size * comm.get_world_size()))
    except TypeError:
        raise ValueError(
            f'PSKDHook: cannot tell from {type(data_loader).__name__} how many iterations a pass over the training set '
            'has: set interval (SELFKD.PSKD.INTERVAL)'
        ) from None
