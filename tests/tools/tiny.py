"""The sections' cases at sizes that take no time."""

PAIR = {"sizes": ((12, 20), (16, 10))}
BATCH = {"size": (4, 3, 6, 10)}
LIST = {"size": (5, 3, 48, 64)}
FOLDER = {"count": 6, "size": (48, 64), "batch_size": 3}
LOSS = {"size": (64, 96)}
SIDES = {"sides": (4, 8, 16)}

SIZES = {
    "mix": {
        "uint8 CHW": PAIR,
        "uint8 HWC": PAIR,
        "float32 CHW": PAIR,
        "float16 CHW": PAIR,
        "same size": {"sizes": ((12, 20), (12, 20))},
    },
    "batch": {
        "float32 inplace": BATCH,
        "float32": BATCH,
        "uint8 inplace": BATCH,
        "uint8": BATCH,
        "uint8 from memory": BATCH | {"batches": 3},
        "float16": BATCH,
        "list float32": LIST,
        "list uint8": LIST,
        "targets": {"count": 3},
    },
    "loader": {"0 workers": FOLDER, "2 workers": FOLDER},
    "losses": {
        "RetinaNet": LOSS,
        "FCOS": LOSS,
        "FasterRCNN": LOSS,
        "RTDetr": {"decoder_layers": 2, "num_queries": 20, "num_denoising": 40},
    },
    "growth": {"boxes": {"numbers": (1, 2, 30)}, "pixels uint8": SIDES, "pixels float32": SIDES},
}
