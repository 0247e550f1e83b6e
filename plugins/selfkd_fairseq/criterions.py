"""fairseq's criteria with the target softened by the model's own past predictions.

Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021
https://arxiv.org/abs/2006.12000
"""

import logging
import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.logging import metrics
from omegaconf import II

from selfkd.defaults import PSKD
from selfkd.losses import pskd_loss
from selfkd.metrics import calibration_gaps, confidence_of
from selfkd.options import TEACHERS, choose_teacher
from selfkd.past import BankPast
from selfkd.renamed import warn_renamed
from selfkd.storage import KINDS

from .training import Training

logger = logging.getLogger(__name__)

ECE_BINS = 10
RENAMED = {'pskd_past': 'pskd_teacher', 'pskd_snapshot_interval': 'pskd_interval'}
# docs/fairseq.md has the numbers
NO_BANK = 'on larger corpora the translations were better than with the bank, which saves a forward pass'


@dataclass
class PSKDConfig(FairseqDataclass):
    pskd_alpha: float = field(
        default=PSKD['alpha']['translation'],
        metadata={
            'help': 'share of the past prediction in the target at the end of training; grows linearly up to it with '
            'the epochs of --max-epoch or the updates of --max-update, whichever ends first. 0: no PS-KD'
        },
    )
    pskd_teacher: ChoiceEnum(list(TEACHERS)) = field(  # type: ignore[valid-type]  # so fairseq writes it
        default=PSKD['teacher'],
        metadata={
            'help': 'where past predictions come from: the weights at the end of the previous epoch (snapshot, and '
            'auto), the moving average of the weights that --store-ema keeps (ema), or tokens of what was predicted '
            'for the sentence in the previous epoch (bank: no second forward pass)'
        },
    )
    pskd_teacher_mode: ChoiceEnum(['train', 'eval']) = field(  # type: ignore[valid-type]
        default=PSKD['teacher_mode'],
        metadata={
            'help': 'how the snapshot or average predicts: as in training, with dropout drawn anew (train), or without '
            '(eval), which is sharper on sentences it has learnt'
        },
    )
    pskd_interval: Optional[int] = field(
        default=PSKD['interval'],
        metadata={'help': 'take the snapshot every so many updates instead of at the end of each epoch'},
    )
    pskd_keep_hard: bool = field(
        default=PSKD['keep_hard']['translation'],
        metadata={'help': "keep the whole weight of the label's loss, 1 instead of 1 - alpha"},
    )
    pskd_top_k: int = field(
        default=PSKD['top_k']['translation'],
        metadata={
            'help': 'tokens that the bank keeps for each target position: the likeliest, and for the rest of the mass '
            'others, drawn in proportion to their probability'
        },
    )
    pskd_bank_dtype: ChoiceEnum(list(KINDS)) = field(  # type: ignore[valid-type]
        default=PSKD['bank_dtype']['translation'],
        metadata={'help': 'how the bank keeps probabilities; log8: a byte each, right on average'},
    )
    report_ece: bool = field(
        default=False,
        metadata={
            'help': 'report the expected calibration error of the predicted tokens in validation, in percent (10 bins)'
        },
    )
    pskd_past: Optional[str] = field(default=None, metadata={'help': 'old name of --pskd-teacher'})
    pskd_snapshot_interval: Optional[int] = field(default=None, metadata={'help': 'old name of --pskd-interval'})
    # what fairseq was told elsewhere
    max_epoch: int = II('optimization.max_epoch')
    max_update: int = II('optimization.max_update')
    update_freq: List[int] = II('optimization.update_freq')
    stop_time_hours: float = II('optimization.stop_time_hours')
    stop_min_lr: float = II('optimization.stop_min_lr')
    patience: int = II('checkpoint.patience')
    save_interval_updates: int = II('checkpoint.save_interval_updates')
    save_dir: str = II('checkpoint.save_dir')
    restore_file: str = II('checkpoint.restore_file')
    train_subset: str = II('dataset.train_subset')
    store_ema: bool = II('ema.store_ema')
    ema_decay: float = II('ema.ema_decay')
    ema_start_update: int = II('ema.ema_start_update')
    ddp_backend: str = II('distributed_training.ddp_backend')
    pipeline_model_parallel: bool = II('distributed_training.pipeline_model_parallel')
    model_parallel_size: int = II('common.model_parallel_size')
    tpu: bool = II('common.tpu')


@dataclass
class PSKDCrossEntropyCriterionConfig(PSKDConfig, CrossEntropyCriterionConfig):
    pass


@dataclass
class PSKDLabelSmoothedCrossEntropyCriterionConfig(PSKDConfig, LabelSmoothedCrossEntropyCriterionConfig):
    pass


class ProgressiveRefinement:
    """Mixed into a criterion of fairseq: replaces ``compute_loss`` in training and adds to the logs.

    Validation, and everything with ``--pskd-alpha 0``, is left to fairseq's own code.
    """

    eps = 0.0
    ignore_prefix_size = 0

    def setup(self, cfg):
        """Raises ValueError for settings that cannot work."""
        self.report_ece, self.keep_hard = cfg.report_ece, cfg.pskd_keep_hard
        self.training_run = None
        if not 0 <= cfg.pskd_alpha <= 1:
            raise ValueError(f'--pskd-alpha: must lie in [0, 1], got {cfg.pskd_alpha}')
        if cfg.pskd_alpha == 0:
            return
        check_config(cfg)
        take_options(cfg, len(self.task.target_dictionary))
        self.task.uses_ema = cfg.pskd_teacher == 'ema'  # fairseq then gives it to the task
        self.training_run, self.skipped = Training(cfg, self.task), 0

    def forward(self, model, sample, reduce=True):
        self.extra_log: Dict[str, Any] = {}
        loss, sample_size, logging_output = super().forward(model, sample, reduce)
        logging_output.update(self.extra_log)
        return loss, sample_size, logging_output

    def compute_loss(self, model, net_output, sample, reduce=True):
        run = self.training_run
        if not model.training:
            if self.report_ece:
                self.extra_log.update(self.calibration(model, net_output, sample))
            return super().compute_loss(model, net_output, sample, reduce=reduce)
        if run is None:
            return super().compute_loss(model, net_output, sample, reduce=reduce)
        if run.epoch is None or model is not run.step_model:
            raise RuntimeError(
                'PS-KD follows the training of one whole model by fairseq-train; this task or program trains parts of '
                "a model by themselves, or does not call the task's begin_epoch and train_step: use --pskd-alpha 0"
            )
        if not run.is_dummy:
            run.past.begin_forward(lambda copy: self.past_probs(copy, sample))
        lprobs, target = self.get_lprobs_and_target(model, net_output, sample)
        past = None if run.is_dummy else self._past_of(run.past, lprobs, target)
        alpha, probs = (run.alpha(), past.probs) if past else (0.0, None)
        loss, parts = pskd_loss(
            lprobs,
            target,
            probs,
            past.alpha(alpha) if past else 0.0,
            ignore_index=self.padding_idx,
            reduction='sum' if reduce else 'none',
            label_smoothing=self.eps,
            keep_hard=self.keep_hard,
            normalized=True,
            return_parts=True,
        )
        self.extra_log = {
            'pskd_alpha': alpha * sample['ntokens'],
            'pskd_hard': parts.hard.sum(),
            'pskd_soft': parts.soft.sum(),
            'nll_loss': parts.nll.sum(),
        }
        if isinstance(run.past, BankPast):
            before, self.skipped = self.skipped, run.past.skipped
            self.extra_log['pskd_skipped'] = self.skipped - before
        return loss, parts.nll

    def _past_of(self, source, lprobs, target):
        """What was predicted for the batch; what is predicted now is kept."""
        past = source.predict(target)
        source.observe(lprobs)
        return past and past.to(lprobs.device)

    def past_probs(self, copy, sample):
        """What a past copy of the model predicts at the target positions, [N, V]."""
        probs = copy.get_normalized_probs(copy(**sample['net_input']), log_probs=False, sample=sample)
        return probs[:, self.ignore_prefix_size :].reshape(-1, probs.size(-1))

    def calibration(self, model, net_output, sample):
        """What ECE is computed from, as sums: accuracy minus confidence in each bin, and the number of tokens."""
        lprobs, target = self.get_lprobs_and_target(model, net_output, sample)
        real = target.ne(self.padding_idx)
        gaps = calibration_gaps(*confidence_of(lprobs[real].exp(), target[real]), bins=ECE_BINS)
        return {'ece_tokens': real.sum(), **{f'ece_gap_{i}': gap for i, gap in enumerate(gaps)}}

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        mixed = any('pskd_alpha' in log for log in logging_outputs)
        # CrossEntropyCriterion would take `loss` for the label's: a mixed one is logged as a smoothed one is
        fairseqs: Any = LabelSmoothedCrossEntropyCriterion if mixed else super()
        fairseqs.reduce_metrics(logging_outputs)

        def total(key):
            return sum(log.get(key, 0) for log in logging_outputs)

        if mixed:
            ntokens, sample_size = total('ntokens'), total('sample_size')
            metrics.log_scalar('pskd_alpha', total('pskd_alpha') / ntokens, ntokens, round=4)
            for part in ('pskd_hard', 'pskd_soft'):
                metrics.log_scalar(part, total(part) / sample_size / math.log(2), sample_size, round=3)
        if any('pskd_skipped' in log for log in logging_outputs):
            metrics.log_scalar_sum('pskd_skipped', total('pskd_skipped'))
        if any('ece_tokens' in log for log in logging_outputs):
            keys = ['ece_tokens', *(f'ece_gap_{i}' for i in range(ECE_BINS))]
            for key in keys:
                metrics.log_scalar_sum(f'_{key}', total(key))
            metrics.log_derived('ece', expected_calibration_error)


def expected_calibration_error(meters) -> float:
    gaps = [abs(float(meters[f'_ece_gap_{i}'].sum)) for i in range(ECE_BINS)]
    return round(100 * sum(gaps) / float(meters['_ece_tokens'].sum), 3)


def check_config(cfg) -> None:
    """Refuses training set-ups in which no process has the whole model."""
    if cfg.ddp_backend == 'fully_sharded':
        raise ValueError(
            '--ddp-backend fully_sharded: no process has the whole model to copy; use pytorch_ddp or legacy_ddp'
        )
    if cfg.pipeline_model_parallel or cfg.model_parallel_size > 1:
        raise ValueError(
            '--pipeline-model-parallel, --model-parallel-size: no process has the whole model to copy: leave them out'
        )
    if cfg.tpu:
        raise ValueError(
            '--tpu, and --bf16 which fairseq-train takes for it: PS-KD was never run on one; for bfloat16 on a GPU use '
            'fairseq-hydra-train with common.bf16=true, or --amp'
        )


def take_options(cfg, vocabulary) -> None:
    """Gives ``cfg`` its options by their new names, and the teacher that ``auto`` comes to.

    Raises:
        ValueError: an option out of range, or of another teacher than the one that was asked for.
    """
    for old, new in RENAMED.items():
        if cfg[old] is not None:
            warn_renamed('fairseq', flag(old), flag(new))
            if cfg[new] not in (None, 'auto'):
                raise ValueError(f'{flag(old)}: is the old name of {flag(new)}, and both were given: remove it')
            cfg[new], cfg[old] = cfg[old] or None, None
    asked = cfg.pskd_teacher
    cfg.pskd_teacher = teacher = choose_teacher(asked, NO_BANK)
    others = {  # of the options that not every teacher has: whether it was given, and whose it is
        'pskd_interval': (cfg.pskd_interval is not None, ['snapshot']),
        'pskd_teacher_mode': (cfg.pskd_teacher_mode != PSKD['teacher_mode'], ['snapshot', 'ema']),
        'pskd_top_k': (cfg.pskd_top_k != PSKD['top_k']['translation'], ['bank']),
        'pskd_bank_dtype': (cfg.pskd_bank_dtype != PSKD['bank_dtype']['translation'], ['bank']),
    }
    for option, (given, teachers) in others.items():
        if given and teacher not in teachers:
            says = f'{flag(option)}: is for --pskd-teacher {" or ".join(teachers)}, not {teacher}'
            if asked != 'auto':
                raise ValueError(f'{says}: leave it out')
            logger.warning(f'PS-KD: {says}: it does nothing')
    if cfg.pskd_interval is not None and cfg.pskd_interval < 1:
        raise ValueError(f'--pskd-interval: must be a positive number of updates, got {cfg.pskd_interval}')
    if teacher == 'bank' and not 1 <= cfg.pskd_top_k <= vocabulary:
        raise ValueError(f'--pskd-top-k: must lie in [1, {vocabulary}] (the target vocabulary), got {cfg.pskd_top_k}')
    if teacher == 'ema' and not cfg.store_ema:
        raise ValueError(
            '--pskd-teacher ema: uses the average that fairseq keeps, so it needs --store-ema (and --ema-decay)'
        )


def flag(name: str) -> str:
    return f'--{name.replace("_", "-")}'


@register_criterion('pskd_cross_entropy', dataclass=PSKDCrossEntropyCriterionConfig)
class PSKDCrossEntropyCriterion(ProgressiveRefinement, CrossEntropyCriterion):
    """``cross_entropy`` with PS-KD: (1 - alpha) * cross-entropy + alpha * cross-entropy against the past prediction."""

    def __init__(self, cfg, task):
        super().__init__(task, cfg.sentence_avg)
        self.setup(cfg)

    def get_lprobs_and_target(self, model, net_output, sample):
        """Log-probabilities [N, V] and targets [N] of the N target positions."""
        lprobs = model.get_normalized_probs(net_output, log_probs=True)
        return lprobs.view(-1, lprobs.size(-1)), model.get_targets(sample, net_output).view(-1)


@register_criterion('pskd_label_smoothed_cross_entropy', dataclass=PSKDLabelSmoothedCrossEntropyCriterionConfig)
class PSKDLabelSmoothedCrossEntropyCriterion(ProgressiveRefinement, LabelSmoothedCrossEntropyCriterion):
    """``label_smoothed_cross_entropy`` with PS-KD: the hard part is the smoothed one."""

    def __init__(self, cfg, task):
        super().__init__(task, cfg.sentence_avg, cfg.label_smoothing, cfg.ignore_prefix_size, cfg.report_accuracy)
        self.setup(cfg)
