"""What a criterion has to know about the training it is part of, and fairseq does not tell it.

A fairseq criterion sees a model and a batch. PS-KD also needs the epoch, the number of updates, the end of an epoch,
and a place in the checkpoint. fairseq gives all of these to the task; a task of our own would be the natural
extension point, but checkpoints name their task, and fairseq-generate could then not read them without --user-dir. So
``Training`` listens in on the one task instance the criterion was built with.
"""

import functools
import logging
import math
from pathlib import Path
from typing import Any

from fairseq.distributed import utils as distributed_utils
from fairseq.models.nat import FairseqNATModel

from selfkd.options import refuse_without_past
from selfkd.past import BankPast
from selfkd.schedule import linear_growth, may_end_early

from .past import make_past, target_lengths, warn_of_slow_average

logger = logging.getLogger(__name__)

STATE_KEY = 'selfkd'  # beside the position of the train iterator in a checkpoint


class Training:
    """Follows the training of a task: makes the past, calls it at the right moments and saves its state.

    Attributes:
        past: where past predictions come from; None before the training has begun.
        epoch: from 1; None before the training has begun.
        updates: number of parameter updates done.
        is_dummy: the present batch only fills up this process's share, and its gradient is dropped.
        model: the model that is trained, unwrapped.
        step_model: the same as the criterion gets it, wrapped for several processes or not.
    """

    def __init__(self, cfg, task):
        if not cfg.max_epoch and not cfg.max_update:
            raise ValueError('--pskd-alpha: grows until the end of training, so it needs --max-epoch or --max-update')
        self.cfg, self.task = cfg, task
        self.past: Any = None
        self.lengths: Any = None  # of the targets, for a bank
        self.saved = self.epoch = self.updates = self.model = self.step_model = None
        self.train_itr: Any = None
        self.started_itr = self.position = None
        self.is_dummy = self.exchanged = False
        for name in ('get_batch_iterator', 'begin_epoch', 'train_step', 'valid_step'):
            setattr(task, name, functools.partial(getattr(self, name), getattr(task, name)))

    @property
    def totals(self):
        """What ends training."""
        totals = {'max_epoch': self.cfg.max_epoch, 'max_update': self.cfg.max_update}
        return {name: total for name, total in totals.items() if total}

    def alpha(self) -> float:
        """Follows whichever is nearer to its end, the present epoch of --max-epoch or the updates of --max-update."""
        done = {'max_epoch': self.epoch, 'max_update': self.updates}
        return linear_growth(self.cfg.pskd_alpha, min(max(done[name] / n for name, n in self.totals.items()), 1))

    # The task's methods: each gets the original one first.

    def get_batch_iterator(self, original, dataset, *args, **kwargs):
        # It need not be for training: --valid-subset can name the training set, too.
        is_training_set = dataset is self.task.datasets.get(self.cfg.train_subset)
        if is_training_set and self.cfg.pskd_teacher == 'bank' and self.lengths is None:
            self.lengths = target_lengths(self.task, dataset)
        itr = original(dataset, *args, **kwargs)
        if is_training_set and 'state_dict' not in vars(itr):
            for name in ('next_epoch_itr', 'state_dict', 'load_state_dict'):
                setattr(itr, name, functools.partial(getattr(self, name), getattr(itr, name), itr))
        return itr

    def begin_epoch(self, original, epoch, model):
        original(epoch, model)
        self.train_itr = self.started_itr  # an epoch begins with its iterator
        mid_epoch = self.train_itr.iterations_in_epoch > 0
        first = self.past is None
        if first:
            check_model(model)
            self.warn_of_early_stops()
            if epoch == 1 and not mid_epoch:
                self.check_length()
            self.past = make_past(self.cfg, self.task, model, self.lengths)
            if isinstance(self.past, BankPast):
                self.past.side.place = (self.loaded_from(), '')
            self.past.load_state_dict(self.saved or {})
        if epoch > 1 and not mid_epoch and not self.cfg.pskd_interval:
            self.past.begin_period(model)
        if first and epoch > 1 and not self.saved and not self.past.ready:
            logger.warning('PS-KD: the checkpoint holds no past predictions: plain training until there are some')
        self.epoch, self.model, self.saved = epoch, model, None

    def loaded_from(self):
        """The folder of the checkpoint that training resumes from, if it does."""
        file = Path(self.cfg.restore_file)
        return self.cfg.save_dir if file.name == str(file) else str(file.parent)

    def train_step(self, original, sample, model, criterion, optimizer, update_num, ignore_grad=False, **kwargs):
        self.updates, self.is_dummy, self.step_model = update_num, ignore_grad, model
        ema_model = kwargs.pop('ema_model', None)
        position = (self.epoch, self.train_itr.iterations_in_epoch)
        begins, self.position = position != self.position, position  # and is not the next of --update-freq batches
        if begins and ema_model is not None:
            self.past.follow(ema_model, self.model)
        if begins and self.cfg.pskd_interval and update_num and update_num % self.cfg.pskd_interval == 0:
            self.past.begin_period(self.model)
        if isinstance(self.past, BankPast):
            self.past.begin_step(update_num, sample['id'].cpu())
        elif begins:
            self.past.begin_step(update_num)
        try:
            result = original(sample, model, criterion, optimizer, update_num, ignore_grad, **kwargs)
        except RuntimeError as error:
            # fairseq then goes on without this batch, while the other processes wait for this one
            if 'out of memory' in str(error):
                self.before_saving(update_num)
            raise
        self.before_saving(update_num)
        return result

    def before_saving(self, updates):
        """Lets the processes exchange what the first of them may save after this step."""
        interval, done = self.cfg.save_interval_updates, (updates, updates + 1)  # fp16 may skip this update
        on_interval = interval > 0 and any(n % interval == 0 for n in done)
        self.exchanged = self.train_itr.end_of_epoch() or self.cfg.max_update in done or on_interval
        if self.exchanged:
            self.past.synchronize()

    def valid_step(self, original, *args, ema_model=None, **kwargs):
        return original(*args, **kwargs)

    # The methods of iterators over the training set.

    def next_epoch_itr(self, original, itr, *args, **kwargs):
        self.started_itr = itr
        return original(*args, **kwargs)

    def state_dict(self, original, itr):
        processes = distributed_utils.get_data_parallel_world_size()
        if isinstance(self.past, BankPast) and not self.exchanged and processes > 1:
            logger.warning(
                'PS-KD: this checkpoint was not foreseen (--stop-time-hours, --patience), so its token bank lacks what '
                'the other processes predicted in this epoch'
            )
        state = original()
        if isinstance(self.past, BankPast):
            place = (self.cfg.save_dir, f'epoch {state["epoch"]}, batch {state["iterations_in_epoch"]}')
            self.past.side.place = None if '://' in self.cfg.save_dir else place
        past = self.past.state_dict(mid_period=bool(self.cfg.pskd_interval) or not itr.end_of_epoch())
        return {**state, STATE_KEY: {'totals': self.totals, 'past': past}}

    def load_state_dict(self, original, itr, state):
        original(state)
        saved = state.get(STATE_KEY, {})
        self.saved = None if 'kind' in saved else saved.get('past')  # of versions that had 'kind' it has another form
        totals = saved.get('totals', self.totals)
        if totals != self.totals:
            logger.warning(
                'PS-KD: alpha now grows up to --pskd-alpha %s over %s; the checkpoint was made with %s. From here on '
                'alpha is what a run with the new total would have had at this point',
                *(self.cfg.pskd_alpha, as_options(self.totals), as_options(totals)),
            )

    # How long training is.

    def check_length(self):
        teacher, interval, total = self.cfg.pskd_teacher, self.cfg.pskd_interval, self.total_updates()
        if teacher == 'ema':  # there at once
            warn_of_slow_average(self.cfg, total)
            return
        way_out = 'raise --max-epoch or --max-update'
        refuse_without_past(
            f'--pskd-teacher {teacher}',
            interval or self.updates_of_epoch(1),
            total,
            'updates',
            period_is='--pskd-interval' if interval else 'the first epoch',
            way_out=f'{way_out}, or set a lower --pskd-interval' if teacher == 'snapshot' else way_out,
            alpha='--pskd-alpha 0',
        )

    def updates_of_epoch(self, epoch: int) -> int:
        """As many as in this epoch, had it as many batches as the present one."""
        frequency = self.cfg.update_freq[min(epoch, len(self.cfg.update_freq)) - 1]
        return math.ceil(len(self.train_itr) / frequency)

    def total_updates(self) -> float:
        by_epochs = sum(self.updates_of_epoch(epoch) for epoch in range(1, self.cfg.max_epoch + 1)) or math.inf
        if self.cfg.max_epoch > 1 and self.task.has_sharded_data(self.cfg.train_subset):
            by_epochs = math.inf  # other shards may be longer
        return min(by_epochs, self.cfg.max_update or math.inf)

    def warn_of_early_stops(self):
        stops = {
            '--patience': self.cfg.patience > 0,
            '--stop-time-hours': self.cfg.stop_time_hours > 0,
            '--stop-min-lr': self.cfg.stop_min_lr > 0,
        }
        given = [name for name, is_given in stops.items() if is_given]
        if given:
            logger.warning(may_end_early('PS-KD', self.cfg.pskd_alpha, as_options(self.totals), given))


def as_options(totals) -> str:
    return ' '.join(f'--{name.replace("_", "-")} {total}' for name, total in totals.items())


def check_model(model) -> None:
    """Refuses models whose output is not a distribution over the vocabulary at every position; wrapped or not."""
    while hasattr(model, 'module'):
        model = model.module
    if isinstance(model, FairseqNATModel):
        raise ValueError(
            f'{type(model).__name__} is not autoregressive: it has losses of its own (--criterion nat_loss), and '
            'predicts other things than the next token, so the criteria of selfkd_fairseq do not work with it: '
            'take an autoregressive --arch, as transformer, or train it without them'
        )
    if getattr(getattr(model, 'decoder', model), 'adaptive_softmax', None) is not None:
        raise ValueError(
            '--adaptive-softmax-cutoff: an adaptive softmax has no full distribution to distil (and fairseq trains it '
            'with --criterion adaptive_loss only): leave it out'
        )
