"""Views of base modules: what an adapter may ask of the module it sits on, whatever its type and storage."""

from . import dense, float8, quantised  # fill the table of views
from .view import BaseView, view_of, view_type

__all__ = ["BaseView", "dense", "float8", "quantised", "view_of", "view_type"]
