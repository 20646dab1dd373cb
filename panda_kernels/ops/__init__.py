"""The ops, one file each; every one is a torch op under ``torch.ops.panda_kernels``."""
from ._register import SPECS
from .assemble_tokens import assemble_tokens
from .attention_pool import attention_pool
from .batch_statistics import batch_statistics
from .depthwise_conv3d import depthwise_conv3d
from .local_encoding import local_encoding
from .patch_embed import patch_embed
from .token_mlp import token_mlp
from .window_attention_pool import window_attention_pool

__all__ = ["SPECS", "assemble_tokens", "attention_pool", "batch_statistics", "depthwise_conv3d",
           "local_encoding", "patch_embed", "token_mlp", "window_attention_pool"]
