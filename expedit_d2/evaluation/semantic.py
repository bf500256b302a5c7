"""Detectron2's mIoU with checked labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import SemSegEvaluator

from ..data.classes import check_ids
from ..data.images import load_labels, read_header

__all__ = ["SemanticEvaluator"]


class SemanticEvaluator(SemSegEvaluator):
    """Detectron2's mIoU, which would confuse classes that the data set does not have."""

    def __init__(self, dataset_name: str, output_dir: str, classes: int | None = None) -> None:
        """
        Args:
            dataset_name: a registered data set.
            output_dir: folder for predictions.
            classes: of the model; used if the data set only has the number of ids in its files.
        """
        super().__init__(dataset_name, output_dir=output_dir, sem_seg_loading_fn=self._read)
        counted = MetadataCatalog.get(dataset_name).get("counted_classes", False)
        if counted and classes is not None and classes > self._num_classes:
            self._class_names = [str(number) for number in range(classes)]
            self._num_classes = classes
            # It has 8 bits in Detectron2, and needs an additional value.
            self._compute_boundary_iou &= classes < np.iinfo(np.uint8).max

    def _read(self, file_name: str, dtype: Any) -> np.ndarray:
        labels = load_labels(file_name).astype(dtype)
        whose = repr(self._dataset_name)
        check_ids(file_name, labels, self._num_classes, self._ignore_label, whose)
        return labels

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict[str, Any]]) -> None:
        """Compare the scores (K, height, width) of a batch with its labels.

        Raises:
            ValueError: if labels are not classes or have another size, or if the model has more
                classes than the data set.
        """
        for item, output in zip(inputs, outputs, strict=True):
            file = self.input_file_to_gt_file[item["file_name"]]
            size, shape = read_header(file).size, tuple(output["sem_seg"].shape[1:])
            if size != shape:
                raise ValueError(
                    f"{file} has {size[0]} x {size[1]} pixels, but the image "
                    f"{item['file_name']} has {shape[0]} x {shape[1]}"
                )
            if len(output["sem_seg"]) > self._num_classes:
                raise ValueError(
                    f"DATASETS.TEST: {self._dataset_name!r} has {self._num_classes} classes, but "
                    f"the model has {len(output['sem_seg'])} (MODEL.SEM_SEG_HEAD.NUM_CLASSES)"
                )
        super().process(inputs, outputs)
