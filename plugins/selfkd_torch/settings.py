"""How long a training is, in a loop of one's own, in Lightning and in the Trainer."""

from typing import Optional

from selfkd.options import refuse_without_past

from .batches import Batches, length_of

__all__ = ['steps_of']


def steps_of(
    data: Batches, alpha: float, interval: Optional[int], max_epochs: Optional[int], max_steps: Optional[int]
) -> Optional[int]:
    """How many steps the training takes, which ``data`` count from now on; None where epochs are counted.

    Raises:
        ValueError: the training ends before there is a past, or it is not known when it ends.
    """
    lengths = [length for length in (max_epochs, max_steps) if length is not None]
    if len(lengths) != 1 or not isinstance(lengths[0], int):
        raise ValueError(
            'PSKD: alpha grows up to the end of training: say when that is, by max_epochs= (loops over batches()) or '
            f'max_steps= (batches), got max_epochs={max_epochs} and max_steps={max_steps}'
        )
    first, unit, period_is, way_out = 1, 'epochs', 'a loop over batches()', 'raise max_epochs'
    if interval:
        if max_steps is None:
            each = length_of(data.loader)
            if each is None:
                raise ValueError('PSKD: interval= counts steps, and the loader has no length: give max_steps=')
            assert max_epochs is not None  # one of the two was given
            max_steps = max_epochs * each
        first, unit, period_is, way_out = interval, 'steps', 'interval=', 'lower interval'
        data.steps_per_epoch = interval
    elif max_steps is not None:
        first, unit, period_is, way_out = data.count_steps('PSKD'), 'steps', 'a pass over the data', 'raise max_steps'
    else:
        data.check_epoch_ends('PSKD')
    if alpha != 0:
        total = max_epochs if max_steps is None else max_steps
        assert total is not None
        refuse_without_past('PSKD', first, total, unit, period_is=period_is, way_out=way_out)
    return max_steps
