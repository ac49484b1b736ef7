"""What a training will take, before it is started: its steps are run on meta tensors, which have shapes and no memory."""
