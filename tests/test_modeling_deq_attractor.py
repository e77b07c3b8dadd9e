"""Attractor models: the laws of the house, and what is special to a family with a prelude."""

import pytest
import torch
from families import ATTRACTOR, application_of_f, random_ids
from generation_laws import GenerationLaws
from model_laws import ModelLaws


class TestLaws(ModelLaws):
    family = ATTRACTOR


class TestGeneration(GenerationLaws):
    family = ATTRACTOR
