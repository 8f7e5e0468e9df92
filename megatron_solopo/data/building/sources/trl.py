"""TRL's preference data, which training reads and of which no context can be built."""

from megatron_solopo.data.building.sources._source import Source

SOURCE = Source(
    name="trl",
    form="prompt / chosen / rejected records have no documents to build contexts from; train on the file as it "
    "is, --train-data FILE --context-mode short",
    question=None,
)
