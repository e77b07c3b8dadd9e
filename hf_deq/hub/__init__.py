"""Models from elsewhere and for elsewhere: the authors' checkpoints, pretrained decoders, export for the Hub."""

from ..evaluation import load_model
from .card import make_card
from .conversion import convert_checkpoint
from .export import code_files, export_hub_folder, read_config
from .record import RunRecord, read_record
from .retrofit import retrofit

__all__ = [
    "RunRecord",
    "code_files",
    "convert_checkpoint",
    "export_hub_folder",
    "load_model",
    "make_card",
    "read_config",
    "read_record",
    "retrofit",
]
