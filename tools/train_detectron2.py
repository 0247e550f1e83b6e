"""Trains a config of Detectron2 with self-distillation, as Detectron2's own tools/train_net.py does without.

    python tools/train_detectron2.py --config-file CONFIG.yaml [--num-gpus N] [--resume] [--eval-only] [KEY VALUE ...]
    python tools/train_detectron2.py --config-file CONFIG.py ... [key=value ...]     (LazyConfig)

The first form takes the settings under SELFKD (docs/detectron2.md); on a machine without a GPU set MODEL.DEVICE cpu.
With VOC.ROOT (a folder with JPEGImages, Annotations, ImageSets) and VOC.CLASSES the
data sets `custom_voc_trainval` and `custom_voc_test` are that folder's; Detectron2's own lie in the folder of the
environment variable DETECTRON2_DATASETS. A LazyConfig lists its hooks as `train.selfkd`.
"""

from pathlib import Path

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
    launch,
)
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm

from selfkd_detectron2 import add_selfkd_config, selfkd_hooks


class Trainer(DefaultTrainer):
    def build_hooks(self):
        return [*super().build_hooks(), *selfkd_hooks(self.cfg)]

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        if MetadataCatalog.get(dataset_name).evaluator_type == 'pascal_voc':
            return PascalVOCDetectionEvaluator(dataset_name)
        return COCOEvaluator(dataset_name, output_dir=str(Path(cfg.OUTPUT_DIR, 'inference')))


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


def train_yaml(args) -> None:
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
        Trainer.test(cfg, model)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()


def train_lazy(args) -> None:
    cfg = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    default_setup(cfg, args)
    model = instantiate(cfg.model).to(cfg.train.device)

    def evaluate():
        if 'evaluator' in cfg.dataloader:
            loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
            results = inference_on_dataset(model, loader, evaluator)
            print_csv_format(results)
            return results

    if args.eval_only:
        DetectionCheckpointer(model).load(cfg.train.init_checkpoint)
        evaluate()
        return
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    model = create_ddp_model(model, **cfg.train.ddp)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(
        model, instantiate(cfg.dataloader.train), optimizer
    )
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if comm.is_main_process() else None,
            hooks.EvalHook(cfg.train.eval_period, evaluate),
            hooks.PeriodicWriter(default_writers(cfg.train.output_dir, cfg.train.max_iter), cfg.train.log_period)
            if comm.is_main_process()
            else None,
            *(instantiate(hook) for hook in cfg.train.get('selfkd', [])),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    resumed = args.resume and checkpointer.has_checkpoint()
    trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)


def main(args) -> None:
    (train_lazy if args.config_file.endswith('.py') else train_yaml)(args)


if __name__ == '__main__':
    args = default_argument_parser(__doc__).parse_args()
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
