"""Mistral 7B v0.1 to v0.3: Llama's layout; v0.1 has a sliding window, which `attention_window` reads."""

from __future__ import annotations

from megatron_solopo.model.families import llama
from megatron_solopo.model.families.family import Family

MISTRAL = Family("mistral", llama.table)
