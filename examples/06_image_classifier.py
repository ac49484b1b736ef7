"""LoRA on an image classifier: a vision transformer learns new classes with LoRA on its attention and a new head.

Small by default: a tiny random ViT and generated images (discs, crosses, stripes). The one argument that makes it full-size is
`--base google/vit-base-patch16-224-in21k`; `--data` takes a folder with one subfolder of images per class.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageClassification, TrainingArguments, ViTConfig

from tunesmith import LoraConfig, PeftModel, Trainer, get_peft_model

parser = argparse.ArgumentParser()
parser.add_argument("--base", help="a folder or a model id on the Hub; default: a tiny random ViT")
parser.add_argument("--data", help="a folder with one subfolder of images per class; default: generated images")
parser.add_argument("--output-dir", default="pictures")
settings = parser.parse_args()


def drawn(size, count=240):
    """`(images (3, size, size), labels, classes)`: a shape with random position, size and colour, plus noise."""
    generator = torch.Generator().manual_seed(0)
    across, down = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    pictures, labels = [], torch.arange(count) % 3
    for label in labels.tolist():
        x, y = torch.randint(size // 3, 2 * size // 3, (2,), generator=generator).tolist()
        width = int(torch.randint(size // 6, size // 3, (1,), generator=generator))
        shape = [
            (across - x) ** 2 + (down - y) ** 2 < width**2,
            ((across - x).abs() < 2) | ((down - y).abs() < 2),
            (across + x) % 4 < 2,
        ][label]
        color = 0.5 + torch.rand(3, 1, 1, generator=generator)
        pictures.append(color * shape + 0.3 * torch.randn(3, size, size, generator=generator))
    return pictures, labels.tolist(), ["disc", "cross", "stripes"]


def read(folder, size):
    """The same, from image files."""
    import numpy
    from PIL import Image

    classes = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    files = [(path, classes.index(path.parent.name)) for path in sorted(Path(folder).glob("*/*"))]
    images = [Image.open(path).convert("RGB").resize((size, size)) for path, _ in files]
    pictures = [torch.from_numpy(numpy.asarray(image) / 127.5 - 1).permute(2, 0, 1).float() for image in images]
    return pictures, [label for _, label in files], classes


size = AutoConfig.from_pretrained(settings.base).image_size if settings.base else 16
pictures, labels, classes = read(settings.data, size) if settings.data else drawn(size)
names = dict(enumerate(classes))
torch.manual_seed(0)
if settings.base:
    model = AutoModelForImageClassification.from_pretrained(
        settings.base, id2label=names, label2id={name: index for index, name in names.items()}, ignore_mismatched_sizes=True
    )
else:
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    model = AutoModelForImageClassification.from_config(ViTConfig(image_size=size, patch_size=4, **sizes, id2label=names))

# Models without a task type of their own list the modules to train in full: here the new head, as a private copy.
config = LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, modules_to_save=["classifier"])
handle = get_peft_model(model, config)
handle.print_trainable_parameters()

order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(1)).tolist()
rows = [{"pixel_values": pictures[index], "labels": labels[index]} for index in order]
split = len(rows) * 3 // 4


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


trainer = Trainer(
    model=handle,
    args=TrainingArguments(
        output_dir=settings.output_dir,
        learning_rate=5e-3,
        num_train_epochs=8,
        per_device_train_batch_size=16,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    ),
    train_dataset=rows[:split],
    eval_dataset=rows[split:],
    compute_metrics=accuracy,
)
before = trainer.evaluate()["eval_accuracy"]
trainer.train()
print(f"accuracy {before:.0%} before, {trainer.evaluate()['eval_accuracy']:.0%} after")

handle.save_pretrained(settings.output_dir)
loaded = PeftModel.from_pretrained(model, settings.output_dir).eval()
with torch.no_grad():
    scores = loaded(pixel_values=torch.stack([row["pixel_values"] for row in rows[split : split + 6]])).logits
print("predicted:", ", ".join(names[index] for index in scores.argmax(-1).tolist()))
print("actual:   ", ", ".join(names[row["labels"]] for row in rows[split : split + 6]))
