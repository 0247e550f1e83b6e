"""Where PS-KD's past predictions come from in fairseq: the core's sources, fed with fairseq's data sets and models."""

import logging
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from selfkd.past import CopyPast, Past, SnapshotPast, TokenBankPast, check_kind
from selfkd.teacher import SnapshotTeacher, random_state

logger = logging.getLogger(__name__)

OTHERS = 'use --pskd-teacher snapshot or ema'
LOOKED_AT = 8  # samples that show what ids and sizes of a data set are


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

    def follow(self, average, model):
        """Before each update: fairseq hands its average to training steps alone."""
        self.teacher = SnapshotTeacher(average, mode=self.mode, copy_model=False)
        self.teacher.follow(model)
        use_current_weights(average)

    def state_dict(self, mid_period=True):
        return {'average': {}}

    def load_state_dict(self, state):
        check_kind(state, 'average')


def make_past(cfg, task, model, lengths: Any) -> Past:
    """What --pskd-teacher says; ``lengths`` are a bank's, of ``target_lengths``, else None."""
    mode = str(cfg.pskd_teacher_mode)
    if cfg.pskd_teacher == 'ema':
        return StoredAverage(mode)
    if cfg.pskd_teacher == 'snapshot':
        past = SnapshotPast(model, mode=mode)
        use_current_weights(past.model)
        return past
    words = task.target_dictionary
    return TokenBank(
        lengths,
        len(words),
        top_k=cfg.pskd_top_k,
        dtype=str(cfg.pskd_bank_dtype),
        ignore_index=words.pad(),
        way_out=OTHERS,
    )


def target_lengths(task, dataset) -> np.ndarray:
    """How many target tokens each sample has: what the data set says of its sizes, and a few samples confirm.

    Call it before an iterator over the data set begins, which may prefetch other samples.

    Raises:
        ValueError: a sentence id does not stand for one sample, or not for the same tokens each time.
    """
    obstacle = why_no_bank(task, dataset)
    if obstacle is None:
        looked_at = np.unique(np.linspace(0, len(dataset) - 1, LOOKED_AT).astype(int))
        batch = look_at(dataset, looked_at)
        target, ids = batch.get('target'), batch.get('id')
        if not isinstance(ids, Tensor) or not isinstance(target, Tensor) or target.dim() != 2:
            obstacle = 'its batches have no "id", or no "target" [sentences, tokens] for it'
        elif sorted(ids.tolist()) != looked_at.tolist():
            obstacle = 'in it an id is not that of one sample (several corpora, resampled ones?)'
        else:
            sizes = target_sizes(dataset)
            found = target.ne(task.target_dictionary.pad()).sum(1).numpy()
            special = np.unique(found - sizes[ids.numpy()])  # tokens that sizes leave out: the end, a language's tag
            if len(special) == 1:
                return sizes + special
            obstacle = 'its sizes do not say how many tokens a target has, or its collater moves samples'
    raise ValueError(f'--pskd-teacher bank: not with this {type(dataset).__name__}: {obstacle}; {OTHERS}')


def why_no_bank(task, dataset) -> Optional[str]:
    """Why a sentence id is known not to stand for the same tokens each time."""
    if getattr(task.cfg or task.args, 'shorten_method', None) == 'random_crop':
        return '--shorten-method random_crop cuts other tokens each time'
    if task.has_sharded_data('train'):
        return (
            "sentence ids start again in each shard of data split by ':', so a row would belong to several sentences; "
            'join the shards'
        )
    transforms = getattr(getattr(dataset, 'dataset_transforms', None), 'transforms', [])
    if any(hasattr(transform, 'find_indices') for transform in transforms):
        return 'concataugment joins other sentences each time'
    return None


def look_at(dataset, indices) -> dict:
    """A batch of these samples, for which nothing is drawn that training would have drawn."""
    if getattr(dataset, 'supports_prefetch', False):
        dataset.prefetch(indices)
    with random_state(0, torch.device('cpu')):
        return dataset.collater([dataset[i] for i in indices])


def target_sizes(dataset) -> np.ndarray:
    """What the data set says of the sizes of its targets, int64 ``[N]``."""
    sizes = getattr(dataset, 'tgt_sizes', None)
    if sizes is None:  # (source, target), or of a language model's text
        found = (dataset.size(i) for i in range(len(dataset)))
        sizes = [size[-1] if isinstance(size, (tuple, list)) else size for size in found]
    return np.asarray(sizes, np.int64)


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
