"""The detectors of ``transformers`` whose criterion has DETR's ``get_loss``, a few hundred parameters wide."""

import pytest
import torch
import transformers as tf
from torch import nn

CLASSES, COUNTS = 4, (2, 0, 3)

HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
FFN = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
DECODER = {"decoder_layers": 2, "num_queries": 12, "num_labels": CLASSES}
PYRAMID = {
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [8, 8, 16],
    "decoder_in_channels": [16] * 3,
    "num_denoising": 6,
}
LEVELS = ["stage2", "stage3", "stage4"]


def resnet(cls, levels):
    widths = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1] * 4, "layer_type": "basic"}
    return cls(out_features=levels, **widths)


def hgnet():
    widths = {f"stage_{kind}_channels": [8] * 4 for kind in ("in", "mid")} | {"stage_out_channels": [8, 8, 8, 16]}
    counts = {"stage_num_blocks": [1] * 4, "stage_numb_of_layers": [1] * 4, "depths": [1] * 4}
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "stem_channels": [3, 8, 8]}
    return tf.HGNetV2Config(out_features=LEVELS, **widths, **counts, **sizes)


def detr(name, levels=LEVELS[2:], width="d_model", **kwargs):
    own = {"use_timm_backbone": False, "auxiliary_loss": True, "encoder_layers": 1, width: 32}
    backbone = resnet(tf.ResNetConfig, levels)
    return getattr(tf, f"{name}Config")(backbone_config=backbone, **own | HEADS | FFN | DECODER | kwargs)


def segmenting(name):
    # Its mask head wants four levels, and widths that eight heads leave divisible by 8.
    return detr(name, ["stem", *LEVELS], encoder_attention_heads=8, decoder_attention_heads=8)


def real_time(name, backbone, **kwargs):
    return getattr(tf, f"{name}Config")(
        backbone_config=backbone, d_model=16, **HEADS | FFN | PYRAMID | DECODER | kwargs
    )


def grouped(name, backbone, width, **kwargs):
    backbone = getattr(tf, backbone)(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, num_windows=4, **kwargs
    )
    heads = {"decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2, "decoder_ffn_dim": 16}
    sizes = {"c2f_num_blocks": 1, "decoder_n_points": 2, "group_detr": 2, "d_model": 32}
    return getattr(tf, f"{name}Config")(backbone_config=backbone, **heads | sizes | DECODER | width)


def grounded(name):
    text = tf.BertConfig(
        vocab_size=1030, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    own = {"text_config": text, "max_text_len": 16, "num_feature_levels": 3, "fusion_droppath": 0.0}
    return detr(name, LEVELS, **own)


def lw_detr():
    scales = {"projector_scale_factors": [1.0]}
    return grouped("LwDetr", "LwDetrViTConfig", scales, out_indices=[1, 2], window_block_indices=[0])


def rf_detr():
    ratio = {"mask_point_sample_ratio": 1}
    return grouped("RfDetr", "RfDetrDinov2Config", ratio, out_indices=[1, 2], patch_size=16)


CONFIGS = {
    "DetrForObjectDetection": lambda: detr("Detr"),
    "DetrForSegmentation": lambda: segmenting("Detr"),
    "TableTransformerForObjectDetection": lambda: detr("TableTransformer"),
    "YolosForObjectDetection": lambda: tf.YolosConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[64, 64],
        num_detection_tokens=12,
        num_labels=CLASSES,
    ),
    "ConditionalDetrForObjectDetection": lambda: detr("ConditionalDetr"),
    "ConditionalDetrForSegmentation": lambda: segmenting("ConditionalDetr"),
    "DabDetrForObjectDetection": lambda: detr("DabDetr", width="hidden_size"),
    "DeformableDetrForObjectDetection": lambda: detr("DeformableDetr", LEVELS),
    "GroundingDinoForObjectDetection": lambda: grounded("GroundingDino"),
    "MMGroundingDinoForObjectDetection": lambda: grounded("MMGroundingDino"),
    "LwDetrForObjectDetection": lw_detr,
    "RfDetrForObjectDetection": rf_detr,
    "RfDetrForInstanceSegmentation": rf_detr,
    "RTDetrForObjectDetection": lambda: real_time("RTDetr", resnet(tf.RTDetrResNetConfig, LEVELS)),
    "RTDetrV2ForObjectDetection": lambda: real_time("RTDetrV2", resnet(tf.RTDetrResNetConfig, LEVELS)),
    "DFineForObjectDetection": lambda: real_time("DFine", hgnet()),
    "Deimv2ForObjectDetection": lambda: real_time("Deimv2", hgnet()),
    "Deimv2ForObjectDetection, dense": lambda: real_time("Deimv2", hgnet(), use_dense_one_to_one=True),
}


def build(name):
    cls = getattr(tf, name.split(",")[0], None)
    if cls is None:
        pytest.skip(f"transformers {tf.__version__} has no {name}")
    torch.manual_seed(0)
    model = cls(CONFIGS[name]()).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for parameter in model.parameters():  # heads that start at 0 would make some terms 0 whatever the weights
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.05)
    return model


def labels(weights=None):
    rng = torch.Generator().manual_seed(1)
    made = [
        {
            "class_labels": torch.randint(0, CLASSES, (n,), generator=rng),
            "boxes": torch.rand(n, 4, generator=rng) * 0.4 + 0.2,
            "masks": torch.rand(n, 24, 24, generator=rng) > 0.5,
        }
        for n in COUNTS
    ]
    for label, own in zip(made, () if weights is None else weights.split(COUNTS), strict=weights is not None):
        label["weights"] = own
    return made


def forward(model, weights=None):
    """The model's output on noise, with the labels above, every draw of its own the same at each call."""
    torch.manual_seed(5)
    inputs = {"pixel_values": torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))}
    if "Grounding" in type(model).__name__:  # as many phrases as classes, of one token or two
        inputs["input_ids"] = torch.tensor([[101, 5, 1012, 6, 7, 1012, 8, 1012, 9, 1012, 102]]).repeat(3, 1)
    return model(labels=labels(weights), **inputs)
