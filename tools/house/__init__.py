"""What `tools/check_layers.py` and `tools/house_picture.py` share: the package read as a graph, and its figures."""
