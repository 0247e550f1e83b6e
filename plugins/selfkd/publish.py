"""What remains of a training checkpoint for inference."""

import re
from typing import Dict, Optional, Sequence

from torch import Tensor, nn

from .checks import positive
from .cli import command_parser, refusing
from .files import load, save
from .teacher import SELF_TEACHER

__all__ = ['publish_checkpoint', 'strip_self_teacher']

BYOT = re.compile(r'^((?:.*\.)?auxiliary)\.(branches|fcs)\.')  # what BYOTClsHead keeps for training
WEIGHTS = ('state_dict', 'model')  # where mmengine and Detectron2 keep them
META = (
    'dataset_meta',
    'epoch',
    'iter',
    'mmengine_version',
)  # what OpenMMLab's init_model and the like read, and whence


def strip_self_teacher(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The weights that inference uses: without what our methods added for training, at any depth.

    That is every sub-module named ``self_teacher``, and BYOT's ``auxiliary``. Another module of that name stays.

    Example:
        >>> sorted(strip_self_teacher({'head.fc.bias': Tensor(), 'self_teacher.fc.bias': Tensor()}))
        ['head.fc.bias']
    """
    found = [match for match in map(BYOT.match, state_dict) if match]
    branches, classifiers = ({match[1] for match in found if match[2] == part} for part in ('branches', 'fcs'))
    byot = tuple(f'{name}.' for name in branches & classifiers)
    return {
        name: value
        for name, value in state_dict.items()
        if SELF_TEACHER not in name.split('.') and not name.startswith(byot)
    }


def publish_checkpoint(source: str, target: str, *, temperature: Optional[float] = None) -> int:
    """Writes a checkpoint with what inference needs only; returns the number of weights that were dropped.

    Args:
        source: a checkpoint of mmengine's runner or of Detectron2's trainer, or a state dict. Load only files you
            trust: it is unpickled.
        target: the file to write: the weights under the same key, and the names of the classes where the source has
            them. It loads with ``torch.load(..., weights_only=True)``, strictly into the vanilla config, and with
            the toolkit's own ``init_model``, ``init_detector``, ``get_model`` or ``DetectionCheckpointer``. It is
            written beside and moved into place whole, so a full disk or Ctrl-C leaves what was there, ``source``
            itself included.
        temperature: what logits are to be divided by ([`selfkd.metrics.fit_temperature`][]); stored as
            ``meta['temperature']``. No toolkit reads it: the weights and their predictions stay as they are.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the file is no checkpoint, or the temperature is not above 0.
    """
    checkpoint = load(source)
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{source}: {_no_state_dict(checkpoint)}')
    key = next((key for key in WEIGHTS if isinstance(checkpoint.get(key), (dict, nn.Module))), None)
    state = checkpoint if key is None else checkpoint[key]
    if not isinstance(state, dict):
        raise ValueError(f'{source}: under {key!r} it {_no_state_dict(state)}')
    meta = checkpoint.get('meta', {})
    if not isinstance(meta, dict):
        raise ValueError(f"{source}: its 'meta' must be a dict, got {type(meta).__name__}")
    weights = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not weights:
        raise ValueError(f'{source}: holds no weights, neither under {" or ".join(WEIGHTS)} nor as a state dict itself')
    for name in state:
        if not isinstance(name, str) or name not in weights and (key or name != 'meta'):
            raise ValueError(f'{source}: not a state dict, its entry {name!r} is of type {type(state[name]).__name__}')
    kept = strip_self_teacher(weights)
    meta = {name: _plain(value) for name, value in meta.items() if name in META}
    if temperature is not None:
        positive('publish_checkpoint', temperature=temperature)
        meta['temperature'] = float(temperature)
    save({'meta': meta, key or 'state_dict': kept}, target)
    return len(weights) - len(kept)


def _no_state_dict(value: object) -> str:
    module = ': load it in a program of yours, and save its state_dict()' if isinstance(value, nn.Module) else ''
    return f'holds a {type(value).__name__} instead of a checkpoint or a state dict{module}'


def _plain(value: object) -> object:
    """Dicts, lists, texts and numbers for arrays and whatever else they came as, so that any torch.load takes it."""
    if isinstance(value, dict):
        return {_plain(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return (tuple if isinstance(value, tuple) else list)(map(_plain, value))
    if value is None or type(value) in (bool, int, float, str):
        return value
    return value.tolist() if hasattr(value, 'tolist') else str(value)


def main(arguments: Sequence[str]) -> None:
    """Writes what inference needs of a training checkpoint: the weights, without FRSKD's self-teacher.

        selfkd publish work_dirs/frskd/epoch_200.pth frskd_resnet18.pth [--temperature 1.4]

    The result loads strictly into the plain model's config and gives the same predictions.
    """
    parser = command_parser('publish', main.__doc__)
    parser.add_argument(
        'checkpoint', help='a checkpoint of mmengine or Detectron2 (only files you trust: it is unpickled)'
    )
    parser.add_argument('out', help='the file to write')
    parser.add_argument(
        '--temperature',
        type=float,
        help="stored as meta['temperature'], what logits are to be divided by (selfkd report)",
    )
    args = parser.parse_args(arguments)
    with refusing(parser):
        dropped = publish_checkpoint(args.checkpoint, args.out, temperature=args.temperature)
    print(f'{args.out}: dropped {dropped} tensors that are for training only, and the optimizer')
