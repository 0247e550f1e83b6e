"""Where PS-KD's past predictions come from in fairseq: the core's sources, fed with fairseq's data sets and models."""

import logging
from typing import Any, Optional

import numpy as np
import torch
from fairseq.data import LanguagePairDataset, MonolingualDataset

from selfkd.past import CopyPast, Past, SnapshotPast, TokenBankPast, check_kind
from selfkd.teacher import SnapshotTeacher

logger = logging.getLogger(__name__)

OTHERS = 'use --pskd-teacher snapshot or ema'


class TokenBank(TokenBankPast):
    """The core's, in a form of checkpoint that fairseq can send: several processes load what one of them has read."""

    def state_dict(self, mid_period=True):
        bank = super().state_dict()['bank']
        if 'file' in bank:
            return {'bank': bank}
        return {'bank': {**bank, 'classes': as_float16(bank['classes']), 'seen': bank['seen'].byte()}}

    def load_state_dict(self, state):
        bank = state.get('bank', {})
        inside = 'classes' in bank
        super().load_state_dict({'bank': {**bank, 'classes': as_integer(bank['classes'])}} if inside else state)


class StoredAverage(CopyPast):
    """The moving average that fairseq itself keeps, saves and restores with --store-ema. It is there at once."""

    ready = True

    def __init__(self, mode: str):
        self.mode = mode

    def follow(self, average):
        """Before each update, as validation may have put it into evaluation mode."""
        self.teacher = SnapshotTeacher(average, mode=self.mode, copy_model=False)
        use_current_weights(average)

    def state_dict(self, mid_period=True):
        return {'average': {}}

    def load_state_dict(self, state):
        check_kind(state, 'average')


def make_past(cfg, task, model) -> Past:
    """What --pskd-teacher says.

    Raises:
        ValueError: the bank, for data in which a sentence id is not that of one sentence.
    """
    mode = str(cfg.pskd_teacher_mode)
    if cfg.pskd_teacher == 'ema':
        return StoredAverage(mode)
    if cfg.pskd_teacher == 'snapshot':
        past = SnapshotPast(model, mode=mode)
        use_current_weights(past.model)
        return past
    dataset, words = task.datasets[cfg.train_subset], task.target_dictionary
    obstacle = why_no_bank(task, dataset)
    if obstacle:
        raise ValueError(f'--pskd-teacher bank: {obstacle}; {OTHERS}')
    pairs = isinstance(dataset, LanguagePairDataset)
    lengths: Any = dataset.tgt_sizes if pairs else dataset.sizes + int(dataset.add_bos_token)
    lengths = np.asarray(lengths, np.int64)  # uint16 of some data sets, which torch does not take
    return TokenBank(
        lengths,
        len(words),
        top_k=cfg.pskd_top_k,
        dtype=str(cfg.pskd_bank_dtype),
        ignore_index=words.pad(),
        way_out=OTHERS,
    )


def why_no_bank(task, dataset) -> Optional[str]:
    """Why a sentence id would not stand for the same tokens each time; None: it does."""
    if getattr(task.cfg or task.args, 'shorten_method', None) == 'random_crop':
        return '--shorten-method random_crop cuts other tokens each time'
    if task.has_sharded_data('train'):
        return (
            "sentence ids start again in each shard of data split by ':', so a row would belong to several sentences; "
            'join the shards'
        )
    pairs = isinstance(dataset, LanguagePairDataset) and dataset.tgt_sizes is not None
    if not pairs and not isinstance(dataset, MonolingualDataset):
        return (
            f'in a {type(dataset).__name__} (several corpora, noise, ...) a sentence id need not always stand for the '
            'same tokens'
        )
    return None


def warn_of_slow_average(cfg, total):
    initial = cfg.ema_decay ** max(total - cfg.ema_start_update, 0)
    if initial > 0.1:
        logger.warning(
            f'--pskd-teacher ema: with --ema-decay {cfg.ema_decay} the average still consists to {initial:.0%} of the '
            f'initial weights after the {total} updates of this training, and teaches little. A decay of '
            f'{0.1 ** (10 / total):.4f} has left them behind, to 10 %, after a tenth of it'
        )


def use_current_weights(model):
    """fairseq 0.12.2 keeps a second copy of the encoder's weights for a fast path in evaluation, as they were when a
    checkpoint was loaded, and takes it until the model has been trained: say that this one has been."""
    for module in model.modules():
        if hasattr(module, 'ever_training'):
            module.ever_training = True


def as_float16(ids):
    """16-bit ids under the name of a type that gloo and NCCL can send, bit for bit: fairseq sends checkpoints."""
    return ids.view(torch.float16) if ids.dtype == torch.int16 else ids


def as_integer(ids):
    return ids.view(torch.int16) if ids.dtype == torch.float16 else ids
