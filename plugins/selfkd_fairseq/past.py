"""Where PS-KD's past predictions come from: a snapshot of the weights, an average of them, or a bank of predictions.

Each class answers ``predict`` for a batch; :class:`~selfkd_fairseq.training.Training` tells it how training goes on.
B sentences, T target positions (padded), V target vocabulary.
"""

import logging

import numpy as np
import torch
from fairseq.data import LanguagePairDataset, MonolingualDataset
from fairseq.distributed import utils as distributed_utils

from selfkd.bank import PredictionBank, draw_top_k
from selfkd.bank_sync import exchange_rows
from selfkd.losses import TopK
from selfkd.seeds import row_uniform
from selfkd.teacher import SnapshotTeacher

logger = logging.getLogger(__name__)

OTHER_PASTS = 'use --pskd-past snapshot or ema'


class Past:
    """What the three have in common: by default they do nothing at each of these moments."""

    def check_length(self, epoch, total):
        """Before a training of ``total`` updates, ``epoch`` of them in the first epoch.

        Raises:
            ValueError: training would be over before there is anything to learn from.
        """

    def begin_training(self, task, dataset):
        """Before the first epoch, and before each that has a new train iterator."""

    def begin_epoch(self, epoch, model, mid_epoch):
        """``epoch`` counts from 1; ``mid_epoch``: resuming from a checkpoint inside of it."""

    def begin_step(self, updates, model, ema_model):
        """Before each update, ``updates`` of them being done."""

    def predict(self, sample, prefix):
        """Past predictions of the target positions from ``prefix`` on, N = B * (T - prefix): the pair of probs [N, V],
        or :class:`~selfkd.losses.TopK`, and which are known, bool [N] or True; None if there is no past yet."""
        raise NotImplementedError

    def observe(self, sample, prefix, lprobs):
        """Is shown what the model predicts in training, log-probabilities [B * (T - prefix), V]."""

    def synchronize(self):
        """Called by all processes together before one of them may save a checkpoint."""

    def state_dict(self, end_of_epoch):
        """What a resumed run could not work out again, for torch.load(weights_only=True), or None."""

    def load_state_dict(self, state):
        """Restores what :meth:`state_dict` gave, before :meth:`begin_epoch`; None where a checkpoint has nothing."""


class PastModel(Past):
    """A past that is a model: runs it on the batch, in the mode of ``--pskd-teacher-mode``."""

    teacher = None

    def predict(self, sample, prefix):
        if self.teacher is None:
            return None
        model = self.teacher.model

        def probs():
            net_output = model(**sample['net_input'])
            return model.get_normalized_probs(net_output, log_probs=False, sample=sample)

        probs = self.teacher.run(probs)
        return probs[:, prefix:].reshape(-1, probs.size(-1)), True


class Snapshot(PastModel):
    """The weights as they were at the end of the previous epoch, or ``interval`` updates ago at most.

    A checkpoint at the end of an epoch need not hold them: they are that checkpoint's own weights.
    """

    def __init__(self, interval: int = 0, mode: str = 'train'):
        if interval < 0:
            raise ValueError(f'--pskd-snapshot-interval: must be 0 (each epoch) or a number of updates, got {interval}')
        self.interval, self.mode = interval, mode
        self.saved = None

    def check_length(self, epoch, total):
        if (self.interval or epoch) >= total:
            raise ValueError(
                f'--pskd-past snapshot: the first one is due after {self.interval or epoch} updates, and training ends '
                f'after {total}, so it would be plain training: train on, or set --pskd-snapshot-interval below {total}'
            )

    def take(self, model):
        if self.teacher is None:
            self.teacher = SnapshotTeacher(model, mode=self.mode)
            use_current_weights(self.teacher.model)
        else:
            self.teacher.update(model)

    def begin_epoch(self, epoch, model, mid_epoch):
        if self.saved is not None:
            self.take(model)
            self.teacher.load_state_dict(self.saved)
            self.saved = None
        elif not self.interval and epoch > 1:
            if mid_epoch:
                logger.warning(
                    'PS-KD: the checkpoint holds no snapshot of the last epoch: plain training until this one ends'
                )
            else:
                self.take(model)

    def begin_step(self, updates, model, ema_model):
        if self.interval and updates and updates % self.interval == 0:
            self.take(model)
        if self.teacher is not None:
            self.teacher.begin_step(updates)

    def state_dict(self, end_of_epoch):
        if self.teacher is None or (end_of_epoch and not self.interval):
            return None
        copies = {}  # tied weights are saved once
        return {
            name: copies.setdefault((tensor.data_ptr(), tensor.shape), tensor.cpu())
            for name, tensor in self.teacher.state_dict().items()
        }

    def load_state_dict(self, state):
        self.saved = state


def use_current_weights(model):
    """fairseq 0.12.2 keeps a second copy of the encoder's weights for a fast path in evaluation, as they were when a
    checkpoint was loaded, and takes it until the model has been trained: say that this one has been."""
    for module in model.modules():
        if hasattr(module, 'ever_training'):
            module.ever_training = True


class Average(PastModel):
    """The moving average that fairseq itself keeps with --store-ema; fairseq also saves and restores it."""

    def __init__(self, cfg, task):
        if not cfg.store_ema:
            raise ValueError(
                '--pskd-past ema: uses the average that fairseq keeps, so it needs --store-ema (and --ema-decay)'
            )
        self.mode, self.decay, self.start = cfg.pskd_teacher_mode, cfg.ema_decay, cfg.ema_start_update
        task.uses_ema = True

    def check_length(self, epoch, total):
        initial = self.decay ** max(total - self.start, 0)
        if initial > 0.1:
            logger.warning(
                f'--pskd-past ema: with --ema-decay {self.decay} the average still consists to {initial:.0%} of the '
                f'initial weights after the {total} updates of this training, and teaches little. A decay of '
                f'{0.1 ** (10 / total):.4f} has left them behind, to 10 %, after a tenth of it'
            )

    def begin_step(self, updates, model, ema_model):
        # validation may have put the average into evaluation mode
        self.teacher = SnapshotTeacher(ema_model, mode=self.mode, copy_model=False)
        self.teacher.begin_step(updates)
        use_current_weights(self.teacher.model)


class TokenBank(Past):
    """``top_k`` tokens of what the model predicted at each target position when it last saw the sentence.

    It spares the second forward pass. Rows are addressed by the sentence id, which must stay that of one sentence: the
    position of a sentence in the data set.
    """

    def __init__(self, top_k: int, task):
        self.vocabulary, self.padding_idx = len(task.target_dictionary), task.target_dictionary.pad()
        if not 1 <= top_k <= self.vocabulary:
            raise ValueError(f'--pskd-top-k: must lie in [1, {self.vocabulary}] (the target vocabulary), got {top_k}')
        if getattr(task.cfg or task.args, 'shorten_method', None) == 'random_crop':
            raise ValueError(
                '--pskd-past bank: --shorten-method random_crop cuts other tokens each time; use snapshot or ema'
            )
        self.top_k = top_k
        self.bank, self.filled = None, False
        self.unsent = []  # rows that the other processes have not got yet: (step, rows)
        self.step = self.skipped = 0

    def check_length(self, epoch, total):
        if epoch >= total:
            raise ValueError(
                '--pskd-past bank: learns from a sentence when it comes again, in the second epoch, and training ends '
                f'after {total} updates, in the first: it would be plain training; train on, or take --pskd-past ema'
            )

    def begin_training(self, task, dataset):
        if self.bank is not None:
            return
        if task.has_sharded_data('train'):
            raise ValueError(
                "--pskd-past bank: sentence ids start again in each shard of data split by ':', so a row would belong "
                f'to several sentences; join the shards, or {OTHER_PASTS}'
            )
        if isinstance(dataset, LanguagePairDataset) and dataset.tgt_sizes is not None:
            lengths = dataset.tgt_sizes
        elif isinstance(dataset, MonolingualDataset):
            lengths = dataset.sizes + int(dataset.add_bos_token)
        else:
            raise ValueError(
                f'--pskd-past bank: in a {type(dataset).__name__} (several corpora, noise, ...) a sentence id need not '
                f'always stand for the same tokens; {OTHER_PASTS}'
            )
        self.offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
        self.bank = PredictionBank(int(self.offsets[-1]), self.vocabulary, top_k=self.top_k, dtype=torch.float16)
        logger.info(f'PS-KD: the token bank takes {self.bank.nbytes / 1e6:.1f} MB for {len(lengths)} sentences')

    def begin_epoch(self, epoch, model, mid_epoch):
        if epoch > 1 and not self.filled:
            logger.warning(
                'PS-KD: the checkpoint holds no token bank: plain training until each sentence was seen once'
            )

    def begin_step(self, updates, model, ema_model):
        self.step = updates

    def rows(self, sample, prefix):
        """The bank's row for each target position, and which positions are not padding: both [B * (T - prefix)]."""
        ids, target = sample['id'].cpu(), sample['target'].cpu()
        real = target.ne(self.padding_idx)
        first, end = self.offsets[ids].unsqueeze(1), self.offsets[ids + 1].unsqueeze(1)
        rows = torch.where(real, first + real.cumsum(1) - 1, first)  # padding: any row, its loss is ignored
        if (rows >= end).any():
            raise ValueError(
                '--pskd-past bank: a sample has more target tokens than the sentence of its id in the data set. Do the '
                f'data set or the collate function move or change sentences? Leave them as they are, or {OTHER_PASTS}'
            )
        try:
            self.bank.check_labels(rows[real], target[real], way_out=OTHER_PASTS)
        except ValueError as error:
            raise ValueError(
                '--pskd-past bank: a target token is not the one that its row was kept for (rows are the places of '
                f'tokens in the data set, labels their ids in the dictionary): {error}'
            ) from None
        return rows[:, prefix:].flatten(), real[:, prefix:].flatten()

    def predict(self, sample, prefix):
        self.of_batch = rows, _ = self.rows(sample, prefix)
        past, known = self.bank.read_top_k(rows, return_seen=True)
        if not known.any():
            return None
        device = sample['target'].device
        past, known = TopK(*(part.to(device) for part in past)), known.to(device)
        return past, known

    def observe(self, sample, prefix, lprobs):
        rows, real = self.of_batch  # of the same batch: predict is asked first
        where = real.to(lprobs.device)
        drawn = draw_top_k(lprobs, self.top_k, row_uniform(rows, self.step))
        self.bank.write(rows[real], TopK(*(part[where] for part in drawn)))
        self.unsent.append((self.step, rows[real]))
        self.filled = True

    def synchronize(self):
        steps = [torch.full((len(rows),), step) for step, rows in self.unsent]
        none = torch.zeros(0, dtype=torch.long)
        exchange_rows(self.bank, torch.cat([none, *(rows for _, rows in self.unsent)]), torch.cat([none, *steps]))
        self.filled = True
        self.unsent.clear()
        if self.bank.skipped > self.skipped:
            self.skipped = self.bank.skipped
            logger.warning(
                f'PS-KD: {self.skipped} predictions were not finite (--fp16 overflow) and are not in the bank'
            )

    def state_dict(self, end_of_epoch):
        if self.unsent and distributed_utils.get_data_parallel_world_size() > 1:
            logger.warning(
                'PS-KD: this checkpoint was not foreseen (--stop-time-hours, --patience), so its token bank lacks what '
                'the other processes predicted in this epoch'
            )
        if not self.filled:
            return None
        state = self.bank.state_dict()
        return {**state, 'classes': as_float16(state['classes']), 'seen': state['seen'].byte()}

    def load_state_dict(self, state):
        if state is not None:
            self.bank.load_state_dict({**state, 'classes': as_integer(state['classes'])})
            self.filled = True


def as_float16(ids):
    """16-bit ids under the name of a type that gloo and NCCL can send, bit for bit: fairseq sends checkpoints."""
    return ids.view(torch.float16) if ids.dtype == torch.int16 else ids


def as_integer(ids):
    return ids.view(torch.int16) if ids.dtype == torch.float16 else ids
