"""Copies to the host. Most test runs have no accelerator, so one is pretended: what matters is the event's stream."""

import torch

from selfkd.transfer import to_host


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on the second GPU."""

    is_cuda = property(lambda self: True)
    device = property(lambda self: torch.device('cuda:1'))


def test_the_event_is_of_the_tensors_own_device_not_of_the_current_one(monkeypatch):
    recorded, empty = [], torch.empty

    class Event:
        def record(self, stream):
            recorded.append(stream)

    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device=None: f'stream of {device}')
    monkeypatch.setattr(torch, 'empty', lambda *args, pin_memory, **kwargs: empty(*args, **kwargs))
    values = torch.rand(3).as_subclass(OnGpu)
    (copy,), event = to_host(values)
    assert recorded == ['stream of cuda:1']
    assert isinstance(event, Event)
    assert copy.tolist() == values.tolist()


def test_on_the_cpu_there_is_nothing_to_wait_for():
    (copy,), event = to_host(torch.ones(2))
    assert copy.tolist() == [1, 1]
    assert event is None
