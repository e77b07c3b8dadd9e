"""hf_deq: deep equilibrium language models as Hugging Face Transformers models."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_deq import DEQConfig
from .configuration_deq_attractor import DEQAttractorConfig
from .configuration_deq_transformer import DEQTransformerConfig
from .configuration_deq_trellisnet import DEQTrellisNetConfig
from .equilibrium import ImplicitGradient, PhantomGradient, UnrolledGradient, equilibrium
from .fixed_point import AndersonSolver, BroydenSolver, ConvergenceWarning, FixedPointSolution, PicardSolver
from .jacobian import jacobian_regularization, spectral_radius
from .modeling_deq_attractor import (
    DEQAttractorForCausalLM,
    DEQAttractorForSequenceClassification,
    DEQAttractorModel,
)
from .modeling_deq_transformer import (
    DEQTransformerForCausalLM,
    DEQTransformerForSequenceClassification,
    DEQTransformerModel,
)
from .modeling_deq_trellisnet import (
    DEQTrellisNetForCausalLM,
    DEQTrellisNetForSequenceClassification,
    DEQTrellisNetModel,
)
from .reversible import ReversibleGradient

AutoConfig.register("deq_transformer", DEQTransformerConfig)
AutoModel.register(DEQTransformerConfig, DEQTransformerModel)
AutoModelForCausalLM.register(DEQTransformerConfig, DEQTransformerForCausalLM)
AutoModelForSequenceClassification.register(DEQTransformerConfig, DEQTransformerForSequenceClassification)
AutoConfig.register("deq_trellisnet", DEQTrellisNetConfig)
AutoModel.register(DEQTrellisNetConfig, DEQTrellisNetModel)
AutoModelForCausalLM.register(DEQTrellisNetConfig, DEQTrellisNetForCausalLM)
AutoModelForSequenceClassification.register(DEQTrellisNetConfig, DEQTrellisNetForSequenceClassification)
AutoConfig.register("deq_attractor", DEQAttractorConfig)
AutoModel.register(DEQAttractorConfig, DEQAttractorModel)
AutoModelForCausalLM.register(DEQAttractorConfig, DEQAttractorForCausalLM)
AutoModelForSequenceClassification.register(DEQAttractorConfig, DEQAttractorForSequenceClassification)

__version__ = "0.1.0"

__all__ = [
    "AndersonSolver",
    "BroydenSolver",
    "ConvergenceWarning",
    "DEQAttractorConfig",
    "DEQAttractorForCausalLM",
    "DEQAttractorForSequenceClassification",
    "DEQAttractorModel",
    "DEQConfig",
    "DEQTransformerConfig",
    "DEQTransformerForCausalLM",
    "DEQTransformerForSequenceClassification",
    "DEQTransformerModel",
    "DEQTrellisNetConfig",
    "DEQTrellisNetForCausalLM",
    "DEQTrellisNetForSequenceClassification",
    "DEQTrellisNetModel",
    "FixedPointSolution",
    "ImplicitGradient",
    "PhantomGradient",
    "PicardSolver",
    "ReversibleGradient",
    "UnrolledGradient",
    "equilibrium",
    "jacobian_regularization",
    "spectral_radius",
]
