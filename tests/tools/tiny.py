"""The sections' cases at sizes that take no time."""

LOSS = {"size": (64, 96)}

SIZES = {
    "losses": {
        "RetinaNet": LOSS,
        "FCOS": LOSS,
        "FasterRCNN": LOSS,
        "RTDetr": {"decoder_layers": 2, "num_queries": 20, "num_denoising": 40},
    },
}
