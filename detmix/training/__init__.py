"""Train with Lightning: the module, the data module, callbacks, checkpoints, predictions and the export."""
