"""Arrays in .npz files, checked before they are unpacked."""

import math
import os
import zipfile

import numpy as np


def read_npz(
  path: str, names: tuple[str, ...] | None = None, optional: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
  """Reads arrays from an .npz file; never unpickles.

  Args:
    path: the file.
    names: the arrays wanted; None means all.
    optional: further ones, where the file has them.

  Returns:
    The arrays by name, in the order of `names`.

  Raises:
    ValueError: the file is missing or damaged, or lacks some of the arrays.
  """
  wanted = f" with {', '.join(names)}" if names else ""
  allowed = f"give an .npz file written by numpy.savez{wanted}"
  if not os.path.isfile(path):  # nor a folder, a pipe or a device, which may never end
    raise ValueError(
      f"{path} is no file: {allowed}"
      if os.path.exists(path)
      else f"there is no file {path}: {allowed}"
    )
  wanted_names = None if names is None else (*names, *optional)
  _check_sizes(path, wanted_names)
  try:
    # A damaged header can make numpy stop short of the checksum: check it first.
    with zipfile.ZipFile(path) as archive:
      damaged = archive.testzip()
    if damaged:
      raise zipfile.BadZipFile(f"{damaged} fails its checksum")
    with np.load(path, allow_pickle=False) as file:
      found = list(file.files)
      if len(set(found)) < len(found):
        raise zipfile.BadZipFile("a name comes twice")
      arrays = {
        n: file[n] for n in (found if wanted_names is None else wanted_names) if n in found
      }
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
      raise zipfile.BadZipFile("a member is no array")  # numpy gives its bytes
  except Exception as error:  # zlib, zipfile and numpy raise a dozen kinds
    reason = " ".join(str(error).split())
    raise ValueError(f"{path} cannot be read ({reason}): {allowed}") from error
  missing = [name for name in names or () if name not in arrays]
  if missing:
    has = ", ".join(found) or "nothing"
    raise ValueError(f"{path} lacks {', '.join(missing)} and holds {has}: {allowed}")
  return arrays


def _check_sizes(path, names):
  """Raises ValueError where the arrays wanted need more memory than there is.

  Only headers are read: a file may unpack to a thousand times its size. Other errors are
  raised when the arrays are read.
  """
  needed = 0
  try:
    with zipfile.ZipFile(path) as archive:
      for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if names is None or name in names:
          shape, _, dtype, _ = read_header(archive, member)
          needed += max(member.file_size, math.prod(shape) * dtype.itemsize)
  except Exception:  # zlib, zipfile and numpy raise a dozen kinds
    return
  advice = ": give fewer or smaller arrays, or stream the data from TFDS"
  check_memory(needed, f"{path} unpacks to", advice)


def read_header(
  archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> tuple[tuple[int, ...], bool, np.dtype, int]:
  """Shape, whether columns come first, dtype and length of the header of an .npy."""
  with archive.open(member) as file:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
      read = np.lib.format.read_array_header_2_0
    return *read(file), file.tell()


def check_memory(needed: int, problem: str, advice: str = "") -> None:
  """Raises ValueError where less memory than that is available, in bytes."""
  available = available_memory()
  if available is not None and needed > available:
    raise ValueError(
      f"{problem} {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB of memory are "
      f"available{advice}"
    )


def available_memory():
  """Bytes that are free or can be freed; None where the system does not tell."""
  try:
    with open("/proc/meminfo") as file:
      for line in file:
        if line.startswith("MemAvailable:"):
          return 1024 * int(line.split()[1])
  except OSError:
    pass
  return None
