"""What a criterion has to know about the training it is part of, and fairseq does not tell it.

A fairseq criterion sees a model and a batch. PS-KD also needs the epoch, the number of updates, the end of an epoch,
and a place in the checkpoint. fairseq gives all of these to the task; a task of our own would be the natural
extension point, but checkpoints name their task, and fairseq-generate could then not read them without --user-dir. So
:class:`Training` listens in on the one task instance the criterion was built with.
"""

import functools
import logging

from selfkd.schedule import linear_growth

logger = logging.getLogger(__name__)

STATE_KEY = 'selfkd'  # beside the position of the train iterator in a checkpoint


class Training:
    """Follows the training of a task: calls ``past`` at the right moments and saves its state.

    Attributes:
        epoch: from 1; None before the training has begun.
        updates: number of parameter updates done.
        is_dummy: the present batch only fills up this process's share, and its gradient is dropped.
        model: the model that is trained, unwrapped.
        step_model: the same as the criterion gets it, wrapped for several processes or not.
    """

    def __init__(self, cfg, task, past):
        if not cfg.max_epoch and not cfg.max_update:
            raise ValueError('--pskd-alpha: grows until the end of training, so it needs --max-epoch or --max-update')
        self.cfg, self.task, self.past = cfg, task, past
        self.epoch = self.updates = self.model = self.step_model = self.train_itr = None
        self.is_dummy = False
        for name in ('get_batch_iterator', 'begin_epoch', 'train_step', 'valid_step'):
            setattr(task, name, functools.partial(getattr(self, name), getattr(task, name)))

    @property
    def schedule(self):
        """What alpha grows over: ``('epoch', total)`` or ``('update', total)``."""
        return ('epoch', self.cfg.max_epoch) if self.cfg.max_epoch else ('update', self.cfg.max_update)

    def alpha(self, schedule=None) -> float:
        unit, total = schedule or self.schedule
        done = self.epoch if unit == 'epoch' else self.updates
        return linear_growth(self.cfg.pskd_alpha, min(done / total, 1))

    # The task's methods: each gets the original one first.

    def get_batch_iterator(self, original, dataset, *args, **kwargs):
        itr = original(dataset, *args, **kwargs)
        if dataset is self.task.datasets.get(self.cfg.train_subset) and itr is not self.train_itr:
            self.train_itr = itr
            self.past.begin_training(self.task, dataset)
            for name in ('state_dict', 'load_state_dict'):
                setattr(itr, name, functools.partial(getattr(self, name), getattr(itr, name)))
        return itr

    def begin_epoch(self, original, epoch, model):
        original(epoch, model)
        if self.model is None:
            check_model(model)
            if self.past.starts_with_epoch_2 and self.cfg.max_epoch == 1:
                logger.warning('PS-KD: with --max-epoch 1 there is no past epoch to learn from: this is plain training')
        self.epoch, self.model = epoch, model
        self.past.begin_epoch(epoch, model, mid_epoch=self.train_itr.iterations_in_epoch > 0)

    def train_step(self, original, sample, model, criterion, optimizer, update_num, ignore_grad=False, **kwargs):
        self.updates, self.is_dummy, self.step_model = update_num, ignore_grad, model
        self.past.begin_step(update_num, self.model, kwargs.pop('ema_model', None))
        result = original(sample, model, criterion, optimizer, update_num, ignore_grad, **kwargs)
        interval, done = self.cfg.save_interval_updates, update_num + 1
        if self.train_itr.end_of_epoch() or done == self.cfg.max_update or (interval > 0 and done % interval == 0):
            self.past.synchronize()  # fairseq may save now, on the first process alone
        return result

    def valid_step(self, original, *args, ema_model=None, **kwargs):
        return original(*args, **kwargs)

    # The train iterator's methods.

    def state_dict(self, original):
        past = self.past.state_dict(self.train_itr.end_of_epoch())
        return {**original(), STATE_KEY: {'schedule': list(self.schedule), 'past': past}}

    def load_state_dict(self, original, state):
        original(state)
        saved = state.get(STATE_KEY, {})
        self.past.load_state_dict(saved.get('past'))
        schedule = tuple(saved.get('schedule', self.schedule))
        if schedule != self.schedule:
            logger.warning(
                'PS-KD: alpha now grows up to --pskd-alpha %s over --max-%s %s; the checkpoint was made with '
                '--max-%s %s. From here on alpha is what a run with the new total would have had at this point',
                *(self.cfg.pskd_alpha, *self.schedule, *schedule),
            )


def check_model(model) -> None:
    """Refuses models whose output is not a distribution over the vocabulary at every position."""
    if getattr(getattr(model, 'decoder', model), 'adaptive_softmax', None) is not None:
        raise ValueError(
            '--adaptive-softmax-cutoff: an adaptive softmax has no full distribution to distil (and fairseq trains it '
            'with --criterion adaptive_loss only): leave it out'
        )
