"""Training loops of one's own, Lightning's and transformers', as the promises drive them: small runs over digits."""

import copy
import functools
import os
import shutil
import signal
from pathlib import Path

import torch
import torch.nn.functional as F
from helpers.processes import in_processes
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, DistributedSampler

from selfkd_torch import CSKD, FRSKD, PSKD, TokenPSKD

SAMPLES, CLASSES, RATE = 40, 10, 0.1


def scans():
    """Images and labels of digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images[:SAMPLES], dtype=torch.float32)[:, None] / 16
    return list(zip(images, digits.target[:SAMPLES].tolist()))


def texts():
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (SAMPLES,), generator=random).tolist()
    return [dict(input_ids=torch.randint(CLASSES, (length,), generator=random)) for length in lengths]


def pad(samples):
    """Tokens, and which one follows each."""
    ids = pad_sequence([sample['input_ids'] for sample in samples], True, -100)
    return ids[:, :-1].clamp(min=0), ids[:, 1:].flatten()


def images_network():
    stage = lambda a, b, stride: (nn.Conv2d(a, b, 3, stride, padding=1), nn.BatchNorm2d(b), nn.ReLU())  # noqa: E731
    return nn.Sequential(
        *stage(1, 8, 1),
        *stage(8, 16, 2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64, CLASSES),
    )


def tokens_network():
    return nn.Sequential(nn.Embedding(CLASSES, 16), nn.Dropout(0.2), nn.Linear(16, CLASSES), nn.Flatten(0, 1))


class Moved:
    """A collate function that moves the samples within their batch, as one does that sorts them by length."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, samples):
        return self.collate([*samples[1:], samples[0]])


def killed(step, kill_at):
    if step == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


class Driver:
    """Trains a row's method, or the plain model, in a loop of one's own."""

    batch, epochs, batching, classes = 8, 3, 0.0, tuple(range(CLASSES))

    def __init__(self, row, request, folder):
        self.row, self.folder, self.count = row, folder, 0
        self.tokens = row.method == 'TokenPSKD'
        self.data = texts() if self.tokens else scans()
        self.collate = pad if self.tokens else torch.utils.data.default_collate

    def config(self, *, on=True, settings=None, loop='epoch', batch=None):
        """``method`` has its options, None where it is off."""
        self.count += 1
        folder = self.folder / f'run{self.count}'
        folder.mkdir()
        method = {**self.row.options, **(settings or {})} if on else None
        cfg = dict(method=method, loop=loop, batch=batch or self.batch, folder=folder, collate=self.collate)
        return dict(cfg, accumulate=1, cast=False, passes=1, rate=RATE, validates=False)

    def killable(self, cfg):
        return cfg

    def accumulate(self, cfg):
        return dict(cfg, accumulate=2)

    def bfloat16(self, cfg):
        return dict(cfg, cast=True)

    def two_passes(self, cfg):
        """The model is called on other inputs as well, after its call on the batch and before the loss."""
        return dict(cfg, passes=2)

    def shuffle_within_batches(self, cfg):
        return dict(cfg, collate=Moved(cfg['collate']))

    def train(self, cfg, *, processes=1, kill_at=None, resume=False):
        """Trains in processes of their own; what rank 0 (or each of several) ends with."""
        work = functools.partial(self._train, cfg, processes, kill_at, resume)
        results = in_processes(self.folder, work, processes, dies=kill_at is not None)
        return results if processes > 1 or kill_at is not None else results[0]

    def validation_losses(self, cfg):
        """The validation losses of a training whose weights stay as they are, on batches of another size than in
        training."""
        return self.train(dict(cfg, rate=0.0, validates=True))['validation']

    def network(self):
        torch.manual_seed(0)
        return tokens_network() if self.tokens else images_network()

    def _network(self, cfg):
        """The network to train; one whose weights are to stay keeps its batch norms' statistics as well."""
        network = self.network()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and not cfg['rate']:
                module.momentum = 0.0
        return network

    def _validated(self, model):
        """Within the loop, between two steps."""
        x, y = self.collate(self.data[: self.batch - 1])
        with torch.no_grad():
            loss = F.cross_entropy(model.eval()(x), y).item()
        model.train()
        return loss

    def _train(self, cfg, processes, kill_at, resume, rank):
        saved, model = cfg['folder'] / 'last.pth', self._network(cfg)
        wrapped = model
        if processes > 1:
            torch.distributed.init_process_group('gloo')
            wrapped = nn.parallel.DistributedDataParallel(model)
        sampler = DistributedSampler(self.data, processes, rank)
        loader = DataLoader(self.data, cfg['batch'], sampler=sampler, collate_fn=cfg['collate'])
        method = self._method(cfg, loader, wrapped)
        batches = method.batches() if hasattr(method, 'batches') else loader
        learnt = [*model.parameters(), *(method.parameters() if isinstance(method, FRSKD) else ())]
        optimizer = torch.optim.SGD(learnt, lr=cfg['rate'], momentum=0.9)
        parts = {name: part for name, part in dict(model=model, optimizer=optimizer, method=method).items() if part}
        done, steps, validation = 0, [], []
        if resume:
            state = torch.load(saved, weights_only=False)
            done, _ = state['epochs'], torch.set_rng_state(state['random'])
            for name, part in parts.items():
                part.load_state_dict(state[name])
        for epoch in range(done, self.epochs):
            sampler.set_epoch(epoch)
            for number, (x, y) in enumerate(batches):
                loss = self._loss(cfg, wrapped, method, x, y)
                (loss / cfg['accumulate']).backward()
                if (number + 1) % cfg['accumulate'] == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                steps.append(dict(loss=loss.item(), alpha=getattr(method, 'current_alpha', None)))
                killed(len(steps), kill_at)
                if cfg['validates']:
                    validation.append(self._validated(model))
            if rank == 0:
                states = {name: part.state_dict() for name, part in parts.items()}
                torch.save(dict(states, epochs=epoch + 1, random=torch.get_rng_state()), saved)
        return dict(self._result(model, steps, method, str(saved)), validation=validation)

    def _method(self, cfg, loader, model):
        options, name = cfg['method'], self.row.method.split('-')[0]
        if options is None:
            return None
        if name == 'CSKD':
            return CSKD(loader, model, labels=[label for _, label in self.data], **options)
        if name == 'FRSKD':
            return FRSKD(model, ['2', '5'], CLASSES, example=torch.zeros(1, 1, 8, 8), **options)
        if options.get('teacher') in ('snapshot', 'ema'):
            options = dict(options, model=model)
        return (TokenPSKD if self.tokens else PSKD)(loader, max_epochs=self.epochs, **options)

    def _loss(self, cfg, model, method, x, y):
        with torch.autocast('cpu', torch.bfloat16, enabled=cfg['cast']):
            logits = model(x)
            if cfg['passes'] == 2:
                with torch.random.fork_rng():
                    model(x.flip(-1))
            return (method.loss if method else F.cross_entropy)(logits.float(), y)

    def _result(self, model, steps, method, checkpoint):
        bank, past = getattr(method, 'bank', None), getattr(method, 'past', None)
        teacher = getattr(past, 'teacher', None)
        return dict(
            weights=copy.deepcopy(model.state_dict()),
            steps=steps,
            bank=bank and bank.state_dict(),
            teacher=teacher and {name: value.clone() for name, value in teacher.model.named_parameters()},
            checkpoint=checkpoint,
        )

    def total(self, step):
        return step['loss']

    def trained(self, weights):
        """Names of what is equal on all ranks: parameters, not the statistics of batch norms, which each rank keeps."""
        return [name for name in weights if 'running_' not in name]

    def publish(self, trained, target):
        """The weights for inference, and how many were dropped."""
        shutil.copy(trained['checkpoint'], target)
        return torch.load(target, weights_only=False)['model'], 0

    def load_strictly(self, cfg, weights):
        self.network().load_state_dict(weights)

    def predictions(self, cfg, checkpoint):
        """Of the plain model with the weights of a checkpoint, and the names of the classes."""
        model = self.network()
        model.load_state_dict(torch.load(checkpoint, weights_only=False)['model'])
        return self._predicted(model), self.classes

    def _predicted(self, model):
        with torch.no_grad():
            return model.eval()(self.collate(self.data[:4])[0])


class LightningDriver(Driver):
    """Trains a LightningModule under Lightning's Trainer."""

    def __init__(self, row, request, folder):
        super().__init__(row, request, folder)
        import selfkd_lightning  # noqa: F401  (before processes are forked)

    def module(self, cfg):
        import lightning.pytorch as pl

        driver = self

        class Module(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.net, self.steps, self.validation = driver._network(cfg), [], []

            def training_step(self, batch, batch_idx):
                torch.manual_seed(self.global_step)  # checkpoints hold no random states
                loss = driver._loss(dict(cfg, cast=False), self.net, None, *batch)
                self.steps.append(dict(loss=loss.item()))
                return loss

            def validation_step(self, batch, batch_idx):
                loss = driver._loss(dict(cfg, cast=False, passes=1), self.net, None, *batch)
                self.validation.append(loss.item())

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=cfg['rate'], momentum=0.9)

        return Module()

    def _train(self, cfg, processes, kill_at, resume, rank):
        import lightning.pytorch as pl

        import selfkd_lightning

        module, method = self.module(cfg), None
        if cfg['method'] is not None:
            name = self.row.method.split('-')[0]
            own = dict(CSKD=dict(labels=[label for _, label in self.data]), FRSKD=dict(example=torch.zeros(1, 1, 8, 8)))
            method = getattr(selfkd_lightning, name)(**own.get(name, {}), **cfg['method'])

        class Notes(pl.Callback):
            def on_train_batch_end(self, *args):
                module.steps[-1]['alpha'] = getattr(method, 'current_alpha', None)
                killed(len(module.steps), kill_at)

        steps = self.epochs * SAMPLES // self.batch
        trainer = pl.Trainer(
            callbacks=[
                Notes(),
                pl.callbacks.ModelCheckpoint(cfg['folder'], save_top_k=-1),
                *([method] if method else ()),
            ],
            accumulate_grad_batches=cfg['accumulate'],
            precision='bf16-mixed' if cfg['cast'] else '32-true',
            devices=processes,
            strategy=pl.strategies.DDPStrategy(process_group_backend='gloo') if processes > 1 else 'auto',
            accelerator='cpu',
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **(dict(max_epochs=self.epochs) if cfg['loop'] == 'epoch' else dict(max_steps=steps)),
        )
        # In order, unless samples move (and then into other batches): resumed, Lightning has not the order it had.
        moved = isinstance(cfg['collate'], Moved)
        loader = DataLoader(self.data, cfg['batch'], shuffle=moved, collate_fn=cfg['collate'])
        batch = cfg['batch'] - 1
        validation = DataLoader(self.data, batch, collate_fn=self.collate) if cfg['validates'] else None
        trainer.fit(module, loader, validation, ckpt_path=self._last(cfg['folder']) if resume else None)
        result = self._result(module, module.steps, method and method.method, self._last(cfg['folder']))
        return dict(result, validation=module.validation)

    @staticmethod
    def _last(folder):
        return str(max(folder.glob('*.ckpt'), key=lambda path: int(path.stem.split('step=')[1])))

    def publish(self, trained, target):
        state = torch.load(trained['checkpoint'], weights_only=True)
        kept = ('state_dict', 'pytorch-lightning_version')
        torch.save({name: state[name] for name in kept}, target)
        return state['state_dict'], 0

    def load_strictly(self, cfg, weights):
        self.module(cfg).load_state_dict(weights)

    def predictions(self, cfg, checkpoint):
        module = type(self.module(cfg)).load_from_checkpoint(checkpoint)
        return self._predicted(module.net), self.classes


class TransformersDriver(Driver):
    """Trains a BERT, which reads the pixels of a digit as tokens, or a ResNet, in Hugging Face's Trainer."""

    classes = tuple(f'LABEL_{number}' for number in range(CLASSES))

    def __init__(self, row, request, folder):
        os.environ.setdefault('HF_HUB_OFFLINE', '1')
        super().__init__(row, request, folder)
        from transformers import default_data_collator

        import selfkd_transformers  # noqa: F401  (before processes are forked)

        self.images, self.input = row.method == 'FRSKD', 'pixel_values' if row.method == 'FRSKD' else 'input_ids'
        taken = (lambda image: image) if self.images else (lambda image: (16 * image).long().flatten())
        self.data = [{self.input: taken(image), 'labels': label} for image, label in self.data]
        self.collate = default_data_collator

    def network(self):
        from transformers import BertConfig, BertForSequenceClassification, ResNetConfig, ResNetForImageClassification

        torch.manual_seed(0)
        if self.images:
            sizes = dict(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type='basic')
            return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=CLASSES))
        sizes = dict(vocab_size=17, hidden_size=16, intermediate_size=16, max_position_embeddings=64)
        layers = dict(num_hidden_layers=1, num_attention_heads=2)
        return BertForSequenceClassification(BertConfig(**sizes, **layers, num_labels=CLASSES))

    def _train(self, cfg, processes, kill_at, resume, rank):
        from transformers import Trainer, TrainingArguments

        import selfkd_transformers

        driver, steps, on = self, [], cfg['method'] is not None
        name = self.row.method.split('-')[0]
        mixin, arguments = (getattr(selfkd_transformers, name + part) for part in ('Mixin', 'TrainingArguments'))

        class Mine(*((mixin, Trainer) if on else (Trainer,))):
            def training_step(self, *args, **kwargs):
                loss = super().training_step(*args, **kwargs)
                alpha = self.pskd.current_alpha if on and name == 'PSKD' and self.pskd else None
                steps.append(dict(loss=loss.item(), alpha=alpha))
                killed(len(steps), kill_at)
                return loss

            def compute_loss(self, model, inputs, *args, **kwargs):
                if cfg['passes'] == 1:
                    return super().compute_loss(model, inputs, *args, **kwargs)
                logits = model(inputs[driver.input]).logits
                with torch.random.fork_rng():
                    model(inputs[driver.input].flip(-1))
                return F.cross_entropy(logits, inputs['labels'])

        args = dict(
            output_dir=str(cfg['folder']),
            num_train_epochs=self.epochs,
            max_steps=-1 if cfg['loop'] == 'epoch' else self.epochs * SAMPLES // self.batch,
            per_device_train_batch_size=cfg['batch'],
            gradient_accumulation_steps=cfg['accumulate'],
            bf16=cfg['cast'],
            learning_rate=cfg['rate'],
            lr_scheduler_type='constant',
            optim='sgd',
            save_strategy='steps',
            save_steps=3,
            report_to='none',
            logging_strategy='no',
            disable_tqdm=True,
            eval_strategy='epoch' if cfg['validates'] else 'no',
            per_device_eval_batch_size=cfg['batch'] - 1,
            use_cpu=True,
            **(dict(ddp_backend='gloo') if processes > 1 else {}),
        )
        args = arguments(**args, **cfg['method']) if on else TrainingArguments(**args)
        data = dict(train_dataset=self.data, eval_dataset=self.data, data_collator=cfg['collate'])
        trainer = Mine(model=self._network(cfg), args=args, **data)
        trainer.train(resume_from_checkpoint=True if resume else None)
        saved = max(cfg['folder'].glob('checkpoint-*'), key=lambda path: int(path.name.split('-')[1]))
        result = self._result(trainer.model, steps, getattr(trainer, 'pskd', None), str(saved))
        logged = [entry['eval_loss'] for entry in trainer.state.log_history if 'eval_loss' in entry]
        return dict(result, validation=logged)

    def publish(self, trained, target):
        from safetensors.torch import load_file

        os.mkdir(target)
        for name in ('config.json', 'model.safetensors'):
            shutil.copy(Path(trained['checkpoint'], name), target)
        return load_file(Path(target, 'model.safetensors')), 0

    def predictions(self, cfg, checkpoint):
        from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

        kind = AutoModelForImageClassification if self.images else AutoModelForSequenceClassification
        model = kind.from_pretrained(checkpoint).eval()
        with torch.no_grad():
            found = model(torch.stack([sample[self.input] for sample in self.data[:4]])).logits
        return found, tuple(model.config.id2label.values())
