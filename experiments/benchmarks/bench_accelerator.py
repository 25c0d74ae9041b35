"""Takes every figure of an accelerator that is open, within ten minutes.

python -m experiments.benchmarks.bench_accelerator --out=OUT
python -m experiments.benchmarks.bench_accelerator --out=OUT --parts=bench --minutes=9
python -m experiments.benchmarks.bench_accelerator --out=OUT --parts=sms --data_dir=DIR

Each command runs in a process of its own, and what it prints goes into a text file beside
its figures. One that is not done when its share of the time is over is ended, and said.
The parts: `convolution` (ways to run convolutions), `bench` (training steps of m copies
beside PyTorch), `sms` (Sparse Model Soups of ResNet-18 on CIFAR-10, timed as a whole) and
`tests` (the quick tests on this device).
"""

import os
import pathlib
import subprocess
import sys
import time
from typing import NamedTuple

from absl import app, flags

from ..run.terminal import print_line, terminal

TIMED = ("--rounds=3", "--steps=20")
# Under float32 products are TF32 where the device has it.
NETWORKS = (
  ("mlp", ("--model=mlp", "--copies=1,5,16")),
  ("resnet8", ("--dataset=cifar10", "--model=resnet8", "--copies=1,8,16")),
  ("resnet20", ("--dataset=cifar10", "--model=resnet20", "--copies=1,8")),
  (
    "resnet20_bfloat16",
    ("--dataset=cifar10", "--model=resnet20", "--copies=1,8", "--precision=bfloat16"),
  ),
  (
    "resnet18_bfloat16",
    ("--dataset=cifar10", "--model=resnet18", "--copies=1,5", "--precision=bfloat16"),
  ),
  (
    "resnet18_unrolled",
    (
      "--dataset=cifar10", "--model=resnet18", "--copies=5", "--precision=bfloat16",
      "--convolution=unrolled", "--torch=none",
    ),
  ),
  (
    "vit_tiny_bfloat16",
    ("--dataset=cifar10", "--model=vit_tiny", "--copies=1,5", "--precision=bfloat16"),
  ),
)  # fmt: skip
SMS = (
  "--dataset=cifar10", "--model=resnet18", "--ingredients=5", "--phases=3",
  "--goal_sparsity=0.98", "--retrain_epochs=10", "--baselines=imp", "--precision=bfloat16",
  "--landscape=none",
)  # fmt: skip
TESTS = ("tests/test_training.py", "tests/test_sms.py", "tests/test_convolution.py",
         "tests/test_resume.py", "tests/test_baselines.py")  # fmt: skip


class Command(NamedTuple):
  """One command of a part.

  Attributes:
    name: of its files.
    arguments: behind `python -m`.
    share: of the time that its part has.
  """

  name: str
  arguments: tuple[str, ...]
  share: float


def commands(
  part: str, out: pathlib.Path, minutes: float, data_dir: str | None
) -> list[Command]:
  """What a part of so many minutes runs, in order."""
  package = __package__.rpartition(".")[0]  # its name is another where it is installed
  if part == "convolution":
    module = f"{__package__}.bench_convolution"
    figures = (f"--json={out / 'convolution.json'}", f"--minutes={0.9 * minutes}")
    return [Command("convolution", (module, *figures), 1.0)]
  if part == "bench":
    return [
      Command(
        name,
        (f"{package}.bench", *options, *TIMED, f"--json={out / name}.json"),
        1 / len(NETWORKS),
      )
      for name, options in NETWORKS
    ]
  if part == "sms":
    where = [f"--workdir={out / 'resnet18'}"]
    where += [f"--data_dir={data_dir}"] if data_dir else []
    return [Command("sms", (f"{package}.sms", *SMS, "--epochs=20", *where), 1.0)]
  return [Command("tests", ("pytest", "-n", "0", *TESTS), 1.0)]


def run(command: Command, out: pathlib.Path, seconds: float) -> str:
  """Runs it for at most so long; gives a sentence on how it ended."""
  started = time.monotonic()
  environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
  with open(out / f"{command.name}.txt", "wb") as file:
    file.write(f"python -m {' '.join(command.arguments)}\n\n".encode())
    file.flush()
    try:
      done = subprocess.run(
        [sys.executable, "-m", *command.arguments], stdout=file,
        stderr=subprocess.STDOUT, timeout=seconds, env=environment, check=False,
      )  # fmt: skip
      how = "finished" if done.returncode == 0 else f"ended with status {done.returncode}"
    except subprocess.TimeoutExpired:
      how = "was not done in its time and was ended"
  return f"{command.name} {how} after {time.monotonic() - started:.0f} s"


def define_flags() -> None:
  """Defines the flags; called by this binary alone."""
  flags.DEFINE_string("out", None, "Folder for all output.", required=True)
  flags.DEFINE_multi_enum(
    "parts", ["convolution", "bench"], ["convolution", "bench", "sms", "tests"],
    "What to run; may be given several times.",
  )  # fmt: skip
  flags.DEFINE_float("minutes", 9.0, "For all parts together.", 0.01)
  flags.DEFINE_string("data_dir", None, "Where TFDS finds prepared CIFAR-10.")


def main(argv: list[str]) -> None:
  """Runs the parts that the flags name."""
  given = flags.FLAGS
  out, console = pathlib.Path(given.out), terminal()
  out.mkdir(parents=True, exist_ok=True)
  each = 60 * given.minutes / len(given.parts)
  for part in given.parts:
    for command in commands(part, out, each / 60, given.data_dir):
      print_line(console, run(command, out, each * command.share))


if __name__ == "__main__":
  define_flags()
  app.run(main)
