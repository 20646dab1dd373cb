"""The ops, one file each; every one is a torch op under ``torch.ops.panda_kernels``."""
from ._register import SPECS
from .depthwise_conv3d import depthwise_conv3d

__all__ = ["SPECS", "depthwise_conv3d"]
