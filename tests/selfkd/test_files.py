"""Files are written whole or not at all, and what cannot be read or written is named."""

import os
import stat

import pytest
import torch

from selfkd.files import load, output_folder, replacing, save


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def interrupted(beside, error):
    beside.write_text('half of the n')
    raise error


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / 'table.md'
    for old in (None, 'old'):
        if old:
            path.write_text(old)
        with pytest.raises(type(error)), replacing(path) as beside:
            interrupted(beside, error)
        assert names(tmp_path) == (['table.md'] if old else [])
    assert path.read_text() == 'old'


def test_a_whole_write_takes_the_place_of_what_a_link_points_to_with_its_permissions(tmp_path):
    (tmp_path / 'there').mkdir()
    path, link = tmp_path / 'there/runs.csv', tmp_path / 'link.csv'
    path.write_text('old')
    path.chmod(0o640)
    link.symlink_to(path)
    with replacing(link) as beside:
        assert (beside.parent, beside.suffix) == (path.parent, '.csv')  # moved within a file system
        beside.write_text('new')
    assert link.is_symlink()
    assert path.read_text() == 'new'
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with replacing(os.devnull) as beside:
        beside.write_text('nothing is moved onto a device')
    assert not os.path.isfile(os.devnull)


def test_what_cannot_be_written_is_named_before_the_work(tmp_path):
    (tmp_path / 'file').write_text('')
    for path, error in (
        (tmp_path / 'none/table.md', FileNotFoundError),
        (tmp_path / 'file/table.md', NotADirectoryError),
        (tmp_path, IsADirectoryError),
        ('/proc/table.md', OSError),
    ):
        with pytest.raises(error, match=str(path)), replacing(path):
            raise AssertionError('nothing to do')
    with pytest.raises(OSError, match='file'):
        output_folder(tmp_path / 'file')
    with pytest.raises(OSError, match='/proc'):
        output_folder('/proc/report')
    assert names(output_folder(tmp_path / 'new/folder')) == []


def test_an_unfinished_save_leaves_the_old_checkpoint_and_is_named(tmp_path, monkeypatch):
    path = tmp_path / 'epoch_1.pth'
    save({'weight': torch.ones(2)}, path)

    def full_disk(value, beside):
        beside.write_bytes(b'half')
        raise RuntimeError('[enforce fail at inline_container.cc:424] . unexpected pos 512 vs 406')

    monkeypatch.setattr(torch, 'save', full_disk)
    with pytest.raises(OSError, match=r'epoch_1.pth: could not be written: .* unexpected pos'):
        save({'weight': torch.zeros(2)}, path)
    assert load(path)['weight'].tolist() == [1, 1]
    assert names(tmp_path) == ['epoch_1.pth']


def test_what_is_no_whole_checkpoint_is_named(tmp_path):
    whole = tmp_path / 'whole.pth'
    torch.save({'weight': torch.ones(1000)}, whole)
    for content in (whole.read_bytes()[:-100], whole.read_bytes()[:3000], b'', b'some text'):
        (tmp_path / 'cut.pth').write_bytes(content)
        with pytest.raises(ValueError, match='cut.pth: is no checkpoint, or not a whole one'):
            load(tmp_path / 'cut.pth')
    with pytest.raises(FileNotFoundError, match='none.pth'):
        load(tmp_path / 'none.pth')
    with pytest.raises(IsADirectoryError):
        load(tmp_path)
