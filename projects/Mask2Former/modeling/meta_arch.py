"""``MaskFormer``: the meta-architecture of Mask2Former, with its official name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, build_sem_seg_head
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import BitMasks, ImageList, Instances
from detectron2.utils.memory import retry_if_cuda_oom
from torch import Tensor, nn

from expedit_d2.data.normalized import NormalizingModel

from .criterion import SetCriterion
from .inference import instance_inference, panoptic_inference, semantic_inference
from .matcher import HungarianMatcher

__all__ = ["MaskFormer"]


@META_ARCH_REGISTRY.register()
class MaskFormer(NormalizingModel):
    """Backbone, head and losses; panoptic, instance and semantic output."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        criterion: nn.Module,
        things: frozenset[int] | None,
        size_divisibility: int,
        sem_seg_postprocess_before_inference: bool,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        semantic_on: bool,
        panoptic_on: bool,
        instance_on: bool,
        object_mask_threshold: float,
        overlap_threshold: float,
        test_topk_per_image: int,
    ) -> None:
        """
        Args:
            backbone, sem_seg_head, criterion: the parts.
            things: classes that have instances; None if unknown.
            size_divisibility: images are padded to a multiple of it; negative: the backbone's.
            sem_seg_postprocess_before_inference: resize masks to the output size first, instead of
                the semantic map at the end; needed for panoptic and instance output.
            pixel_mean, pixel_std: of each channel.
            semantic_on, panoptic_on, instance_on: kinds of output.
            object_mask_threshold, overlap_threshold: see `panoptic_inference`.
            test_topk_per_image: see `instance_inference`.

        Raises:
            ValueError: if no output is enabled, or panoptic output without known things.
        """
        super().__init__(pixel_mean, pixel_std)
        if not (semantic_on or panoptic_on or instance_on):
            raise ValueError(
                "one of MODEL.MASK_FORMER.TEST.SEMANTIC_ON, INSTANCE_ON and PANOPTIC_ON must be set"
            )
        if panoptic_on and things is None:
            raise ValueError(
                "MODEL.MASK_FORMER.TEST.PANOPTIC_ON needs a data set, the first of DATASETS.TRAIN "
                "or DATASETS.TEST, whose metadata has thing_dataset_id_to_contiguous_id"
            )
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.criterion = criterion
        self.things = things
        if size_divisibility < 0:
            size_divisibility = backbone.size_divisibility
        self.size_divisibility = size_divisibility
        self.resize_first = sem_seg_postprocess_before_inference
        self.semantic_on = semantic_on
        self.panoptic_on = panoptic_on
        self.instance_on = instance_on
        self.object_mask_threshold = object_mask_threshold
        self.overlap_threshold = overlap_threshold
        self.test_topk_per_image = test_topk_per_image

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.MASK_FORMER
        backbone = build_backbone(cfg)
        head = build_sem_seg_head(cfg, backbone.output_shape())
        matcher = HungarianMatcher(
            node.CLASS_WEIGHT, node.MASK_WEIGHT, node.DICE_WEIGHT, node.TRAIN_NUM_POINTS
        )
        criterion = SetCriterion(
            head.num_classes,
            matcher,
            {
                "loss_ce": node.CLASS_WEIGHT,
                "loss_mask": node.MASK_WEIGHT,
                "loss_dice": node.DICE_WEIGHT,
            },
            no_object_weight=node.NO_OBJECT_WEIGHT,
            num_points=node.TRAIN_NUM_POINTS,
            oversample_ratio=node.OVERSAMPLE_RATIO,
            importance_sample_ratio=node.IMPORTANCE_SAMPLE_RATIO,
            deep_supervision=node.DEEP_SUPERVISION,
        )
        test = node.TEST
        return {
            "backbone": backbone,
            "sem_seg_head": head,
            "criterion": criterion,
            "things": _things(cfg),
            "size_divisibility": node.SIZE_DIVISIBILITY,
            "sem_seg_postprocess_before_inference": (
                test.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE or test.PANOPTIC_ON or test.INSTANCE_ON
            ),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "semantic_on": test.SEMANTIC_ON,
            "panoptic_on": test.PANOPTIC_ON,
            "instance_on": test.INSTANCE_ON,
            "object_mask_threshold": test.OBJECT_MASK_THRESHOLD,
            "overlap_threshold": test.OVERLAP_THRESHOLD,
            "test_topk_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: for each image ``image`` (3, H, W); in training ``instances`` with
                ``gt_classes`` (G,) and ``gt_masks`` (G, H, W), a tensor or BitMasks; in inference
                optionally ``height`` and ``width`` of the output, by default those of the image.

        Returns:
            In training a dict of losses. In inference for each image a dict with the enabled ones
            of ``sem_seg`` (K, height, width), ``panoptic_seg`` (see `panoptic_inference`) and
            ``instances`` (see `instance_inference`).
        """
        images = ImageList.from_tensors(
            [self.normalize(x["image"]) for x in batched_inputs],
            self.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )
        outputs = self.sem_seg_head(self.backbone(images.tensor))
        padded = tuple(images.tensor.shape[-2:])
        if self.training:
            return self.criterion(outputs, [self._target(x, padded) for x in batched_inputs])

        results = []
        for logits, masks, size, x in zip(
            outputs["pred_logits"],
            outputs["pred_masks"],
            images.image_sizes,
            batched_inputs,
            strict=True,
        ):
            wanted = (x.get("height", size[0]), x.get("width", size[1]))
            infer = retry_if_cuda_oom(self._infer)
            results.append(infer(logits.float(), masks.float(), padded, size, wanted))
        return results

    def _target(self, x: dict[str, Any], padded: tuple[int, int]) -> dict[str, Tensor]:
        """Labels (G,) and masks (G, H, W) of one image, padded like the batch."""
        instances: Instances = x["instances"].to(self.device)
        masks = instances.gt_masks
        masks = masks.tensor if isinstance(masks, BitMasks) else masks
        if not isinstance(masks, Tensor):
            raise ValueError(
                f"gt_masks must be a tensor or BitMasks, got {type(masks).__name__}; choose an "
                "INPUT.DATASET_MAPPER_NAME of this project, or set INPUT.MASK_FORMAT to 'bitmask'"
            )
        missing = [n - m for n, m in zip(padded, masks.shape[-2:], strict=True)]
        masks = F.pad(masks, (0, missing[1], 0, missing[0]))
        return {"labels": instances.gt_classes, "masks": masks}

    def _infer(
        self,
        logits: Tensor,
        masks: Tensor,
        padded: tuple[int, int],
        size: tuple[int, int],
        wanted: tuple[int, int],
    ) -> dict[str, Any]:
        """Outputs of one image.

        Args:
            logits: (Q, K + 1) class logits.
            masks: (Q, H', W') mask logits.
            padded: height and width of the batch.
            size: height and width of the image in it.
            wanted: height and width of the output.
        """
        masks = F.interpolate(masks[None], padded, mode="bilinear", align_corners=False)[0]
        if self.resize_first:
            masks = sem_seg_postprocess(masks, size, *wanted)
        result: dict[str, Any] = {}
        if self.semantic_on:
            scores = semantic_inference(logits, masks)
            if not self.resize_first:
                scores = sem_seg_postprocess(scores, size, *wanted)
            result["sem_seg"] = scores
        if self.panoptic_on:
            result["panoptic_seg"] = panoptic_inference(
                logits, masks, self.things, self.object_mask_threshold, self.overlap_threshold
            )
        if self.instance_on:
            result["instances"] = instance_inference(
                logits, masks, self.things, self.test_topk_per_image
            )
        return result


def _things(cfg: CfgNode) -> frozenset[int] | None:
    """Contiguous ids of the thing classes, from the metadata of the first data set named."""
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        ids = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id")
        return None if ids is None else frozenset(ids.values())
    return None
