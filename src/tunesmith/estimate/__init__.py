"""Memory and time predicted before a run: its steps run on meta tensors, which have shapes and no memory."""
