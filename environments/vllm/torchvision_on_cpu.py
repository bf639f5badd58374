"""Lets a CPU build of torch import the torchvision of PyPI, whose compiled part is for CUDA builds.

`import torchvision` gives Python implementations to two of its operators even if the compiled part, which declares them, could not be
loaded; torch then raises "operator torchvision::nms does not exist". So they are declared here, just before torchvision is imported.
Calling them fails; vLLM's models don't call them. Where the compiled part loads, nothing is done.

`./dev engines` copies this file and its `.pth`, which imports it in every process, into the site-packages of `.venv-vllm`.
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

DECLARED = []  # a declaration lasts as long as its library object


class Declare:
    """Found first on the import path; does its work once, and lets the usual finders find the module."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(cls)
            spec = PathFinder.find_spec(name)
            if spec is not None and spec.origin is not None and not compiled_part_loads(Path(spec.origin).parent):
                from torch.library import Library

                DECLARED.append(Library("torchvision", "DEF"))
                for operator in ("nms", "qnms"):
                    DECLARED[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def compiled_part_loads(package):
    import torch

    try:
        torch.ops.load_library(package / "_C.so")
    except OSError:
        return False
    return True


sys.meta_path.insert(0, Declare)
