"""What results.json says of the costs of a run, to be read."""

from .json_checks import (
  listing,
  maybe,
  not_null,
  number,
  record,
  text,
  whole,
)

SHARE = number(0, 1)
MILLISECONDS = record(dict.fromkeys(("median", "min", "max"), not_null(number(0))))
SECONDS = not_null(number(0))
SHAPED = {name: whole(0, 2**63) for name in ("parameters", "multiply_adds", "bytes")}
RUN_COSTS = record(
  {
    "compiling_seconds": SECONDS,
    "phases": listing(
      record(
        {
          "method": text,
          "phase": whole(0),
          "copies": whole(1),
          "seconds_per_epoch": number(0),
          "compiling_seconds": SECONDS,
        }
      )
    ),
  },
  inference=maybe(
    record(
      {
        "device": text,
        "batch": whole(1),
        "dense": record(SHAPED),
        "phases": listing(
          record(
            {
              "phase": whole(1),
              "milliseconds": MILLISECONDS,
              "dense_milliseconds": MILLISECONDS,
              **SHAPED,
            }
          )
        ),
      }
    )
  ),
)
GROUP = {name: whole(0, 2**63) for name in ("channels", "weights", "bytes", "removed")}
SENSITIVITY = record(
  {
    "share": not_null(SHARE),
    "images": whole(0),
    "seconds": SECONDS,
    "groups": listing(
      record(
        {
          "name": text,
          "multiply_adds": maybe(whole(0, 2**63)),
          "loss": not_null(number(-1, 1)),
          **GROUP,
        }
      )
    ),
  }
)
