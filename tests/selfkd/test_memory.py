"""What memory is free for a table: the machine's, a container's, and shared with the other processes."""

import pytest
import torch

from selfkd import memory
from selfkd.memory import free_memory, left_by_cgroups, processes_sharing

CPU = torch.device('cpu')


def test_free_memory_is_that_of_this_machine():
    free = free_memory(CPU)
    assert free is None or 2**20 < free < 2**50


def test_free_memory_is_what_a_container_leaves(monkeypatch):
    monkeypatch.setattr(memory, 'left_by_cgroups', lambda: [3 * 10**6, 10**6])
    assert free_memory(CPU) == 10**6


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f'memory.{name}').write_text(f'{text}\n')


def test_v2_groups_and_those_above_them(tmp_path):
    group(tmp_path / 'job', max=1000, current=700, stat='anon 300\ninactive_file 100\nactive_file 50')
    group(tmp_path / 'job' / 'step', max='max', current=700, stat='inactive_file 0')
    (tmp_path / 'of_process').write_text('0::/job/step\n')
    assert list(left_by_cgroups(tmp_path, tmp_path / 'of_process')) == [450]


def test_v1_groups_in_a_container_that_is_told_its_name_outside(tmp_path):
    group(tmp_path / 'memory', limit_in_bytes=1000, usage_in_bytes=900, stat='total_inactive_file 20')
    (tmp_path / 'of_process').write_text('5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n')
    assert list(left_by_cgroups(tmp_path, tmp_path / 'of_process')) == [120]


def test_no_groups(tmp_path):
    assert list(left_by_cgroups(tmp_path, tmp_path / 'absent')) == []


@pytest.mark.parametrize(('local', 'gpus', 'expected'), [('4', 8, 4), (None, 8, 8), (None, 0, 16), ('several', 2, 2)])
def test_processes_of_one_machine_share_its_memory(monkeypatch, local, gpus, expected):
    assert processes_sharing(CPU) == 1  # training in one process
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda: 16)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
    if local is not None:
        monkeypatch.setenv('LOCAL_WORLD_SIZE', local)
    assert processes_sharing(CPU) == expected
    assert processes_sharing(torch.device('cuda')) == 1  # each has its own
