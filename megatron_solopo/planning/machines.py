"""Machine files: the rates by which a step's time is forecast, of this package or of a user."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, TypeAdapter
from pydantic.dataclasses import dataclass

from megatron_solopo.data.validation import Number, Whole, validated, wrong
from megatron_solopo.errors import UserError, nearest
from megatron_solopo.yaml_options import OptionFile

FLAG = "--machine"


def _positive(value: float) -> float:
    if not 0 < value < float("inf"):
        raise wrong("must be a number above 0")
    return value


def _ordered(value: list[float]) -> list[float]:
    if len(value) != 2 or value[0] > value[1]:
        raise wrong(f"must be [low, high], found {value}")
    return value


def _share(value: list[float]) -> list[float]:
    if value[1] > LARGEST_SHARE:
        raise wrong(f"must be fractions of the peak, found {value[1]:g}")
    return value


def _dtypes(value: dict[str, float]) -> dict[str, float]:
    for name in value:
        if name not in DTYPES:
            raise wrong(f"has the unknown dtype {name!r}; dtypes are {', '.join(DTYPES)}")
    return value


LARGEST_SHARE = 2.0
"""Calibration scales all fractions by one factor, so that one may be above 1; a larger one is a percentage."""

Positive = Annotated[Number, AfterValidator(_positive)]
Range = Annotated[list[Positive], AfterValidator(_ordered)]
"""[low, high]."""
Share = Annotated[Range, AfterValidator(_share)]
DTYPES = ("bfloat16", "float16", "float32", "float64", "float8")


@dataclass(frozen=True)
class Achieved:
    """Fractions of the peaks that kernels and collectives reach, each [low, high].

    Attributes:
        products: matrix products, of ``tflops``.
        attention: fused attention, of ``tflops``.
        memory: memory-bound operators, of ``memory_gb_per_s``.
        collectives: of ``node_gb_per_s`` and ``network_gb_per_s``.
    """

    products: Share
    attention: Share
    memory: Share
    collectives: Share


@dataclass(frozen=True)
class Host:
    """The main memory of a node; each of its GPUs has an equal share of it, and of its bandwidth.

    Attributes:
        memory_gib: GiB.
        memory_gb_per_s: bandwidth, GB/s.
        link_gb_per_s: bandwidth between a GPU and main memory, one direction, GB/s.
        achieved: [low, high] fraction of both bandwidths.
    """

    memory_gib: Positive
    memory_gb_per_s: Positive
    link_gb_per_s: Positive
    achieved: Share


@dataclass(frozen=True)
class Machine:
    """A kind of GPU, and how those of a node and of several nodes are connected.

    Attributes:
        name: in words.
        gpus_per_node: processes of a node.
        memory_gib: of a GPU, GiB, as torch reports it.
        tflops: dtype -> peak of dense matrix products of a GPU, TFLOP/s.
        memory_gb_per_s: bandwidth of a GPU's memory, GB/s.
        node_gb_per_s: bandwidth of a GPU to the others of its node, one direction, GB/s.
        network_gb_per_s: bandwidth of a GPU's share of the network, one direction, GB/s.
        achieved: fractions of the peaks.
        collective_us: [low, high] microseconds that a collective takes whatever its size.
        launch_us: [low, high] microseconds in which the host starts an operator.
        host: main memory; None: not known, so nothing of a GPU is kept there.
    """

    name: str
    gpus_per_node: Annotated[Whole, AfterValidator(_positive)]
    memory_gib: Positive
    tflops: Annotated[dict[str, Positive], AfterValidator(_dtypes)]
    memory_gb_per_s: Positive
    node_gb_per_s: Positive
    network_gb_per_s: Positive
    achieved: Achieved
    collective_us: Range
    launch_us: Range
    host: Host | None = None

    def peak(self, dtype: str) -> float:
        """Returns the FLOP/s of products in a dtype, as torch names it.

        Raises:
            UserError: the file has no rate for it.
        """
        key = "float8" if dtype.startswith("float8") else dtype
        if key not in self.tflops:
            raise UserError(
                "field-missing",
                f"{FLAG}: {self.name} has no rate for {key}; add '{key}: TFLOP/s' to its field 'tflops'",
            )
        return self.tflops[key] * 1e12

    def host_share(self) -> Host:
        """Returns the share of main memory and of its bandwidth that a GPU has.

        Raises:
            UserError: the file does not describe the host.
        """
        if self.host is None:
            raise UserError(
                "field-missing",
                f"{FLAG}: {self.name} has no field 'host', and the run keeps states or activations in main memory; add "
                f"'host:' with {', '.join(Host.__dataclass_fields__)}",
            )
        of_node = self.host.memory_gib, self.host.memory_gb_per_s
        gib, bandwidth = (value / self.gpus_per_node for value in of_node)
        return replace(self.host, memory_gib=gib, memory_gb_per_s=bandwidth)

    def with_host_memory(self, gib: float) -> Machine:
        """Returns this machine with another size of a node's main memory.

        Raises:
            UserError: the file does not describe the host.
        """
        self.host_share()
        assert self.host is not None
        return replace(self, host=replace(self.host, memory_gib=gib))

    def scaled(self, factor: float, name: str) -> Machine:
        """Returns this machine with one value in the place of each range, at which everything is ``factor`` times as
        fast as in the middle of the range.

        Raises:
            UserError: a fraction would be above `LARGEST_SHARE`.
        """
        fractions = asdict(self.achieved) | ({"host": self.host.achieved} if self.host else {})
        achieved = {key: _middle_rate(values) * factor for key, values in fractions.items()}
        for key, value in achieved.items():
            if value > LARGEST_SHARE:
                raise UserError(
                    "machine-calibration",
                    f"{name}: the measured step is {factor:.2f} times as fast as {self.name}, which would take "
                    f"{key} to {value:.2f} of its peak; use the machine file of the GPU that the run had",
                )
        times = {key: sum(getattr(self, key)) / 2 / factor for key in ("collective_us", "launch_us")}
        return replace(
            self,
            name=name,
            host=self.host and replace(self.host, achieved=[achieved.pop("host")] * 2),
            achieved=Achieved(**{key: [value, value] for key, value in achieved.items()}),
            **{key: [value, value] for key, value in times.items()},
        )

    def text(self) -> str:
        """Returns the machine as the text of a machine file."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        return yaml.safe_dump(fields, sort_keys=False)


def _middle_rate(values: list[float]) -> float:
    """Returns the rate whose time is the mean of the times at both ends of a range."""
    low, high = values
    return 2 * low * high / (low + high)


@cache
def names() -> tuple[str, ...]:
    """Lists the machine files of this package."""
    return tuple(sorted(Path(str(file)).stem for file in _folder().iterdir() if file.name.endswith(".yaml")))


def _folder() -> Any:
    return files("megatron_solopo.planning") / "machines"


def load_machine(name_or_path: str) -> Machine:
    """Reads a machine file.

    Args:
        name_or_path: one of `names`, or the path of a YAML file with the same fields.

    Raises:
        UserError: there is no such file, or a field is missing or wrong.
    """
    path = str(_folder() / f"{name_or_path}.yaml") if name_or_path in names() else name_or_path
    if not Path(path).is_file():
        hint = nearest(name_or_path, names())
        raise UserError(
            "file-missing",
            f"{FLAG} {name_or_path}: neither a machine of this package ({', '.join(names())}) nor a file{hint}",
        )
    with OptionFile(path, FLAG) as file:
        lines = file.entries(file.root, f"{path}: must hold 'name: value' lines")
        # A value by itself would be an option's, whose numbers are texts.
        record: Any = file.value(file.root) if lines and file.root is not None else {}
    unknown = sorted(record.keys() - Machine.__dataclass_fields__.keys())
    if unknown:
        where = next(line.where for line in lines if line.name == unknown[0])
        hint = nearest(unknown[0], Machine.__dataclass_fields__)
        raise UserError("option-unknown", f"{where}: a machine has no field '{unknown[0]}'{hint}")
    return validated(TypeAdapter(Machine), record, path)
