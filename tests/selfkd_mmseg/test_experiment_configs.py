"""Every config over PASCAL VOC, built and trained for two steps on digits in VOC's own layout."""

import pytest
import torch
from mm_runs import ROOT, counter
from mmengine.config import Config
from mmengine.runner import Runner

CONFIGS = sorted(p for method in ('frskd', 'pskd') for p in (ROOT / 'configs/mmseg' / method).glob('*voc*.py'))


@pytest.fixture(scope='module')
def devkit(tmp_path_factory):
    """VOC2007 and VOC2012 side by side, with the lists and masks that Hariharan et al. add to the latter."""
    import make_toy_data

    root = tmp_path_factory.mktemp('VOCdevkit')
    make_toy_data.voc(root, seed=1, train_size=8, test_size=1)
    (root / 'VOC2007').rename(root / 'VOC2012')
    make_toy_data.voc(root, train_size=8, test_size=1)
    lists, names = root / 'VOC2012/ImageSets/Segmentation', (f'{i:06d}\n' for i in range(1, 9))
    names = list(names)
    for part, chosen in (('train', names[:4]), ('val', names[4:5]), ('aug', names[5:])):
        (lists / f'{part}.txt').write_text(''.join(chosen))
    (root / 'VOC2012/SegmentationClassAug').symlink_to(root / 'VOC2012/SegmentationClass')
    return root


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_two_steps(devkit, tmp_path, path):
    """As it is but for weights from the internet, sizes, workers and the number of steps."""
    cfg = Config.fromfile(path)
    cfg.model.pretrained = cfg.model.backbone.init_cfg = None
    cfg.model.data_preprocessor.size = (64, 64)
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    for hook in cfg.get('custom_hooks', []):
        hook.interval = 1  # PS-KD learns from the period before
    if 'self_teacher' in cfg.model:
        cfg.model.self_teacher.warmup = 0.5
    for part in ('train', 'val'):
        loader = cfg[f'{part}_dataloader']
        loader.update(batch_size=2 if part == 'train' else 1, num_workers=0, persistent_workers=False)
        for dataset in loader.dataset.get('datasets', [loader.dataset]):
            assert dataset.type == 'PascalVOCDataset'
            dataset.data_root = dataset.data_root.replace('data/VOCdevkit', str(devkit))
            for transform in dataset.pipeline:
                if transform.type in ('Resize', 'RandomResize'):
                    transform.scale = (256, 64)
                if 'crop_size' in transform:
                    transform.crop_size = (64, 64)
                if transform.type == 'Pad':
                    transform.size = (64, 64)
    cfg.update(work_dir=str(tmp_path), experiment_name=f'voc{next(counter)}', log_level='ERROR', visualizer=None)
    cfg.default_hooks.checkpoint.interval = 2
    cfg.default_hooks.pop('visualization', None)
    outputs = []
    runner = Runner.from_cfg(cfg)
    step = runner.model.train_step
    runner.model.train_step = lambda *args, **kwargs: outputs.append(step(*args, **kwargs)) or outputs[-1]
    runner.train()
    assert len(outputs) == 2
    assert all(torch.isfinite(out['loss']) for out in outputs)
    expected = {'frskd': 'self_teacher.loss_kd', 'pskd': 'pskd_alpha'}.get(path.stem.split('_')[-1])
    assert expected is None or expected in outputs[1]
    assert (tmp_path / 'iter_2.pth').exists()


def test_the_papers_model_and_schedule():
    """Levels P2 to P7 of one width, three BiFPN layers and two more, a batch of 32, 40 of 60 epochs at lr 0.01."""
    from mmseg.registry import MODELS

    for arch, width in (('b0', 64), ('b1', 88), ('b2', 112)):
        name = f'efficientnet-{arch}_fpn-bifpn_1xb8-60e_voc0712-512x512_frskd.py'
        cfg = Config.fromfile(ROOT / 'configs/mmseg/frskd' / name)
        cfg.model.backbone.init_cfg = None
        model = MODELS.build(cfg.model).eval()
        with torch.no_grad():
            maps = model.extract_feat(torch.zeros(1, 3, 256, 256))
            refined, logits = model.self_teacher(maps)
        shapes = [(1, width, size, size) for size in (64, 32, 16, 8, 4, 2)]
        assert [m.shape for m in maps] == [m.shape for m in refined] == shapes
        assert logits.shape == (1, 21, 64, 64)
        assert len(model.neck[1].layers) == 3
        assert len(model.self_teacher.pyramid.layers) == 2
        for head in (model.decode_head, model.self_teacher.head):
            assert head.conv.conv.weight.shape == (256, width, 3, 3)
            assert head.conv_seg.weight.shape == (21, 256, 3, 3)
        teacher = model.self_teacher
        assert (teacher.alpha, teacher.beta, teacher.warmup) == (1, 50, 2 / 3)
        wrapper, passes = cfg.optim_wrapper, (422 + 2913) / cfg.train_dataloader.batch_size
        assert cfg.train_dataloader.batch_size * wrapper.accumulative_counts == 32
        assert wrapper.clip_grad == dict(type='value', clip_value=2)
        assert wrapper.optimizer == dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=5e-4)
        assert cfg.train_cfg.max_iters == pytest.approx(60 * passes, rel=1e-3)
        assert cfg.param_scheduler[0].milestones == [pytest.approx(40 * passes, rel=1e-3)]
        assert cfg.param_scheduler[0].gamma == 0.1


@pytest.mark.parametrize('method', ['baseline', 'pskd', 'frskd'])
def test_toy_configs(voc, tmp_path, method):
    """Two steps and a validation, on masks of one class that are those of ten classes otherwise."""
    import make_toy_data
    import numpy as np
    from PIL import Image

    make_toy_data.voc(tmp_path / 'data', train_size=8, test_size=2, one_class=True)
    root = tmp_path / 'data/VOC2007'
    for path in (voc / 'SegmentationClass').glob('*.png'):
        digits, one = np.asarray(Image.open(path)), np.asarray(Image.open(root / 'SegmentationClass' / path.name))
        assert (one == np.where(digits == 255, 255, digits > 0)).all()
    cfg = Config.fromfile(ROOT / f'configs/mmseg/{method}/fpn_r18_digits.py')
    for part in ('train', 'val', 'test'):
        assert cfg[f'{part}_dataloader'].dataset.data_root == 'data/VOCdigits/VOC2007'
        cfg[f'{part}_dataloader'].dataset.data_root = str(root)
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    for hook in cfg.get('custom_hooks', []):
        hook.interval = 1  # PS-KD learns from the period before
    cfg.update(work_dir=str(tmp_path), experiment_name=f'toy{next(counter)}', log_level='ERROR')
    runner = Runner.from_cfg(cfg)
    runner.train()
    names = {name.split('/')[-1] for name in runner.message_hub.log_scalars}
    assert {'decode.loss_ce', 'mIoU', 'ece'} <= names
    assert ('pskd_alpha' in names) == (method == 'pskd')
    assert ('self_teacher.loss_kd' in names) == (method == 'frskd')
