"""PS-KD in a training loop of your own."""

from typing import Callable, Optional
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfkd.bank import PredictionBank
from selfkd.bank_sync import exchange_rows
from selfkd.checks import one_of, share
from selfkd.losses import pskd_cross_entropy
from selfkd.schedule import linear_growth
from selfkd.teacher import MODES, SnapshotTeacher

from .batches import Method, unwrap, world_size
from .calls import Calls
from .tap import tap

__all__ = ['PSKD']

WAY_OUT = "use teacher='snapshot', which needs no rows"


class PSKD(Method):
    """Progressive self-knowledge distillation: three lines in a loop that stays as it is.

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021
    https://arxiv.org/abs/2006.12000

    Args:
        loader: the DataLoader of the training set, or another method's ``batches()``.
        num_classes: C; for the bank. By default it is seen at the first loss.
        alpha: final share of the past prediction in the target, in [0, 1]; it grows linearly, by epochs. Defaults to
            0.8, the paper's.
        max_epochs: how many epochs the whole training takes, an epoch being a loop over ``batches()``.
        max_steps: in its place how many batches the whole training takes, for a loop that counts these; an epoch is
            then one pass over the data, counted by samples.
        teacher: ``'bank'`` keeps the prediction that each training sample got when it was last trained on (the paper's
            way, no extra forward pass); ``'snapshot'`` runs the model of the end of the previous epoch on the present
            inputs: for Mixup and CutMix, for an IterableDataset, and for pixels.
        model: for ``'snapshot'``: the module that the loop calls (DistributedDataParallel, torch.compile'd or plain).
        outputs: for ``'snapshot'``: gives the logits from what the model returns, where that is not they.
        teacher_mode: for ``'snapshot'``: see :class:`selfkd.teacher.SnapshotTeacher`.
        top_k, dtype, device: of the bank, see :class:`selfkd.bank.PredictionBank`.

    ``current_alpha`` is the share in the epoch under way.

    Raises:
        ValueError: for settings that cannot work or would never act; each message says what to change.

    Example:
        >>> images, labels, model = torch.randn(8, 4), torch.arange(8) % 2, nn.Linear(4, 2)
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> pskd = PSKD(loader, num_classes=2, alpha=0.8, max_epochs=3)
        >>> for epoch in range(3):
        ...     for x, y in pskd.batches():
        ...         loss = pskd.loss(model(x), y)
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        >>> round(pskd.current_alpha, 1)
        0.8
    """

    name, call = 'PSKD', 'pskd.loss(logits, target)'
    way_in = 'use it in place of the cross-entropy, or pskd.tap() around code that cannot be edited'

    def __init__(
        self,
        loader,
        num_classes: Optional[int] = None,
        *,
        alpha: float = 0.8,
        max_epochs: Optional[int] = None,
        max_steps: Optional[int] = None,
        teacher: str = 'bank',
        model: Optional[nn.Module] = None,
        outputs: Optional[Callable] = None,
        teacher_mode: str = 'train',
        top_k: Optional[int] = None,
        dtype: Optional[torch.dtype] = None,
        device='cpu',
    ):
        share('PSKD', alpha=alpha)
        one_of('PSKD', ('bank', 'snapshot'), teacher=teacher)
        one_of('PSKD', MODES, teacher_mode=teacher_mode)
        super().__init__(loader)
        self.alpha, self.max_epochs, self.max_steps = alpha, max_epochs, max_steps
        self._check_length()
        self.bank: Optional[PredictionBank] = None
        self.teacher: Optional[SnapshotTeacher] = None
        self.cross_entropies = WeakSet()  # loss modules of tap() that have shown that they are
        if teacher == 'snapshot':
            if model is None:
                raise ValueError("PSKD: teacher='snapshot' copies the model: give it as model=")
            if (top_k, dtype or torch.float32, torch.device(device)) != (None, torch.float32, torch.device('cpu')):
                raise ValueError("PSKD: top_k, dtype and device are the bank's: remove them, or teacher='snapshot'")
            self.model = model
            self.teacher = SnapshotTeacher(unwrap(model), mode=teacher_mode)
            self._calls = Calls(self.teacher, outputs or (lambda output: output), type(unwrap(model)).__name__)
        else:
            if model is not None or outputs is not None or teacher_mode != 'train':
                raise ValueError("PSKD: model, outputs and teacher_mode are for teacher='snapshot': remove them")
            self.data.number('PSKD')
            self._bank = dict(top_k=top_k, dtype=dtype, device=device)
            if num_classes is not None:
                self._make_bank(num_classes)
        self.data.methods.append(self)
        self.current_alpha = 0.0  # of the epoch under way
        self.count = 0  # losses that were softened, or will be when there is a past
        self._rows: Optional[Tensor] = None
        self._inside = self._computing = False
        self._written = []

    def _check_length(self) -> None:
        """ValueError: the training ends before there is a past, or it is not known when it ends."""
        if (self.max_epochs is None) == (self.max_steps is None):
            raise ValueError(
                'PSKD: alpha grows up to the end of training: say when that is, by max_epochs= (loops over batches()) '
                f'or max_steps= (batches), got max_epochs={self.max_epochs} and max_steps={self.max_steps}'
            )
        if self.max_steps is None:
            if not (isinstance(self.max_epochs, int) and (self.max_epochs > 1 or self.alpha == 0)):
                raise ValueError(
                    f'PSKD: max_epochs must be a whole number from 2 on, got {self.max_epochs}: in the first epoch '
                    'there is no past, so that a single one is plain training'
                )
            self.data.check_epoch_ends('PSKD')
            return
        steps = self.data.count_steps('PSKD')
        if not (isinstance(self.max_steps, int) and (self.max_steps > steps or self.alpha == 0)):
            raise ValueError(
                f'PSKD: max_steps must be a whole number above {steps}, the batches of the first pass over the data, '
                f'got {self.max_steps}: in that pass there is no past, so that it is plain training'
            )

    def _make_bank(self, num_classes: int) -> None:
        options = {**self._bank, 'dtype': self._bank['dtype'] or torch.float32}
        self.bank = PredictionBank(len(self.data.loader.dataset), num_classes, **options)

    def loss(self, logits: Tensor, target: Tensor, **options) -> Tensor:
        """In place of ``F.cross_entropy(logits, target, **options)``, and with its options.

        Args:
            logits: ``[B, C]`` of the batch under way; with a snapshot also ``[B, C, ...]``.
            target: class ids ``[B, ...]``; with a snapshot also probs ``[B, C, ...]`` (mixed labels).
            options: ``weight``, ``ignore_index``, ``reduction``, ``label_smoothing`` as in
                :func:`torch.nn.functional.cross_entropy`.

        Raises:
            RuntimeError: outside ``batches()``, or (bank) for the second time in a batch.
            ValueError: logits that are not those of the batch.
        """
        past, seen = self._past_of(logits, target)
        self._computing = True  # a tap around this leaves alone what is computed here
        try:
            if past is None:
                return F.cross_entropy(logits, target, **options)
            alpha = self.current_alpha if seen is None else self.current_alpha * seen.to(logits.device)
            return pskd_cross_entropy(logits, target, past, alpha, **options)
        finally:
            self._computing = False

    def _past_of(self, logits: Tensor, target: Tensor):
        """What was predicted for the batch (None where nothing was, or where it does not count), and of which samples
        (None: of all); keeps what is predicted now."""
        if not self._inside:
            raise RuntimeError(
                'PSKD: the loss is for training, in a loop over pskd.batches(); for validation use the plain one. (A '
                "prefetcher that takes batches ahead goes inside: PSKD(prefetcher, teacher='snapshot', ...))"
            )
        self.used += 1
        self.count += 1
        return self._past_of_call(logits) if self.teacher is not None else self._past_of_rows(logits, target)

    def _past_of_call(self, logits: Tensor):
        if self.alpha == 0:
            return None, None
        call = self._calls.of(logits)
        shape = call.shape if call.past is None else call.past.shape
        if shape not in (None, logits.shape):
            raise ValueError(
                f'PSKD: the past model gives logits {tuple(shape)} for the inputs of the model, but the loss is of '
                f'{tuple(logits.shape)}: give the loss what the model gives, or set outputs='
            )
        return call.past, None

    def _past_of_rows(self, logits: Tensor, target: Tensor):
        rows = self._rows
        if self.bank is None:
            self._make_bank(logits.shape[1] if logits.dim() > 1 else 1)
        if self.used > 1:
            raise RuntimeError(
                'PSKD: a second loss in one batch: the bank keeps one prediction for each sample. Call the loss once, '
                "for the whole batch (further heads learn with the plain loss), or use teacher='snapshot'"
            )
        if logits.shape != (len(rows), self.bank.num_classes):
            raise ValueError(
                f'PSKD: the batch has {len(rows)} samples of {self.bank.num_classes} classes, so the bank wants logits '
                f'{(len(rows), self.bank.num_classes)}, got {tuple(logits.shape)}: for pixels, tokens, or samples that '
                "the loop repeats, use teacher='snapshot'"
            )
        if target.is_floating_point():
            raise ValueError(
                'PSKD: with probs as target samples may be mixed (Mixup, CutMix), and a prediction belongs to no '
                "single one: use teacher='snapshot', or class ids with label_smoothing="
            )
        self.bank.check_labels(rows, target, way_out=WAY_OUT)
        past, seen = self.bank.read(rows, return_seen=True)
        self.bank.write(rows, logits.detach().float().softmax(1))
        self._written.append((rows, self.data.step))
        if self.current_alpha == 0 or not seen.any():
            return None, None
        return past.to(logits.device, non_blocking=True), seen

    def tap(self, loss_module: Optional[nn.Module] = None, *, check: bool = True):
        """For code that cannot be edited: softens the cross-entropy that is computed inside.

        ::

            with pskd.tap():
                train_one_epoch(model, nn.CrossEntropyLoss(), optimizer, pskd.batches())

        With a snapshot, losses of other logits than the model's (an auxiliary head's) stay plain.

        Args:
            loss_module: by default every training call of :func:`torch.nn.functional.cross_entropy` is softened
                (``nn.CrossEntropyLoss`` calls it, too). With several losses, or one that is written another way, the
                module is given here. It is called with (logits, target). One that does not call torch's must be a
                cross-entropy in what it computes, a mean or a value for each sample, with any smoothing.
            check: False where less than a batch runs inside.

        Raises:
            RuntimeError: no loss was computed inside.
            ValueError: the module is no cross-entropy.
        """
        return tap(self, loss_module, check=check)

    def listens(self) -> bool:
        """Whether a cross-entropy that is computed now is training's."""
        return self._inside and not self._computing and torch.is_grad_enabled()

    def is_of_model(self, logits: Tensor) -> bool:
        """Whether logits can be those of the loss: with a snapshot those that come from its model."""
        return self.teacher is None or self.alpha == 0 or self._calls.knows(logits)

    # What Batches calls.

    def begin_epoch(self) -> bool:
        epoch = self.data.epoch
        done = epoch * self.data.steps_per_epoch if self.max_steps else epoch
        length = self.max_steps or self.max_epochs
        if done >= length and self.alpha:
            what = f'step {done + 1} of max_steps' if self.max_steps else f'epoch {epoch + 1} of max_epochs'
            raise ValueError(f'PSKD: {what}={length}: alpha is for that many')
        new = super().begin_epoch()
        self.synchronize()
        each = self.data.steps_per_epoch if self.max_steps else 1
        self.current_alpha = linear_growth(self.alpha, min((epoch + 1) * each / length, 1.0))
        self._inside = True
        if self.teacher is not None:
            if new and epoch:
                self._refresh()
            if self.alpha:
                self._calls.watch(self.model, teaches=epoch > 0)
        return new

    def _refresh(self) -> None:
        self.teacher.update(unwrap(self.model))
        if self.teacher.mode == 'eval' and world_size() > 1:  # batch norms' statistics differ between processes
            for buffer in self.teacher.model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def begin_step(self, rows: Optional[Tensor], partners, batch) -> None:
        super().begin_step(rows, partners, batch)
        self._rows = rows
        if self.teacher is not None:
            self._calls.forget()
            self.teacher.begin_step(self.data.step)

    def end_step(self) -> None:
        super().end_step()
        if self.teacher is not None:
            self._calls.forget()

    def end_epoch(self, finished: bool) -> None:
        self._inside = False
        if self.teacher is not None:
            self._calls.leave()
        super().end_epoch(finished)
        if finished:
            self.synchronize()

    def synchronize(self) -> None:
        """Makes the banks of all processes equal; an epoch ends with it. Call it in all of them before a checkpoint is
        saved in the middle of an epoch."""
        if self.bank is not None and world_size() > 1:
            none = torch.zeros(0, dtype=torch.long)
            indices = torch.cat([none, *(rows for rows, _ in self._written)])
            steps = torch.cat([none, *(torch.full_like(rows, step) for rows, step in self._written)])
            exchange_rows(self.bank, indices, steps)
        self._written = []

    def state_dict(self) -> dict:
        """What a checkpoint must hold beside the model: plain tensors and numbers. Saved within an epoch, the resumed
        run begins this epoch anew."""
        state = {'batches': self.data.state_dict()}
        if self.teacher is None:
            state['bank'] = self.bank.state_dict() if self.bank is not None else None
        elif self.data.epoch and self._begun == self.data.epoch:  # else the model's own weights are the next teacher
            state['teacher'] = {name: value.detach().cpu().clone() for name, value in self.teacher.state_dict().items()}
        return state

    def load_state_dict(self, state: dict) -> None:
        """Restores :meth:`state_dict`; load the model first.

        Raises:
            ValueError: the state is that of the other ``teacher``, or of a bank with other settings.
        """
        if ('bank' in state) != (self.teacher is None):
            kind = 'bank' if 'bank' in state else 'snapshot'
            raise ValueError(f"PSKD: the state is of teacher='{kind}': resume with the same teacher")
        self.data.load_state_dict(state['batches'])
        if state.get('bank') is not None:
            if self.bank is None:
                self._make_bank(state['bank']['num_classes'])
            self.bank.load_state_dict(state['bank'])
        if 'teacher' in state:
            self.teacher.load_state_dict(state['teacher'])
        self._begun = self.data.epoch if 'teacher' in state else None
        self._batches = self._plain = 0
