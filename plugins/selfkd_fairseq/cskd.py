"""CS-KD carried over to tokens; an extension of this project, the paper is about images.

Yun et al., "Regularizing Class-wise Predictions via Self-knowledge Distillation", CVPR 2020
https://arxiv.org/abs/2003.13964
"""

import math
from dataclasses import dataclass, field
from typing import Any, Dict

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.logging import metrics

from selfkd.checks import at_least_zero, positive
from selfkd.defaults import CSKD
from selfkd.losses import distillation_kl
from selfkd.pairing import same_class_partners

from .training import check_model


@dataclass
class CSKDLabelSmoothedCrossEntropyCriterionConfig(LabelSmoothedCrossEntropyCriterionConfig):
    cskd_weight: float = field(default=CSKD['weight'], metadata={'help': 'weight of the class-wise KL; 0: none'})
    cskd_temperature: float = field(default=CSKD['temperature'], metadata={'help': 'temperature T of that KL'})


@register_criterion('cskd_label_smoothed_cross_entropy', dataclass=CSKDLabelSmoothedCrossEntropyCriterionConfig)
class CSKDLabelSmoothedCrossEntropyCriterion(LabelSmoothedCrossEntropyCriterion):
    """``label_smoothed_cross_entropy`` plus the KL from the prediction at another position with the same target token.

    The other position is drawn at random: in another sentence of the batch where there is one, else in the same.

    The KL is summed over the positions that have a partner, and divided, as all of the loss, by the sample size.
    """

    def __init__(self, cfg, task):
        super().__init__(task, cfg.sentence_avg, cfg.label_smoothing, cfg.ignore_prefix_size, cfg.report_accuracy)
        at_least_zero('cskd_label_smoothed_cross_entropy', **{'--cskd-weight': cfg.cskd_weight})
        positive('cskd_label_smoothed_cross_entropy', **{'--cskd-temperature': cfg.cskd_temperature})
        self.weight, self.temperature = cfg.cskd_weight, cfg.cskd_temperature

    def forward(self, model, sample, reduce=True):
        check_model(model)
        self.extra_log: Dict[str, Any] = {}
        loss, sample_size, logging_output = super().forward(model, sample, reduce)
        logging_output.update(self.extra_log)
        return loss, sample_size, logging_output

    def compute_loss(self, model, net_output, sample, reduce=True):
        loss, nll_loss = super().compute_loss(model, net_output, sample, reduce=reduce)
        if not model.training or self.weight == 0:
            return loss, nll_loss
        if not reduce:
            raise ValueError('cskd_label_smoothed_cross_entropy: reduce=False is not supported in training')
        lprobs, target = self.get_lprobs_and_target(model, net_output, sample)
        sentences = torch.arange(len(target), device=target.device) // (len(target) // len(sample['target']))
        # fairseq seeds torch's generator with the number of the update, so a resumed run draws the same partners
        partners = same_class_partners(target, images=sentences, ignore=self.padding_idx)
        # Positions without a partner are their own. Some of them are padding, where a model may predict NaN.
        alone = partners == torch.arange(len(target), device=target.device)
        logits = lprobs.masked_fill(alone[:, None], 0.0)  # log-probabilities differ from logits by a constant a row
        kl = distillation_kl(logits, logits[partners], self.temperature, reduction='sum')
        weighted = self.weight * kl
        self.extra_log = {'loss_cskd': weighted.detach()}
        return loss + weighted, nll_loss

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        super().reduce_metrics(logging_outputs)
        if any('loss_cskd' in log for log in logging_outputs):
            sample_size = sum(log.get('sample_size', 0) for log in logging_outputs)
            total = sum(log.get('loss_cskd', 0) for log in logging_outputs)
            metrics.log_scalar('loss_cskd', total / sample_size / math.log(2), sample_size, round=3)
