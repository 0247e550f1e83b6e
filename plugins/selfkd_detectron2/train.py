"""The command ``selfkd train-detectron2``."""

import inspect
from pathlib import Path
from typing import Sequence

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
    launch,
)
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm

from .config import SelfKDTrainer, add_selfkd_config, check_classes
from .evaluation import DetectionCalibration
from .frskd import SelfTaught
from .hooks import FRSKDHook

__all__ = ['Trainer', 'base_config', 'main', 'register_voc']

# For each type of data set, what makes its evaluators: as in Detectron2's tools/train_net.py, and the calibration.
EVALUATORS = {
    'coco': [lambda name, out: COCOEvaluator(name, output_dir=out)],
    'sem_seg': [lambda name, out: SemSegEvaluator(name, output_dir=out)],
    'coco_panoptic_seg': [
        lambda name, out: SemSegEvaluator(name, output_dir=out),
        lambda name, out: COCOEvaluator(name, output_dir=out),
        lambda name, out: COCOPanopticEvaluator(name, out),
    ],
    'lvis': [lambda name, out: LVISEvaluator(name, output_dir=out)],
    'pascal_voc': [
        lambda name, out: PascalVOCDetectionEvaluator(name),
        lambda name, out: DetectionCalibration(name),
    ],
    'cityscapes_instance': [lambda name, out: CityscapesInstanceEvaluator(name)],
    'cityscapes_sem_seg': [lambda name, out: CityscapesSemSegEvaluator(name)],
}


class Trainer(SelfKDTrainer):
    """Evaluates each data set as its kind wants it, and with test-time augmentation where the config asks for it."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_dir=None):
        output_dir = output_dir or str(Path(cfg.OUTPUT_DIR, 'inference'))
        kind = MetadataCatalog.get(dataset_name).evaluator_type
        if kind not in EVALUATORS:
            raise ValueError(
                f'the data set {dataset_name} is of the type {kind!r}, and there is an evaluator for '
                f'{", ".join(EVALUATORS)}: set its MetadataCatalog.get({dataset_name!r}).evaluator_type'
            )
        evaluators = [evaluator(dataset_name, output_dir) for evaluator in EVALUATORS[kind]]
        return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)

    @classmethod
    def test_with_augmentation(cls, cfg, model):
        folder = str(Path(cfg.OUTPUT_DIR, 'inference_TTA'))
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f'{task}_TTA': values for task, values in results.items()}


def base_config() -> CfgNode:
    """Detectron2's default config with our settings."""
    cfg = get_cfg()
    add_selfkd_config(cfg)
    cfg.VOC = CfgNode({'ROOT': '', 'CLASSES': []})
    return cfg


def register_voc(root: str, classes) -> None:
    for split in ('trainval', 'test'):
        name = f'custom_voc_{split}'
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_pascal_voc(name, root, split, 2012, list(classes))  # 2012: area under the precision-recall curve
        MetadataCatalog.get(name).evaluator_type = 'pascal_voc'


def train_yaml(args):
    cfg = base_config()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    if cfg.VOC.ROOT:
        register_voc(cfg.VOC.ROOT, cfg.VOC.CLASSES)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_augmentation(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if cfg.TEST.AUG.ENABLED:
        augmented = hooks.EvalHook(0, lambda: trainer.test_with_augmentation(cfg, trainer.model))
        trainer.register_hooks([augmented])
    return trainer.train()


def train_lazy(args):
    cfg = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    default_setup(cfg, args)
    model = instantiate(cfg.model).to(cfg.train.device)
    self_kd = [instantiate(hook) for hook in cfg.train.get('selfkd', [])]
    if any(isinstance(module, SelfTaught) for module in model.modules()):
        self_kd.append(FRSKDHook())
    if self_kd:
        check_lazy_classes(cfg, model)

    if args.eval_only:
        model = create_ddp_model(model)
        DetectionCheckpointer(model).load(cfg.train.init_checkpoint)
        return evaluate_lazy(cfg, model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    model = create_ddp_model(model, **cfg.train.ddp)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(
        model, instantiate(cfg.dataloader.train), optimizer
    )
    trainer.cfg = cfg
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if comm.is_main_process() else None,
            hooks.EvalHook(cfg.train.eval_period, lambda: evaluate_lazy(cfg, model)),
            hooks.PeriodicWriter(default_writers(cfg.train.output_dir, cfg.train.max_iter), cfg.train.log_period)
            if comm.is_main_process()
            else None,
            *self_kd,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    resumed = args.resume and checkpointer.has_checkpoint()
    trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)


def evaluate_lazy(cfg, model):
    if 'evaluator' not in cfg.dataloader:
        return None
    loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    results = inference_on_dataset(model, loader, evaluator)
    print_csv_format(results)
    return results


def check_lazy_classes(cfg, model) -> None:
    heads = getattr(model, 'roi_heads', model)
    names = cfg.dataloader.train.get('dataset', {}).get('names', [])
    if hasattr(heads, 'num_classes'):
        setting = 'model.num_classes' if heads is model else 'model.roi_heads.num_classes'
        check_classes(setting, heads.num_classes, [names] if isinstance(names, str) else names)


def train(args):
    return (train_lazy if args.config_file.endswith('.py') else train_yaml)(args)


def main(arguments: Sequence[str]) -> None:
    """Trains a config of Detectron2 with self-distillation, as Detectron2's own tools/train_net.py does without.

        selfkd train-detectron2 --config-file CONFIG.yaml [--num-gpus N] [--resume] [--eval-only] [KEY VALUE ...]
        selfkd train-detectron2 --config-file CONFIG.py ... [key=value ...]     (LazyConfig)

        selfkd train-detectron2 --config-file faster_rcnn_R_50_FPN_1x.yaml SELFKD.PSKD.ENABLED True

    The first form takes the settings under SELFKD (docs/detectron2.md); on a machine without a GPU set MODEL.DEVICE
    cpu. With VOC.ROOT (a folder with JPEGImages, Annotations, ImageSets) and VOC.CLASSES the data sets
    `custom_voc_trainval` and `custom_voc_test` are that folder's; Detectron2's own lie in the folder of the environment
    variable DETECTRON2_DATASETS. A LazyConfig lists its hooks as `train.selfkd`.
    """
    parser = default_argument_parser(epilog=inspect.cleandoc(main.__doc__ or ''))
    parser.prog = 'selfkd train-detectron2'
    args = parser.parse_args(arguments)
    launch(train, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
