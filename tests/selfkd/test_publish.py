"""What `selfkd publish` takes, drops and writes."""

import re

import pytest
import torch
from torch import nn

from selfkd.cli import main
from selfkd.publish import publish_checkpoint, strip_self_teacher


def test_a_fitted_temperature_is_stored_as_a_plain_number(tmp_path):
    source, target = str(tmp_path / 'epoch_1.pth'), str(tmp_path / 'published.pth')
    torch.save({'state_dict': {'fc.weight': torch.ones(2, 3)}, 'meta': {'epoch': 1}}, source)
    publish_checkpoint(source, target, temperature=torch.tensor(1.5))
    published = torch.load(target, weights_only=True)
    assert published['meta'] == {'epoch': 1, 'temperature': 1.5}
    main(['publish', source, target, '--temperature', '2'])
    assert torch.load(target, weights_only=True)['meta']['temperature'] == 2
    publish_checkpoint(source, target)
    assert 'temperature' not in torch.load(target, weights_only=True)['meta']
    for wrong in (0.0, -1.0, float('nan'), float('inf')):
        with pytest.raises(ValueError, match='temperature must be'):
            publish_checkpoint(source, target, temperature=wrong)


def test_an_unfinished_write_leaves_the_old_file_and_the_source(tmp_path, monkeypatch):
    source, target = tmp_path / 'epoch_1.pth', tmp_path / 'published.pth'
    torch.save({'state_dict': {'fc.weight': torch.ones(2, 3)}, 'optimizer': {}}, source)
    target.write_bytes(b'the old one')
    before = source.read_bytes()

    def interrupted(value, beside, save=torch.save):
        save(value, beside)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, 'save', interrupted)
        for place in (target, source):
            with pytest.raises(KeyboardInterrupt):
                publish_checkpoint(source, place)
    assert target.read_bytes() == b'the old one'
    assert source.read_bytes() == before
    publish_checkpoint(source, source)
    assert set(torch.load(source, weights_only=True)) == {'meta', 'state_dict'}
    assert len(list(tmp_path.iterdir())) == 2


WEIGHT = torch.ones(1)
NO_CHECKPOINTS = {
    'holds a Linear instead of a checkpoint or a state dict: load it .* save its state_dict': nn.Linear(2, 2),
    'holds a list instead of': [1, 2],
    'holds a Tensor instead of': WEIGHT,
    "its 'meta' must be a dict, got NoneType": {'state_dict': {'a': WEIGHT}, 'meta': None},
    "under 'state_dict' it holds a Linear instead": {'meta': {}, 'state_dict': nn.Linear(2, 2)},
    "under 'model' it holds a Linear instead": {'model': nn.Linear(2, 2)},
    'entry 0 is of type Tensor': {'state_dict': {0: WEIGHT, 'a': WEIGHT}},
    "entry 'b' is of type ndarray": {'model': {'a': WEIGHT, 'b': WEIGHT.numpy()}},
    'holds no weights': {'epoch': 3},
}


@pytest.mark.parametrize('message', NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, message, capsys):
    source, target = str(tmp_path / 'source.pth'), tmp_path / 'target.pth'
    torch.save(NO_CHECKPOINTS[message], source)
    with pytest.raises(ValueError, match=f'source.pth: .*{message}'):
        publish_checkpoint(source, str(target))
    with pytest.raises(SystemExit, match='2'):
        main(['publish', source, str(target)])
    assert re.search(f'selfkd publish: error: .*{message}', capsys.readouterr().err)
    assert not target.exists()


def test_files_that_cannot_be_read_or_written_end_the_command_with_a_message(tmp_path, capsys):
    source = tmp_path / 'source.pth'
    torch.save({'state_dict': {'a': WEIGHT}}, source)
    (tmp_path / 'cut.pth').write_bytes(source.read_bytes()[:-50])
    for arguments, message in (
        (['none.pth', 'out.pth'], 'No such file or directory'),
        (['cut.pth', 'out.pth'], 'cut.pth: is no checkpoint, or not a whole one'),
        (['source.pth', 'none/out.pth'], 'none/out.pth'),
        (['source.pth', '.'], 'Is a directory'),
    ):
        with pytest.raises(SystemExit, match='2'):
            main(['publish', *(str(tmp_path / name) for name in arguments)])
        assert message in capsys.readouterr().err


def test_only_what_our_methods_added_is_dropped():
    byot = ('branches.0.0.weight', 'fcs.0.weight', 'fcs.0.bias', 'loss_module.class_weight')
    ours = {'self_teacher.fc.weight', 'roi_head.self_teacher.pyramid.weight', *(f'head.auxiliary.{n}' for n in byot)}
    own = {
        'auxiliary.fc.weight',
        'backbone.auxiliary.0.weight',
        'head.auxiliary_fc.weight',
        'neck.auxiliary.fcs.0.weight',
    }
    kept = strip_self_teacher(dict.fromkeys([*ours, *own, 'head.fc.weight'], WEIGHT))
    assert set(kept) == {*own, 'head.fc.weight'}
