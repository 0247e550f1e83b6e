"""Every config over PASCAL VOC, built and trained for two steps on digits in VOC's own layout."""

import pytest
import torch
from helpers import ROOT
from helpers.mmengine import counter
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.registry import MODELS

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
    if cfg.train_cfg.type == 'EpochBasedTrainLoop':  # 16 images in batches of 8
        cfg.train_cfg.update(max_epochs=1, val_interval=1)
    else:
        cfg.train_cfg.update(max_iters=2, val_interval=2)
    for hook in cfg.get('custom_hooks', []):
        hook.interval = 1  # PS-KD learns from the period before
    if path.stem.endswith('frskd'):
        cfg.merge_from_dict({'model.self_teacher.warmup': 0.5})
    for part in ('train', 'val'):
        loader = cfg[f'{part}_dataloader']
        batch_size = 8 if cfg.train_cfg.type == 'EpochBasedTrainLoop' else 2
        loader.update(batch_size=batch_size if part == 'train' else 1, num_workers=0, persistent_workers=False)
        for dataset in loader.dataset.get('datasets', [loader.dataset]):
            assert dataset.type == 'PascalVOCDataset'
            dataset.data_root = dataset.data_root.replace('data/VOCdevkit', str(devkit))
            for transform in dataset.pipeline:
                if transform.type == 'RandomResize':
                    transform.update(scale=(256, 64), ratio_range=(0.5, 2.0))
                if transform.type == 'Resize':
                    transform.scale = (64, 64) if transform.keep_ratio is False else (256, 64)
                if 'crop_size' in transform:
                    transform.crop_size = (64, 64)
                if transform.type == 'Pad':
                    transform.size = (64, 64)
    cfg.update(work_dir=str(tmp_path), experiment_name=f'voc{next(counter)}', log_level='ERROR', visualizer=None)
    cfg.default_hooks.checkpoint.update(interval=2, by_epoch=False)
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


PARAMETERS = {'b0': (4_327_590, 200_981), 'b1': (7_127_946, 257_909), 'b2': (8_592_940, 314_837)}


def paper(arch, method='frskd'):
    name = f'efficientnet-{arch}_fpn-bifpn_1xb16-60e_voc0712-512x512_{method}.py'
    cfg = Config.fromfile(ROOT / 'configs/mmseg/frskd' / name)
    cfg.model.backbone.init_cfg = None
    return cfg


@pytest.mark.parametrize(('arch', 'width'), [('b0', 64), ('b1', 88), ('b2', 112)])
def test_the_papers_model(arch, width):
    """Levels P2 to P7 of one width, the released numbers of parameters, and the plain model inside."""
    model = MODELS.build(paper(arch).model).eval()
    with torch.no_grad():
        maps = model.extract_feat(torch.zeros(1, 3, 256, 256))
        refined, logits = model.self_teacher(maps)
    shapes = [(1, width, size, size) for size in (64, 32, 16, 8, 4, 2)]
    assert [m.shape for m in maps] == [m.shape for m in refined] == shapes
    assert logits.shape == (1, 21, 64, 64)
    counts = [sum(p.numel() for p in part.parameters()) for part in (model, model.self_teacher)]
    assert tuple(counts) == PARAMETERS[arch]
    assert (model.self_teacher.alpha, model.self_teacher.beta, model.self_teacher.warmup) == (1, 50, 2 / 3)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith('self_teacher.')}
    MODELS.build(paper(arch, 'plain').model).load_state_dict(state, strict=True)


def test_the_papers_model_starts_as_torch_does():
    """Convolutions outside the backbone: uniform within 1 / sqrt(fan in), biases too, also after init_weights."""
    torch.manual_seed(0)
    model = MODELS.build(paper('b0').model)
    model.init_weights()
    checked = 0
    for part in (model.neck, model.decode_head, model.self_teacher):
        for conv in part.modules():
            if isinstance(conv, torch.nn.Conv2d):
                bound = conv.weight[0].numel() ** -0.5
                for tensor in (conv.weight, conv.bias):
                    assert 0.5 * bound < tensor.abs().max() <= bound * (1 + 1e-6)
                    checked += 1
    assert checked == 2 * (8 + 3 * 11 + 2 + 11 + 6 + 2)


def test_the_papers_schedule():
    """Two batches of 16, clipped by value, lr 0.01 for 40 of 60 epochs; validation at 512 x 512 every epoch."""
    cfg = paper('b0')
    assert cfg.train_dataloader.batch_size == 16
    assert cfg.train_dataloader.drop_last
    wrapper = cfg.optim_wrapper
    assert wrapper.accumulative_counts == 2
    assert wrapper.clip_grad == dict(type='value', clip_value=2)
    assert wrapper.optimizer == dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=5e-4)
    assert cfg.train_cfg == dict(type='EpochBasedTrainLoop', max_epochs=60, val_interval=1)
    assert cfg.param_scheduler == [dict(type='MultiStepLR', by_epoch=True, milestones=[40], gamma=0.1)]


def test_the_papers_images(devkit):
    """Training: shorter sides of 256 to 1024 pixels, black and background where padded. Validation: all 512 x 512."""
    cfg = paper('b0')
    from mmseg.registry import DATASETS

    for part in ('train', 'val'):
        dataset = cfg[f'{part}_dataloader'].dataset
        for each in dataset.get('datasets', [dataset]):
            each.data_root = each.data_root.replace('data/VOCdevkit', str(devkit))
        dataset = DATASETS.build(dataset)
        padded = 0
        for i in range(len(dataset)):
            item = dataset[i]
            label = item['data_samples'].gt_sem_seg.data
            assert item['inputs'].shape == (3, 512, 512)
            assert label.shape == (1, 512, 512)
            padded += not item['inputs'][:, -8:, -8:].any() and not label[:, -8:, -8:].any()
            if part == 'val':
                assert item['data_samples'].ori_shape == (512, 512)
        assert len(dataset) == (16 if part == 'train' else 1)
        assert (padded > 0) == (part == 'train')


@pytest.mark.parametrize('method', ['baseline', 'pskd', 'frskd'])
def test_toy_configs(voc, tmp_path, method):
    """Three steps and a validation, on masks of one class that are those of ten classes otherwise."""
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
    cfg.train_cfg.update(max_iters=3, val_interval=3)
    for hook in cfg.get('custom_hooks', []):
        hook.interval = 1  # PS-KD learns from the period before
    cfg.update(work_dir=str(tmp_path), experiment_name=f'toy{next(counter)}', log_level='ERROR')
    runner = Runner.from_cfg(cfg)
    runner.train()
    names = {name.split('/')[-1] for name in runner.message_hub.log_scalars}
    assert {'decode.loss_ce', 'mIoU', 'ece'} <= names
    assert ('pskd_alpha' in names) == (method == 'pskd')
    assert ('self_teacher.loss_kd' in names) == (method == 'frskd')
