"""The detectors of ``transformers`` whose criterion has DETR's ``get_loss``, tiny and with random parameters."""

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
    own = {"use_timm_backbone": False, "auxiliary_loss": True, "encoder_layers": 1, "dropout": 0.0, width: 32}
    backbone = resnet(tf.ResNetConfig, levels)
    return getattr(tf, f"{name}Config")(backbone_config=backbone, **own | HEADS | FFN | DECODER | kwargs)


def rt_resnet():
    return resnet(tf.RTDetrResNetConfig, LEVELS)


def yolos():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return tf.YolosConfig(image_size=[64, 64], num_detection_tokens=12, num_labels=CLASSES, **sizes)


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


LAYERS, ENCODED = ["", "_0"], ["", "_0", "_enc"]
REAL_TIME = ["", "_aux_0", "_aux_1", "_dn_0", "_dn_1"]  # aux_1 is the encoder's
LOCAL = ["_aux_0", "_dn_0", "_dn_1"]

# What to build, and which terms its loss must have at which of its outputs.
MODELS = {
    "DetrForObjectDetection": (lambda: detr("Detr"), {"ce bbox giou": LAYERS}),
    "DetrForSegmentation": (lambda: segmenting("Detr"), {"ce bbox giou": LAYERS, "mask dice": [""]}),
    "TableTransformerForObjectDetection": (lambda: detr("TableTransformer"), {"ce bbox giou": LAYERS}),
    "YolosForObjectDetection": (yolos, {"ce bbox giou": [""]}),
    "ConditionalDetrForObjectDetection": (lambda: detr("ConditionalDetr"), {"ce bbox giou": LAYERS}),
    "ConditionalDetrForSegmentation": (
        lambda: segmenting("ConditionalDetr"),
        {"ce bbox giou": LAYERS, "mask dice": [""]},
    ),
    "DabDetrForObjectDetection": (lambda: detr("DabDetr", width="hidden_size"), {"ce bbox giou": LAYERS}),
    "DeformableDetrForObjectDetection": (lambda: detr("DeformableDetr", LEVELS), {"ce bbox giou": LAYERS}),
    "GroundingDinoForObjectDetection": (lambda: grounded("GroundingDino"), {"ce bbox giou": ENCODED}),
    "MMGroundingDinoForObjectDetection": (lambda: grounded("MMGroundingDino"), {"ce bbox giou": ENCODED}),
    "LwDetrForObjectDetection": (lw_detr, {"ce bbox giou": ENCODED}),
    "RfDetrForObjectDetection": (rf_detr, {"ce bbox giou": ENCODED}),
    "RfDetrForInstanceSegmentation": (rf_detr, {"ce bbox giou mask_ce mask_dice": ENCODED}),
    "RTDetrForObjectDetection": (lambda: real_time("RTDetr", rt_resnet()), {"vfl bbox giou": REAL_TIME}),
    "RTDetrV2ForObjectDetection": (lambda: real_time("RTDetrV2", rt_resnet()), {"vfl bbox giou": REAL_TIME}),
    "DFineForObjectDetection": (
        lambda: real_time("DFine", hgnet()),
        {"vfl bbox giou": REAL_TIME, "fgl ddf": LOCAL},
    ),
    "Deimv2ForObjectDetection": (
        lambda: real_time("Deimv2", hgnet()),
        {"mal bbox giou": REAL_TIME, "fgl ddf": LOCAL},
    ),
    "Deimv2ForObjectDetection, each layer by its own matches": (
        lambda: real_time("Deimv2", hgnet(), use_dense_one_to_one=False),
        {"mal bbox giou": REAL_TIME, "fgl ddf": LOCAL},
    ),
}


def build(name):
    cls = getattr(tf, name.split(",")[0], None)
    if cls is None:
        pytest.skip(f"transformers {tf.__version__} has no {name}")
    torch.manual_seed(0)
    model = cls(MODELS[name][0]()).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for parameter in model.parameters():  # heads that start at 0 would make some terms 0 whatever the weights
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.05)
    return model


def labels(weights=None, counts=COUNTS):
    rng = torch.Generator().manual_seed(1)
    made = [
        {
            "class_labels": torch.randint(0, CLASSES, (n,), generator=rng),
            "boxes": torch.rand(n, 4, generator=rng) * 0.4 + 0.2,
            "masks": torch.rand(n, 24, 24, generator=rng) > 0.5,
        }
        for n in counts
    ]
    for label, own in zip(made, () if weights is None else weights.split(counts), strict=weights is not None):
        label["weights"] = own
    return made


def inputs(model, labels):
    """Noise with labels, as the model takes them."""
    made = {"pixel_values": torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2)), "labels": labels}
    if "Grounding" in type(model).__name__:  # as many phrases as classes, of one token or two
        made["input_ids"] = torch.tensor([[101, 5, 1012, 6, 7, 1012, 8, 1012, 9, 1012, 102]]).repeat(3, 1)
    return made


def forward(model, *label_args):
    """The model's output on noise, with the labels above, every draw of its own the same at each call."""
    torch.manual_seed(5)
    return model(**inputs(model, labels(*label_args)))
