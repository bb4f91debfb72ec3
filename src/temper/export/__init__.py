"""A model that was trained here → a folder, or a GGUF file, that other programs read, with a model card."""

from temper.export.folder import Exported, export
from temper.export.push import push

__all__ = ["Exported", "export", "push"]
