"""PS-KD in the Hugging Face Trainer, for images. Nothing is downloaded: the model is made from a config."""

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, ViTConfig, ViTForImageClassification

from selfkd_transformers import PSKDMixin, PSKDTrainingArguments


class MyTrainer(PSKDMixin, Trainer):
    """The mix-in comes before the Trainer."""


digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:200, None] / 16
dataset = [dict(pixel_values=image, labels=label) for image, label in zip(images, digits.target.tolist())]
small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **small)
args = PSKDTrainingArguments(
    output_dir='work',
    num_train_epochs=3,
    per_device_train_batch_size=20,
    pskd_alpha=0.3,
    report_to='none',
    save_strategy='no',
    use_cpu=True,
)
trainer = MyTrainer(model=ViTForImageClassification(config), args=args, train_dataset=dataset)
trainer.train()
print(f'alpha {trainer.pskd.current_alpha:.1f}')
