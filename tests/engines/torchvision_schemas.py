"""Lets PyPI's torchvision be imported beside a CPU build of torch, which lacks its operators.

`make .venv-vllm/.installed` puts this into its environment, where every process imports it first:
vLLM imports torchvision in processes of its own.
"""

import torch.library

LIBRARY = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
