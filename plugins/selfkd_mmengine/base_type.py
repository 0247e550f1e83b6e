"""The class whose place FRSKD's type takes in a config: a user's own one would be lost without a word."""

from typing import List, Union

from mmengine.registry import Registry

__all__ = ['derived_from', 'find_base_type']

TOOLKITS = ('mmpretrain', 'mmdet', 'mmseg')  # what else is made from the class there is known


def find_base_type(ours: type, given: Union[str, type, None], plain: type, registry: Registry, option: str) -> type:
    """The class that a config had before its type was set to ours.

    Setting the type replaces what was there, which nobody sees any more. So it is asked for where it may have been
    another than the toolkit's own: where a class that is not the toolkit's has been registered.

    Args:
        ours: the class that took its place.
        given: what the config says: a registered name, or a class.
        plain: the toolkit's own class, the usual answer.
        registry: of the toolkit.
        option: where the config says it, for the messages.

    Raises:
        ValueError: nothing is given although there are others, or no such class.
    """
    if given is not None:
        kind = registry.get(given) if isinstance(given, str) else given
        if not (isinstance(kind, type) and issubclass(kind, plain)):
            raise ValueError(
                f'{ours.__name__}: {option} must name {plain.__name__} or a class made from it, got {given}'
            )
        return kind
    others = sorted({kind.__name__ for kind in _registered(registry) if _is_foreign(kind, ours, plain)})
    if others:
        raise ValueError(
            f'{ours.__name__}: it takes the place of the type that the config had, and there are classes made from '
            f"{plain.__name__} here that are not the toolkit's: {', '.join(others)}. What such a class does would be "
            f"lost without a word: set {option} to the type that the config had, '{others[0]}' or '{plain.__name__}'"
        )
    return plain


def derived_from(ours: type, base: type) -> type:
    """Our class on top of another base."""
    if issubclass(ours, base):
        return ours
    return type(f'{ours.__name__}Of{base.__name__}', (ours, base), {'__module__': ours.__module__})


def _registered(registry: Registry) -> List[type]:
    """All classes of the toolkit's registry, of those it is a child of, and of their other children."""
    while registry.parent is not None:
        registry = registry.parent
    registries = [registry]
    for each in registries:
        registries += each.children.values()
    return [kind for each in registries for kind in each.module_dict.values() if isinstance(kind, type)]


def _is_foreign(kind: type, ours: type, plain: type) -> bool:
    package = kind.__module__.split('.')[0]
    if package in TOOLKITS or package.startswith('selfkd_'):
        return False
    return issubclass(kind, plain) and not issubclass(kind, ours)
