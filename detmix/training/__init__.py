"""Training by Lightning: the data module, the module, pictures and the command line."""
