"""2WikiMultihopQA (arXiv 2011.01060), whose records are HotpotQA's."""

from __future__ import annotations

import dataclasses

from megatron_solopo.data.building.sources import hotpotqa

SOURCE = dataclasses.replace(hotpotqa.SOURCE, name="2wiki", form="as `hotpotqa`")
