"""What a published file says besides its weights."""

import pytest
import torch

from selfkd.cli import main
from selfkd.publish import publish_checkpoint


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
