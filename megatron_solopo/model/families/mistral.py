"""Mistral 7B to Mistral Small 3, Ministral and Ministral 3: Llama's layout; windows of all layers, of some, or none,
and in Ministral 3 queries that are scaled by position (`RotaryFrequencies.query_scale`)."""

from __future__ import annotations

from megatron_solopo.model.families import llama
from megatron_solopo.model.families.family import Family

MISTRAL = Family("mistral", llama.table)
MINISTRAL = Family("ministral", llama.table)
MINISTRAL3 = Family("ministral3", llama.table, rope_fields=frozenset({"llama_4_scaling_beta"}))
