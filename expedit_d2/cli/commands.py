"""The commands of `expedit` and their options, without heavy imports."""

from __future__ import annotations

import argparse
import inspect

from .options import (
    ToolParser,
    add_config_options,
    add_measuring_options,
    add_model_options,
    at_least,
)

__all__ = ["COMMANDS", "parser_of"]


def train(parser: argparse.ArgumentParser) -> None:
    r"""Train or evaluate a model with Detectron2, from a YAML config or a LazyConfig.

    Examples::

        # evaluate official weights, plain and with Expedit
        expedit train --eval-only --config-file configs/vitdet/mask_rcnn_vitdet_b.yaml
        expedit train --eval-only --config-file configs/vitdet/mask_rcnn_vitdet_b.yaml \
            MODEL.EXPEDIT.ENABLED True MODEL.EXPEDIT.BUDGET 0.65

        # both at once, in one table with GFLOPs and speed
        expedit train --eval-only --compare \
            --config-file configs/vitdet/mask_rcnn_vitdet_b.yaml MODEL.EXPEDIT.BUDGET 0.65

        # an existing ViTDet LazyConfig
        expedit train --eval-only --config-file my_vitdet.py \
            train.init_checkpoint=my_weights.pth \
            expedit.enabled=True expedit.budget=0.65

        # your own models and data sets, registered by a module
        expedit train --import my_model.py --config-file my_model.yaml --num-gpus 4

    --resume resumes training from the last checkpoint in the output folder.
    """
    option = parser.add_argument
    option("--eval-only", action="store_true", help="evaluate, do not train")
    option("--compare", action="store_true", help="evaluate without and with Expedit, in one table")
    option(
        "--resume", action="store_true", help="resume from the last checkpoint in the output folder"
    )
    option(
        "--num-gpus", type=at_least(1), default=1, help="processes on each machine (%(default)s)"
    )
    option("--num-machines", type=at_least(1), default=1, help="(%(default)s)")
    option("--machine-rank", type=at_least(0), default=0, help="of this machine (%(default)s)")
    option(
        "--dist-url",
        default="auto",
        help="rendezvous URL; for several machines tcp://HOST:PORT of the first",
    )
    add_config_options(parser)


def compare(parser: argparse.ArgumentParser) -> None:
    r"""Compare a plain model with expedited ones: metrics, agreement, GFLOPs, speed and memory.

    Examples::

        # the small Segmenter with the settings next to its config; no downloads
        expedit compare

        # your model, its labelled data, and two settings
        expedit compare --config-file my_model.yaml \
            --setting "alpha=8 ratio=0.7" --setting "half: budget=0.5" \
            -- MODEL.WEIGHTS my_model.pth DATASETS.TEST "('my/instances.json@images',)"

        # images without labels: agreement with the plain model, GFLOPs, speed and memory
        expedit compare --config-file my_vitdet.py --images "photos/*.jpg" \
            --setting "alpha=4 ratio=0.7" -- train.init_checkpoint=my_model.pth

        # features of a ViT of another library, at half of the GFLOPs of its blocks
        expedit compare --model hf:facebook/dinov2-base --images photos/
        expedit compare --model torchvision:ViT_L_16_Weights.IMAGENET1K_SWAG_E2E_V1 --size 512x512
        expedit compare --model sam:sam_vit_b_01ec64.pth --setting "budget=0.7"

    Results are saved to the output folder as they are measured; after an interruption, the same
    command resumes.
    """
    option = parser.add_argument
    option(
        "--setting",
        action="append",
        default=[],
        metavar='"[NAME:] KEY=VALUE ..."',
        help="fields of MODEL.EXPEDIT; lists as 0,1,2 or 0-6; can be repeated",
    )
    option(
        "--expedit", nargs="+", default=[], metavar="CONFIG", help="configs to take settings from"
    )
    option(
        "--pictures", type=at_least(0), default=3, help="images to show in the report (%(default)s)"
    )
    add_measuring_options(parser, "output/compare")


def tune(parser: argparse.ArgumentParser) -> None:
    r"""Find the best setting for a target: retained metrics, agreement, or speed-up.

    Many settings run on a few images, for agreement with the plain model and GFLOPs. The best of
    them run on all images, with metrics and timing. The best setting is saved as a small config.

    Examples::

        # the small Segmenter: as fast as possible with 99 % of its mIoU
        expedit tune --keep 99

        # your model: at least 1.4 times faster, with the closest output
        expedit tune --faster 1.4 --config-file my_model.yaml -- MODEL.WEIGHTS my_model.pth

        # images without labels
        expedit tune --agreement 98 --images photos --config-file my_model.yaml

    Results are saved to the output folder as they are measured; after an interruption, the same
    command resumes.
    """
    option = parser.add_argument
    option(
        "--keep", type=float, metavar="PERCENT", help="of the plain model's metrics, or --metric"
    )
    option("--metric", help="name in the tables: PQ, mIoU, 'box AP'")
    option("--agreement", type=float, metavar="PERCENT", help="agreement with the plain model")
    option("--faster", type=float, metavar="TIMES", help="speed-up over the plain model, batch 1")
    option("--sweep", type=at_least(1), default=8, help="images of the sweep (%(default)s)")
    option(
        "--confirm",
        type=at_least(1),
        default=6,
        help="settings to run on all images (%(default)s)",
    )
    add_measuring_options(parser, "output/tune")


def draw(parser: argparse.ArgumentParser) -> None:
    r"""Draw predictions on images: plain, with Expedit, and where they differ.

    Examples::

        # your images
        expedit draw --images photos/*.jpg --config-file my_model.yaml \
            MODEL.WEIGHTS my_model.pth MODEL.EXPEDIT.BUDGET 0.5

        # all images of a folder, on four GPUs (without GPUs, in four processes)
        expedit draw --images photos --num-gpus 4 --config-file my_model.yaml

        # a LazyConfig, such as the official ones of ViTDet
        expedit draw --images photos --config-file my_vitdet.py \
            train.init_checkpoint=my_model.pth expedit.budget=0.65

        # the first four images of the config's test data set
        expedit draw --config-file configs/embedded/dinov2_mask2former_budget_50.yaml

        # features of a ViT of another library, their principal components as colours
        expedit draw --model hf:facebook/dinov2-base --images photos --setting "budget=0.5"
    """
    option = parser.add_argument
    option(
        "--images",
        nargs="+",
        help="image files and folders; images above 2 megapixels are downscaled; default: the test "
        "data set",
    )
    option("--count", type=at_least(1), default=4, help="images of the data set (%(default)s)")
    option("--output", default="output/pictures", help="folder for the pictures (%(default)s)")
    option(
        "--num-gpus",
        type=at_least(1),
        default=1,
        help="processes that share the images, one per GPU (%(default)s)",
    )
    option("--setting", metavar="KEY=VALUE ...", help="with --model (budget=0.5)")
    add_model_options(parser, "YAML or LazyConfig with MODEL.EXPEDIT")


def export(parser: argparse.ArgumentParser) -> None:
    r"""Export a model, plain or with Expedit, as an ONNX file or a torch.export program.

    Segmenter and DPT are exported whole (images to class scores or depth), other models as their
    backbone (normalised images to feature maps). A --model is exported for one image size (RGB
    images, 0 to 255, to its last feature map).

    Examples::

        # any height and width; compared with PyTorch at the given and another size
        expedit export --config-file configs/embedded/small_segmenter_expedit_16x16.yaml \
            --output segmenter.onnx --check

        # a LazyConfig; ViTDet takes one size
        expedit export --config-file my_vitdet.py --size 1024x1024 --fixed \
            --output backbone.onnx train.init_checkpoint=my_model.pth

        # time PyTorch and ONNX Runtime, plain and with Expedit, interleaved
        expedit export --config-file configs/embedded/small_segmenter_budget_50.yaml \
            --size 256x256 --fixed --output segmenter.onnx --benchmark 20

        # a ViT of another library, at half of its blocks' GFLOPs
        expedit export --model timm:vit_base_patch14_dinov2.lvd142m --size 518x518 \
            --setting "budget=0.5" --output dinov2.onnx --check
    """
    option = parser.add_argument
    option("--output", required=True, metavar="FILE", help="file to write")
    option("--format", choices=("onnx", "pt2"), help="default: by the suffix of the file")
    option("--fixed", action="store_true", help="accept only images of the example's size")
    option("--check", action="store_true", help="compare with PyTorch")
    option(
        "--benchmark",
        type=at_least(0),
        default=0,
        metavar="N",
        help="time N rounds, plain and expedited",
    )
    option("--setting", metavar="KEY=VALUE ...", help="with --model; without it, that is plain")
    add_model_options(parser, size="of the example (256x320; with --model, the model's own)")


def report(parser: argparse.ArgumentParser) -> None:
    r"""Write an HTML report of saved comparisons: plots, tables, conditions and pictures.

    Examples::

        expedit report output/compare/segmenter.json --output report.html

        expedit report a.json b.json --pictures output/pictures --output report.html
    """
    parser.add_argument("results", nargs="+", help="JSON files of comparisons")
    parser.add_argument("--pictures", nargs="+", default=[], help="image files and folders")
    parser.add_argument("--output", default="report.html", help="file to write (%(default)s)")


#: Commands by name; the module of that name in this package has a function `run`.
COMMANDS = {command.__name__: command for command in (train, compare, tune, draw, export, report)}


def parser_of(name: str, prog: str) -> ToolParser:
    """The parser of a command.

    Args:
        name: of the command.
        prog: program name, for messages.
    """
    command = COMMANDS[name]
    parser = ToolParser(prog, inspect.getdoc(command) or "")
    command(parser)
    return parser
