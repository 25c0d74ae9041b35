"""Flags of writing a soup to a file."""

import dataclasses

from absl import flags

from .fields import define_flags, flag, one_of, read_fields, shared
from .out_flags import OutFlags

FORMATS = {
  "compact": (".safetensors",),
  "safetensors": (".safetensors",),
  "torch": (".pth", ".pt", ".safetensors"),
  "stablehlo": (".stablehlo",),
  "onnx": (".onnx",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(OutFlags):
  """What is written of a run; seed and data_dir are None where they are not given."""

  format: str = flag(
    "compact (a bit for each weight and the values of the kept ones; "
    "jaxsms.export.load_compact reads it), safetensors (under names such as "
    "params/Dense_0/kernel), torch (PyTorch's names and layout; of a cut network with a "
    "module that loads it), stablehlo (a program that any JAX runs), or onnx (without "
    "--out it goes to RUN/onnx, where the report times it beside the dense network).",
    one_of("format", FORMATS),
    default="compact",
  )
  cut: bool | None = flag(
    "Whether the arrays lose what the masks emptied, and have no zeros in its place. "
    "Default: of a run with --criterion=channels, but for --format=compact."
  )
  int8: bool = flag(
    "Of --format=onnx: also a file with products of int8, and the test accuracy of both.",
    default=False,
  )
  phase: int | None = flag(
    "The phase whose sparsity the one-shot soup has that is written, of a run with "
    "--baselines=one_shot_soup. Default: the last soup of the phases."
  )
  seed: int | None = shared()
  data_dir: str | None = shared()

  @property
  def in_run(self) -> bool:
    """Whether the file goes to the run's own directory."""
    return self.format == "onnx" and not self.out


define_flags(ExportConfig)


def read_config() -> ExportConfig:
  """The parsed flags.

  Raises:
    ValueError: a flag does not fit the format.
  """
  missing = [name for name in ("seed", "data_dir") if not flags.FLAGS[name].present]
  config = read_fields(ExportConfig, flags.FLAGS, dict.fromkeys(missing))
  if config.cut and config.format == "compact":
    raise ValueError(
      "--cut is not of --format=compact, which holds full shapes: give --format=safetensors"
    )
  if config.int8 and config.format != "onnx":
    raise ValueError(
      f"--int8 is of --format=onnx, and --format is {config.format}: leave it out"
    )
  if config.phase is not None and config.in_run:
    raise ValueError(
      f"--phase={config.phase} with --format=onnx needs --out: RUN/onnx holds the last "
      "soup of the phases"
    )
  return config
