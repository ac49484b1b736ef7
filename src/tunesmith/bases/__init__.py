"""Views of base modules: what an adapter may ask of the module it sits on, whatever its type and storage."""

from .view import BaseView, view_of, view_type

__all__ = ["BaseView", "view_of", "view_type"]
