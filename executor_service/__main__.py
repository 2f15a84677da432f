"""``python -m executor_service``.

Exit codes: 0 on SIGTERM or SIGINT and when drained, 1 when device or link broke, 2 for wrong settings, 3 when the
scheduler refuses.
"""

import sys

from executor_service.config import ConfigError, load_settings
from executor_service.process import configure_logging, die_with_parent, set_torch_defaults
from executor_service.signals import Signals

_EXIT_WRONG_SETTINGS = 2
# IO thread and main thread share the GIL: at the default of 5 ms a frame could wait that long
_SWITCH_INTERVAL_SECONDS = 0.0005


def main() -> int:
    """Run an executor until it is told to stop; the process's exit code."""
    signals = Signals()
    try:
        settings = load_settings(sys.argv[1:])
        if settings.die_with_parent:
            die_with_parent()
        configure_logging(settings.log_level, settings.log_format)
        sys.setswitchinterval(_SWITCH_INTERVAL_SECONDS)
        set_torch_defaults()
        from executor_service.startup import serve  # loads torch; --help and wrong flags answer without it

        stop = serve(settings, signals)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_WRONG_SETTINGS
    if stop.exit_code:
        print(f"error: {stop.message}", file=sys.stderr)
    return stop.exit_code


if __name__ == "__main__":
    sys.exit(main())
