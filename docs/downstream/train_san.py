"""Train SAN on an export of compt. Run it in a checkout of SAN, in place of its train_net.py (docs/downstream.md):

    python train_san.py EXPORT --config-file configs/compt_vit_b16.yaml --num-gpus 8 OUTPUT_DIR output/compt_vit_b16

EXPORT is what `compt export --to open_clip` wrote. All other arguments are those of train_net.py.
"""

import json
import os
import sys
from pathlib import Path

import open_clip

sys.path.insert(0, os.getcwd())
import train_net


def register(folder):
    """Make the export known to open_clip; returns SAN's options that choose it. Exits if SAN cannot use the model."""
    config = next(folder.glob("compt-*.json"), None)
    if config is None:
        sys.exit(f"{folder} is not an export of compt export --to open_clip")
    model = json.loads(config.read_text())
    images = json.loads((folder / "compt_export.json").read_text())["preprocess"]
    if "timm_model_name" in model["vision_cfg"]:
        sys.exit(f"{folder}: SAN reads the blocks of open_clip's own ViT, and this image tower is a Swin")
    if model["text_cfg"]["context_length"] != 77:
        sys.exit(
            f"{folder}: SAN makes 77 tokens of a caption, and this model reads {model['text_cfg']['context_length']}"
        )
    for key, theirs in (("mean", open_clip.OPENAI_DATASET_MEAN), ("std", open_clip.OPENAI_DATASET_STD)):
        if images[key] != list(theirs):
            sys.exit(
                f"{folder}: open_clip 2.16 gives SAN the colours of OpenAI, and this model has a {key} of {images[key]}"
            )
    open_clip.add_model_config(config)
    weights = str(folder / "open_clip_pytorch_model.bin")
    return ["MODEL.SAN.CLIP_MODEL_NAME", config.stem, "MODEL.SAN.CLIP_PRETRAINED_NAME", weights]


class Trainer(train_net.Trainer):
    """SAN's trainer with the betas of Table E. SAN's configuration has no key for them."""

    @classmethod
    def build_optimizer(cls, cfg, model):
        """SAN's own optimizer."""
        optimizer = super().build_optimizer(cfg, model)
        for group in optimizer.param_groups:
            group["betas"] = (0.9, 0.98)
        return optimizer


# detectron2 starts one process for each GPU, which imports this file but does not run it: the next two lines must be
# outside of `if __name__ == "__main__"`.
if len(sys.argv) < 2:
    sys.exit("name the folder of an export: python train_san.py EXPORT --config-file ...")
OPTIONS = register(Path(sys.argv[1]).resolve())
train_net.Trainer = Trainer

if __name__ == "__main__":
    args = train_net.default_argument_parser().parse_args([*sys.argv[2:], *OPTIONS])
    train_net.launch(
        train_net.main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
