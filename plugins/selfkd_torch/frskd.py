"""FRSKD in a training loop of your own."""

import logging
from functools import partial, reduce
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfkd.checks import at_least_zero, positive
from selfkd.losses import frskd_loss
from selfkd.pyramid import SelfTeacherPyramid, dry_run
from selfkd.teacher import unwrap

from .batches import Batches, Method
from .calls import Hook, origins, recomputes
from .tap import add_terms

__all__ = ['FRSKD', 'FRSKDOfBatches']

logger = logging.getLogger(__name__)

MAX_LAYERS = 4  # finer maps cost most and say least of the class
PASSES = 8  # through the model, that wait for their losses
IDLE = 500  # losses after which the self-teacher must have learnt something


class FRSKD:
    """Feature refinement via self-knowledge distillation: a pyramid on the model's own feature maps teaches it.

    Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via Self-Knowledge Distillation", CVPR 2021
    https://arxiv.org/abs/2103.08273

    The self-teacher is no part of the model: it is not in ``model.state_dict()``, and evaluation does not run it. Its
    parameters are the optimizer's::

        frskd = FRSKD(model, layers=['layer1', 'layer2', 'layer3', 'layer4'], num_classes=100)
        optimizer = torch.optim.SGD([*model.parameters(), *frskd.parameters()], lr=0.1)
        ...
        loss = frskd.loss(model(images), labels)

    The layers have forward hooks, which do nothing in copies of the model (``copy.deepcopy``, ``torch.save(model)``).
    Where the model itself must have none (``torch.jit.script``), ``remove_hooks`` takes them off, and
    ``add_hooks`` puts them back.

    With several processes make it after the process group: gradients of the self-teacher are averaged over them.

    Args:
        model: the module that the loop calls.
        layers: names of the sub-modules whose outputs are the feature maps, fine to coarse, two or more. By default the
            last sub-modules that give a map of each size, the coarsest four, found by a dry run on the example.
        num_classes: C. By default what the dry run gives.
        alpha: weight of the KL from the self-teacher, at least 0.
        beta: weight of the attention transfer, at least 0.
        temperature: T.
        example: a batch of inputs, from which the channels of the maps are read. Defaults to one image of zeros,
            3 x 224 x 224.
        width, depth, repeats: of [`selfkd.pyramid.SelfTeacherPyramid`][].

    ``logs`` of the latest loss, tensors ``[]``: ``loss_teacher`` (the self-teacher on the labels), ``loss_kd`` and,
    with beta, ``loss_feature``, with their weights: they sum to ``term``.

    Raises:
        ValueError: for names that are not sub-modules, and outputs that are not maps from fine to coarse.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Optional[Sequence[str]] = None,
        num_classes: Optional[int] = None,
        *,
        alpha: float = 2.0,
        beta: float = 100.0,
        temperature: float = 4.0,
        example: Optional[Tensor] = None,
        width: int = 2,
        depth: int = 2,
        repeats: int = 1,
    ):
        at_least_zero('FRSKD', alpha=alpha, beta=beta)
        positive('FRSKD', temperature=temperature)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.logs: Dict[str, Tensor] = {}
        inner = unwrap(model)
        self._compiled = inner is not model or getattr(model, '_compiled_call_impl', None) is not None
        modules, device = dict(inner.named_modules()), next(inner.parameters()).device
        example = torch.zeros(1, 3, 224, 224) if example is None else example
        example = example.to(device)
        self.layers = _found_layers(inner, example) if layers is None else list(layers)
        missing = [name for name in self.layers if name not in modules]
        if missing or len(self.layers) < 2:
            raise ValueError(
                f'FRSKD: layers must name two or more sub-modules of {type(inner).__name__}; not there: {missing}; '
                f'its own are {[name for name, _ in inner.named_children()]}'
            )
        self._modules = [modules[name] for name in self.layers]
        self._hooks: List = []
        self._feats: List[Tuple[str, Tensor]] = []  # what the layers gave since the last loss, oldest first
        self._settled = False  # whether there was a loss since the last pass
        self.add_hooks()
        shapes, logits = self._dry_run(inner, example)
        num_classes = num_classes or logits
        if num_classes is None:
            raise ValueError(f'FRSKD: {type(inner).__name__} gives no logits [B, C] by themselves: give num_classes=')
        self.self_teacher = SelfTeacherPyramid(
            [shape[1] for shape in shapes], num_classes, width=width, depth=depth, repeats=repeats
        ).to(device)
        self._losses, self._begun_with = 0, torch.zeros(())  # what the self-teacher was at the first of them
        self._pyramid: nn.Module = self.self_teacher
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._pyramid = nn.parallel.DistributedDataParallel(self.self_teacher, broadcast_buffers=False)

    def _dry_run(self, model: nn.Module, example: Tensor) -> Tuple[list, Optional[int]]:
        """Shapes of the maps, and the number of classes, if it shows."""
        output = _run(model, example)
        logits = output.get('logits') if isinstance(output, dict) else output
        feats = dict(self._feats)
        self._feats.clear()
        shapes = [tuple(feats[name].shape) if name in feats else () for name in self.layers]
        sides = [shape[-1] for shape in shapes if len(shape) == 4]
        if len(sides) < len(shapes) or any(coarse > fine for fine, coarse in zip(sides, sides[1:])):
            raise ValueError(
                'FRSKD: layers must give feature maps [B, C, H, W], fine to coarse, got '
                + ', '.join(f'{name}: {shape}' for name, shape in zip(self.layers, shapes))
            )
        return shapes, logits.shape[1] if isinstance(logits, Tensor) and logits.dim() == 2 else None

    def add_hooks(self) -> None:
        """Has the layers' outputs kept, as they are from the beginning on."""
        self.remove_hooks()
        self._hooks = [
            module.register_forward_hook(Hook(partial(self._keep, name)))
            for module, name in zip(self._modules, self.layers)
        ]

    def remove_hooks(self) -> None:
        """Takes the hooks off the model: after training, or for ``torch.jit.script``."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._feats.clear()

    def _keep(self, name: str, module: nn.Module, args, output) -> None:
        if torch.is_grad_enabled() and isinstance(output, Tensor) and not recomputes():
            if self._settled or len(self._feats) >= PASSES * len(self.layers):
                self._feats.clear()
                self._settled = False
            self._feats.append((name, output))

    def _take_maps(self, logits: Tensor) -> List[Tensor]:
        """The maps of the pass that logits come from. RuntimeError: there is none, or it is not known which."""
        passes: List[Dict[str, Tensor]] = [{}]
        for name, output in self._feats:
            if name in passes[-1]:
                passes.append({})
            passes[-1][name] = output
        whole = [feats for feats in passes if len(feats) == len(self.layers)]
        if not whole:
            hint = 'call the model, with gradients, then the loss'
            if not self._hooks:
                hint = 'remove_hooks() was called: add_hooks() puts them back'
            elif self._compiled:
                hint += ' (a compiled model that was called before FRSKD was made does not see it: make FRSKD first)'
            raise RuntimeError(
                f'FRSKD: {[n for n in self.layers if n not in passes[-1]]} did not run since the last loss: {hint}. In '
                'checkpoint(..., use_reentrant=True) layers run without gradients: set use_reentrant=False'
            )
        if len(whole) > 1:
            nodes = {feat.grad_fn: feats for feats in whole for feat in feats.values() if feat.grad_fn is not None}
            found = {id(nodes[node]) for node in origins((logits.grad_fn, logits.output_nr), nodes)}
            fitting = [feats for feats in whole if id(feats) in found]
            if len(fitting) != 1:
                raise RuntimeError(
                    f'FRSKD: of {len(whole)} passes through the model since the last loss, the logits come from '
                    f'{len(fitting)}: call the loss with the logits of one pass, at once after it'
                )
            whole = fitting
        taken = {id(feat) for feat in whole[0].values()}
        self._feats = [(name, feat) for name, feat in self._feats if id(feat) not in taken]
        self._settled = True
        return [whole[0][name] for name in self.layers]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The self-teacher's, for the optimizer."""
        return self.self_teacher.parameters()

    def loss(self, logits: Tensor, target: Tensor, **options) -> Tensor:
        """``F.cross_entropy(logits, target, **options)`` plus ``term``."""
        return F.cross_entropy(logits, target, **options) + self.term(logits, target, **options)

    def term(self, logits: Tensor, target: Tensor, **options) -> Tensor:
        """What FRSKD adds to a loss: the self-teacher's cross-entropy, and what the model learns from it.

        Args:
            logits: of one of the model's calls in training since the last loss, ``[B, C]``.
            target: class ids ``[B]`` or probs ``[B, C]``.
            options: of the self-teacher's cross-entropy.

        Raises:
            RuntimeError: the layers were not run since the last loss, or it is not known in which pass.
        """
        feats = self._take_maps(logits)
        self._warn_if_idle()
        self._pyramid.train()
        refined, teacher_logits = self._pyramid(feats)
        options_of: Dict[str, Any] = dict(alpha=self.alpha, beta=self.beta, temperature=self.temperature)
        terms = frskd_loss(logits, teacher_logits, feats, refined, None, **options_of)
        terms = {'loss_teacher': F.cross_entropy(teacher_logits, target, **options), **terms}
        self.logs = {name: term.detach().mean() if term.dim() else term.detach() for name, term in terms.items()}
        return reduce(torch.add, terms.values())

    def _warn_if_idle(self) -> None:
        """By values: some optimizers change weights behind autograd's back."""
        if self._losses == 0:
            self._begun_with = self.self_teacher.fc.weight.detach().clone()
        self._losses += 1
        if self._losses == IDLE and torch.equal(self._begun_with, self.self_teacher.fc.weight):
            logger.warning(
                'FRSKD: the weights of the self-teacher are the initial ones after %d losses, so it teaches nothing: '
                'has the optimizer its parameters, [*model.parameters(), *frskd.parameters()]?',
                IDLE,
            )

    def state_dict(self) -> dict:
        """The self-teacher's weights, for a checkpoint that training goes on from."""
        return self.self_teacher.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.self_teacher.load_state_dict(state)
        self._losses = 0


class FRSKDOfBatches(Method):
    """[`FRSKD`][] for a loop that is not ours: an epoch of batches without it is an error."""

    name, call = 'FRSKD', 'a cross-entropy'
    way_in = 'training must compute torch.nn.functional.cross_entropy'
    learns_labels, tap = True, add_terms

    def __init__(self, data: Batches, frskd: FRSKD):
        super().__init__(data)
        self.data.methods.append(self)
        self.frskd = frskd

    def term(self, logits: Tensor, target: Tensor, **options) -> Tensor:
        self.used += 1
        return self.frskd.term(logits, target, **options)

    @property
    def logs(self) -> Dict[str, Tensor]:
        return self.frskd.logs

    def state_dict(self) -> dict:
        return self.frskd.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.frskd.load_state_dict(state)


def _run(model: nn.Module, example: Tensor) -> Any:
    try:
        with torch.enable_grad(), dry_run(model):
            return model(example)
    except Exception as problem:
        raise ValueError(
            f'FRSKD: {type(model).__name__} does not take {tuple(example.shape)}: give a batch of its inputs as '
            f'example= ({problem})'
        ) from problem


def _found_layers(model: nn.Module, example: Tensor) -> List[str]:
    """The last sub-module that gives a feature map of each size, fine to coarse."""
    outputs: List[Tuple[str, Any]] = []

    def note(name: str) -> Callable:
        return lambda module, args, output: outputs.append((name, output))

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        _run(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    names, found = [name for name, _ in outputs], {}
    for name, output in outputs:
        if isinstance(output, Tensor) and output.dim() == 4 and names.count(name) == 1 and output[0, 0].numel() > 1:
            found[output.shape[2:].numel()] = name
    if len(found) < 2:
        raise ValueError(
            f'FRSKD: the self-teacher is a pyramid on feature maps [B, C, H, W] of two sizes or more, and the modules '
            f'of {type(model).__name__} give {len(found)} for {tuple(example.shape)} (ViTs and their like have none): '
            'name modules as layers=, or use CSKD or PSKD'
        )
    return [found[size] for size in sorted(found, reverse=True)][-MAX_LAYERS:]
