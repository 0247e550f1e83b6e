"""PS-KD in a training loop of your own."""

import inspect
from contextlib import contextmanager
from typing import Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from selfkd.bank import PredictionBank
from selfkd.bank_sync import exchange_rows
from selfkd.checks import one_of, share
from selfkd.losses import pskd_cross_entropy, soft_cross_entropy
from selfkd.schedule import linear_growth
from selfkd.teacher import MODES, SnapshotTeacher

from .batches import Batches, unwrap

__all__ = ['PSKD']


class PSKD:
    """Progressive self-knowledge distillation: three lines in a loop that stays as it is.

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021
    https://arxiv.org/abs/2006.12000

    Args:
        loader: the DataLoader of the training set, or another method's ``batches()``.
        num_classes: C; for the bank. By default it is seen at the first loss.
        alpha: final share of the past prediction in the target, in [0, 1]; it grows linearly, by epochs. Defaults to
            0.8, the paper's.
        max_epochs: how many epochs the whole training takes.
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

    def __init__(
        self,
        loader,
        num_classes: Optional[int] = None,
        *,
        alpha: float = 0.8,
        max_epochs: int,
        teacher: str = 'bank',
        model: Optional[nn.Module] = None,
        outputs: Optional[Callable] = None,
        teacher_mode: str = 'train',
        top_k: Optional[int] = None,
        dtype: torch.dtype = torch.float32,
        device='cpu',
    ):
        share('PSKD', alpha=alpha)
        one_of('PSKD', ('bank', 'snapshot'), teacher=teacher)
        one_of('PSKD', MODES, teacher_mode=teacher_mode)
        if not (isinstance(max_epochs, int) and (max_epochs > 1 or alpha == 0)):
            raise ValueError(
                f'PSKD: max_epochs must be a whole number from 2 on, got {max_epochs}: in the first epoch there is no '
                'past, so that a single one is plain training'
            )
        self.alpha, self.max_epochs = alpha, max_epochs
        self.data = loader if isinstance(loader, Batches) else Batches(loader)
        self.bank: Optional[PredictionBank] = None
        self.teacher: Optional[SnapshotTeacher] = None
        if teacher == 'snapshot':
            if model is None:
                raise ValueError("PSKD: teacher='snapshot' copies the model: give it as model=")
            if (top_k, dtype, device) != (None, torch.float32, 'cpu'):
                raise ValueError("PSKD: top_k, dtype and device are the bank's: remove them, or teacher='snapshot'")
            self.model, self._outputs = model, outputs or (lambda output: output)
            self.teacher = SnapshotTeacher(unwrap(model), mode=teacher_mode)
        else:
            if model is not None or outputs is not None or teacher_mode != 'train':
                raise ValueError("PSKD: model, outputs and teacher_mode are for teacher='snapshot': remove them")
            self.data.number('PSKD')
            self._bank = dict(top_k=top_k, dtype=dtype, device=device)
            if num_classes is not None:
                self._make_bank(num_classes)
        if any(isinstance(method, PSKD) for method in self.data.methods):
            raise ValueError('PSKD: these batches have a PSKD already: one is enough')
        self.data.methods.append(self)
        self.current_alpha = 0.0  # of the epoch under way
        self._rows, self._past, self._softened, self._count = None, None, 0, 0
        self._inside = self._ready = self._computing = False
        self._resumed: Optional[int] = None  # the epoch that the restored teacher is for
        self._hook, self._written = None, []

    def _make_bank(self, num_classes: int) -> None:
        self.bank = PredictionBank(len(self.data.loader.dataset), num_classes, **self._bank)

    def batches(self) -> Batches:
        """The loader's own batches; iterate over it once in every epoch."""
        return self.data

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
                'PSKD: the loss is for training, in a loop over pskd.batches(); for validation use the plain one'
            )
        self._softened += 1
        if self.teacher is not None:
            if not (self._ready and self.current_alpha > 0):
                return None, None
            past = self._past
            if past is None:
                raise RuntimeError(
                    f'PSKD: the {type(unwrap(self.model)).__name__} given as model= was not called before the loss, so '
                    'its past copy was not either: give the module that the loop calls'
                )
            if past.shape != logits.shape:
                raise ValueError(
                    f'PSKD: the past model gave logits {tuple(past.shape)} for the last inputs of the model, but the '
                    f'loss is of {tuple(logits.shape)}: call the model, then the loss, or set outputs='
                )
            return past, None
        rows = self._rows
        if self.bank is None:
            self._make_bank(logits.shape[1] if logits.dim() > 1 else 1)
        if self._softened > 1:
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
        past, seen = self.bank.read(rows, return_seen=True)
        self.bank.write(rows, logits.detach().float().softmax(1))
        self._written.append((rows, self.data.step))
        if self.current_alpha == 0 or not seen.any():
            return None, None
        return past.to(logits.device, non_blocking=True), seen

    @contextmanager
    def tap(self, loss_module: Optional[nn.Module] = None, *, check: bool = True):
        """For code that cannot be edited: softens the cross-entropy that is computed inside.

        ::

            with pskd.tap():
                train_one_epoch(model, nn.CrossEntropyLoss(), optimizer, pskd.batches())

        Args:
            loss_module: by default every training call of :func:`torch.nn.functional.cross_entropy` is softened
                (``nn.CrossEntropyLoss`` calls it, too). A loss that is written another way is given here: a module that
                is called with (logits, target), gives a mean or a value for each sample, and is linear in its
                target, as label smoothing is.
            check: False where less than a batch runs inside.

        Raises:
            RuntimeError: no loss was computed inside.
        """
        before = self._count
        if loss_module is None:
            with _Softened(self):
                yield
        else:
            handle = loss_module.register_forward_hook(self._soften)
            try:
                yield
            finally:
                handle.remove()
        if check and self._count == before:
            raise RuntimeError(
                'PSKD: no training loss was computed inside tap(), so it was plain training: give the loss module, '
                'tap(criterion), or call pskd.loss(logits, target)'
            )

    def _soften(self, module: nn.Module, args, output: Tensor) -> Tensor:
        if not (self._inside and torch.is_grad_enabled()):
            return output
        logits, target = args[:2]
        past, seen = self._past_of(logits, target)
        if past is None:
            return output
        if seen is not None and not seen.all():  # a sample without a past learns its label alone
            past = torch.where(seen.to(past.device)[:, None], past, F.one_hot(target, past.shape[1]).to(past.dtype))
        soft = soft_cross_entropy(logits, past, reduction='none' if output.dim() else 'mean')
        return output + self.current_alpha * (soft - output)

    # What Batches calls.

    def begin_epoch(self) -> None:
        epoch = self.data.epoch
        if epoch >= self.max_epochs and self.alpha:
            raise ValueError(f'PSKD: epoch {epoch + 1} of max_epochs={self.max_epochs}: alpha is for that many')
        self.synchronize()
        self.current_alpha = linear_growth(self.alpha, min((epoch + 1) / self.max_epochs, 1.0))
        self._inside, self._first = True, True
        if self.teacher is None:
            return
        if epoch and self._resumed != epoch:
            self.teacher.update(unwrap(self.model))
            if self.teacher.mode == 'eval' and _world_size() > 1:  # batch norms' statistics differ between processes
                for buffer in self.teacher.model.buffers():
                    torch.distributed.broadcast(buffer, 0)
        self._ready, self._resumed = epoch > 0, None
        inner = self.model.module if isinstance(self.model, nn.parallel.DistributedDataParallel) else self.model
        self._hook = inner.register_forward_pre_hook(_Predict(self), with_kwargs=True)

    def begin_step(self, rows: Optional[Tensor], partners) -> None:
        self._rows, self._past, self._softened = rows, None, 0
        if self.teacher is not None:
            self.teacher.begin_step(self.data.step)

    def end_step(self) -> None:
        self._count += self._softened
        if self._first and not self._softened:
            raise RuntimeError(
                'PSKD: a batch was trained on without pskd.loss(logits, target), so with the plain loss: use it in '
                'place of the cross-entropy, or pskd.tap() around code that cannot be edited'
            )
        self._first, self._past = False, None

    def end_epoch(self, finished: bool) -> None:
        self._inside = False
        if self._hook is not None:
            self._hook.remove()
        if finished:
            self.synchronize()

    def synchronize(self) -> None:
        """Makes the banks of all processes equal; an epoch ends with it. Call it in all of them before a checkpoint is
        saved in the middle of an epoch."""
        if self.bank is not None and _world_size() > 1:
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
        elif self._inside and self._ready:  # between epochs the model's own weights are the next teacher
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
        elif 'teacher' in state:
            self.teacher.load_state_dict(state['teacher'])
            self._resumed = self.data.epoch


class _Predict:
    """Runs the past model on what the model is called with, under the same autocast."""

    def __init__(self, pskd: Optional[PSKD]):
        self.pskd = pskd

    def __call__(self, module: nn.Module, args, kwargs) -> None:
        pskd = self.pskd
        if pskd is not None and pskd._ready and pskd.current_alpha > 0 and torch.is_grad_enabled():
            logits = pskd._outputs(pskd.teacher(*args, **kwargs))
            pskd._past = logits.float().softmax(1)

    def __deepcopy__(self, memo) -> '_Predict':
        return _Predict(None)  # an averaged copy of the model has no past model


class _Softened(TorchFunctionMode):
    """Softens the targets of torch's cross-entropy while gradients are computed."""

    def __init__(self, pskd: PSKD):
        super().__init__()
        self.pskd = pskd

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        pskd = self.pskd
        if function is not F.cross_entropy or pskd._computing or not (pskd._inside and torch.is_grad_enabled()):
            return function(*args, **kwargs)
        call = inspect.signature(F.cross_entropy).bind(*args, **kwargs).arguments
        kept = {name: call[name] for name in ('weight', 'ignore_index', 'reduction', 'label_smoothing') if name in call}
        return pskd.loss(call['input'], call['target'], **kept)


def _world_size() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1
